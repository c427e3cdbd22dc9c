"""The features of images by a backbone that stands still, computed once.

They are kept in PACK/features, or in RUN/features where that cannot be written to, under the hash
of the images, of the weights and of how images are cut: another run of the same backbone reads
them. There are two kinds: of a split as it is evaluated, in float32, and of several augmented views
of the training images, in bfloat16.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from fastlt.config import Config
from fastlt.data.geometry import boxes_of, geometry_of
from fastlt.data.loader import Loader
from fastlt.data.plan import Batch, evaluation_batches
from fastlt.evaluation.evaluate import EVALUATION_BATCH, evaluation_geometry
from fastlt.evaluation.forward import output_of
from fastlt.models.classifier import Classifier
from fastlt.packing.reader import Pack, Split, identity
from fastlt.training.inputs import make_input, step_seed
from fastlt.training.loaders import train_loader
from fastlt.utils.files import whole_file
from fastlt.utils.lock import in_turn
from fastlt.utils.progress import rated_progress

CACHE = "cache"  # of data.features


class FeatureLoader:
    """As a Loader, but that batches come with the features of their images, (n, D) float32.

    features: from a console for its progress, or None, to those of all images, (N, D), or of V
    views of each, (V, N, D), of which a batch's boxes name one.
    """

    engine_name, decode = "features", "no"

    def __init__(self, features: Callable[[Console | None], Tensor]) -> None:
        self._features = features
        self._values: Tensor | None = None
        self.damaged: dict[int, str] = {}

    def load(self, console: Console | None = None) -> Tensor:
        """Return the features of all images, which are computed when they are first needed."""
        if self._values is None:
            self._values = self._features(console)
        return self._values

    def iterate(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Tensor]]:
        """Yield each batch with its features."""
        values = self.load()
        for batch in batches:
            images = torch.from_numpy(batch.images)
            if values.ndim == 3:
                yield batch, values[torch.from_numpy(batch.boxes[:, 0]).long(), images].float()
            else:
                yield batch, values[images]

    def close(self) -> None:
        """Do nothing: there are neither workers nor threads."""


def features_folder(pack: Pack, run: Path) -> Path:
    """Return the folder that features are kept in."""
    folder = Path(pack.path)
    return (folder if os.access(folder, os.W_OK) else run) / "features"


def features_of(
    model: Classifier,
    pack: Pack,
    config: Config,
    device: torch.device,
    run: Path,
    console: Console | None = None,
    split: str = "train",
) -> Tensor:
    """Return the features (n, D) float32 of all images of a split, from the disk where they are.

    console: where the progress of computing them is shown; None: nowhere.
    """
    folder = features_folder(pack, run)
    path = folder / f"{features_id(model.backbone, getattr(pack, split), config)}.npy"
    with in_turn(folder / ".lock"):
        if not path.is_file():
            values = compute_features(model, pack, config, device, split, console)
            with whole_file(path) as temporary, temporary.open("wb") as file:
                np.save(file, values)
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def views_of(
    model: Classifier,
    pack: Pack,
    config: Config,
    device: torch.device,
    dtype: torch.dtype,
    run: Path,
    console: Console | None = None,
) -> Tensor:
    """Return the features (V, n, D) bfloat16 of V views of all training images, from the disk where
    they are.

    V is `data.feature_views`. View v is cut, mirrored and augmented by numbers drawn from its own.
    """
    folder = features_folder(pack, run)
    path = folder / f"{views_id(model.backbone, pack.train, config)}.npy"
    with in_turn(folder / ".lock"):
        if not path.is_file():
            shape = (config.data.feature_views, len(pack.train), int(model.backbone.num_features))  # type: ignore[arg-type]
            with whole_file(path) as temporary:
                # numpy has no bfloat16: the same bits as integers
                table = np.lib.format.open_memmap(temporary, "w+", np.int16, shape)
                computed = compute_views(model, pack, config, device, dtype, console)
                for view, images, values in computed:
                    table[view, images] = values.view(torch.int16).numpy()
                table.flush()
                del table
    return torch.from_numpy(np.load(path, mmap_mode="c")).view(torch.bfloat16)


def features_id(backbone: nn.Module, split: Split, config: Config) -> str:
    """Return the hash of what features depend on: images, weights, cut and normalisation."""
    return _hash(backbone, split, config, config.data.model_dump(include={"size", *EVALUATED}))


def views_id(backbone: nn.Module, split: Split, config: Config) -> str:
    """Return the hash of what the features of views depend on, as `features_id`."""
    cut = config.data.model_dump(include={"size", *CUT})
    return _hash(backbone, split, config, [cut, config.augment.model_dump()])


EVALUATED = {"eval_resize", "mean", "std"}
CUT = {"crop", "padding", "scale", "ratio", "flip", "mean", "std", "feature_views"}


def _hash(backbone: nn.Module, split: Split, config: Config, transform: Any) -> str:
    # arguments such as the pooling leave no trace in the weights
    model = config.model.model_dump(include={"name", "args", "pooling"})
    digest = hashlib.sha256(json.dumps([identity(split), model, transform]).encode())
    for name, tensor in backbone.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def compute_views(
    model: Classifier,
    pack: Pack,
    config: Config,
    device: torch.device,
    dtype: torch.dtype,
    console: Console | None,
) -> Iterator[tuple[int, np.ndarray, Tensor]]:
    """Yield the number of a view, images (n,) and their features (n, D) bfloat16 on the CPU."""
    data, train = config.data, pack.train
    loader = train_loader(data, pack, device, data.size)
    numbers = np.arange(len(train))
    parts = [numbers[i : i + EVALUATION_BATCH] for i in range(0, len(train), EVALUATION_BATCH)]
    batches = [(view, images) for view in range(data.feature_views) for images in parts]

    def planned() -> Iterator[Batch]:
        for view, images in batches:
            sizes = train.height[images], train.width[images]
            yield Batch(
                images, train.label[images], *boxes_of(geometry_of(data), *sizes, images, view, 0)
            )

    with still(model.backbone), closing(loader), progress_of(console) as bar:
        task = bar.add_task("features", total=len(train) * data.feature_views)
        for number, (batch, pixels) in enumerate(loader.iterate(planned())):
            view = batches[number][0]
            generator = torch.Generator().manual_seed(step_seed(view, number, 0))
            labels = torch.from_numpy(batch.labels)
            images = make_input(config, pixels, labels, generator, device, dtype)[0]
            with (
                torch.inference_mode(),
                torch.autocast(device.type, dtype, enabled=dtype != torch.float32),
            ):
                values = model.backbone(images)
            bar.advance(task, len(batch.images))
            yield view, batch.images, values.bfloat16().cpu()


@contextmanager
def still(backbone: nn.Module) -> Iterator[None]:
    """Keep a backbone in evaluation mode within the block."""
    was_training = backbone.training
    backbone.eval()
    try:
        yield
    finally:
        backbone.train(was_training)


def progress_of(console: Console | None) -> Progress:
    """Return a bar of images on a console; None: one that is not shown."""
    return rated_progress(console or Console(quiet=True), "images/s", transient=True)


def compute_features(
    model: Classifier,
    pack: Pack,
    config: Config,
    device: torch.device,
    split: str,
    console: Console | None,
) -> np.ndarray:
    """Return the features (n, D) float32 of all images of a split, in float32 arithmetic."""
    data, images = config.data, getattr(pack, split)
    loader = Loader(images, data.size, "auto", data.workers, pack.betons(split), strict=data.strict)
    batches = evaluation_batches(images, evaluation_geometry(data), EVALUATION_BATCH)
    parts = []
    with still(model.backbone), closing(loader), progress_of(console) as bar:
        task = bar.add_task("features", total=len(images))
        for batch, pixels in loader.iterate(batches):
            found = output_of(model.backbone, pixels, data.mean, data.std, device)
            parts.append(found.float().cpu().numpy())
            bar.advance(task, len(batch.images))
    return np.concatenate(parts)
