"""The features of all training images by a backbone that stands still, computed once.

They are kept in PACK/features, or in RUN/features where that cannot be written to, under the hash
of the images, of the weights and of how images are cut for evaluation: another run of the same
backbone reads them.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastlt.config import Config
from fastlt.data.loader import Loader
from fastlt.data.plan import Batch, evaluation_batches
from fastlt.evaluation.evaluate import EVALUATION_BATCH, evaluation_geometry
from fastlt.evaluation.forward import output_of
from fastlt.models.classifier import Classifier
from fastlt.packing.reader import Pack, Split, identity
from fastlt.utils.files import whole_file
from fastlt.utils.lock import in_turn


class FeatureLoader:
    """As a Loader, but that batches come with the features of their images, (n, D) float32.

    features: returns those of all images, (N, D); it is called once they are needed.
    """

    engine_name, decode = "features", "no"

    def __init__(self, features: Callable[[], Tensor]) -> None:
        self._features = features
        self.damaged: dict[int, str] = {}

    def iterate(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Tensor]]:
        """Yield each batch with its features."""
        values = self._features()
        for batch in batches:
            yield batch, values[torch.from_numpy(batch.images)]

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
    split: str = "train",
) -> Tensor:
    """Return the features (n, D) float32 of all images of a split, from the disk where they are."""
    folder = features_folder(pack, run)
    path = folder / f"{features_id(model.backbone, getattr(pack, split), config)}.npy"
    with in_turn(folder / ".lock"):
        if not path.is_file():
            values = compute_features(model, pack, config, device, split)
            with whole_file(path) as temporary, temporary.open("wb") as file:
                np.save(file, values)
    return torch.from_numpy(np.load(path, mmap_mode="c"))


def features_id(backbone: nn.Module, split: Split, config: Config) -> str:
    """Return the hash of what features depend on: images, weights, cut and normalisation."""
    transform = config.data.model_dump(include={"size", "eval_resize", "mean", "std"})
    digest = hashlib.sha256(json.dumps([identity(split), transform]).encode())
    for name, tensor in backbone.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:32]


def compute_features(
    model: Classifier, pack: Pack, config: Config, device: torch.device, split: str = "train"
) -> np.ndarray:
    """Return the features (n, D) float32 of all images of a split, in float32 arithmetic."""
    data, images = config.data, getattr(pack, split)
    was_training = model.backbone.training
    model.backbone.eval()
    loader = Loader(images, data.size, "auto", data.workers, pack.betons(split), strict=data.strict)
    batches = evaluation_batches(images, evaluation_geometry(data), EVALUATION_BATCH)
    try:
        parts = [
            output_of(model.backbone, pixels, data.mean, data.std, device).float().cpu().numpy()
            for _, pixels in loader.iterate(batches)
        ]
    finally:
        loader.close()
        model.backbone.train(was_training)
    return np.concatenate(parts)
