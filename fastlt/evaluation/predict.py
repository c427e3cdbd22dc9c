"""Predictions of a trained model on images of the user's own, wherever they come from."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from fastlt.config import DataConfig
from fastlt.data.augment import normalise
from fastlt.data.geometry import Geometry, boxes_of
from fastlt.decode.deep import Scale, scale_of
from fastlt.decode.images import fill_box
from fastlt.errors import DataError, UserError
from fastlt.evaluation.calibration import (
    Calibration,
    log_prior_change,
    parsed,
    read_calibration,
)
from fastlt.evaluation.evaluate import EVALUATION_BATCH, evaluation_geometry
from fastlt.evaluation.forward import output_of
from fastlt.evaluation.user_images import AnyImage, listed, opened, path_of
from fastlt.models.device import PRECISIONS, best_precision, find_device
from fastlt.models.export import load_exported, read_metadata
from fastlt.models.weight_files import weights_file
from fastlt.packing.depth import named_scale
from fastlt.utils.pool import cores

UNSURE = "unsure"
TTA = ("none", "flip", "crops")
MAX_LEFT_OUT = 0.15  # share of the side that crops leave out where evaluation cuts the whole square


class Prediction(NamedTuple):
    """The most probable classes of an image, the most probable first."""

    names: list[str]
    """The names of the classes."""
    probabilities: list[float]
    """Their probabilities, among all targets."""
    path: Path | None
    """The image's file, if it came from one."""
    is_unsure: bool = False
    """Whether the first probability is below the threshold."""

    @property
    def name(self) -> str:
        """The name of the first class, or `unsure`."""
        return UNSURE if self.is_unsure else self.names[0]


class Unreadable(NamedTuple):
    """An image that could not be read, and why."""

    path: Path | None
    reason: str


class Answers(NamedTuple):
    """How probabilities become answers."""

    top: int = 5
    """Classes that are named."""
    threshold: float | None = None
    """The probability below which a prediction is unsure; None: none is."""
    by_class: Mapping[str, float] = {}
    """The threshold of single classes, in place of `threshold`."""
    tta: str = "none"
    """Test-time augmentation: none; flip, the image and its mirror image; crops, its centre and
    four corners, mirrored too. Probabilities are averaged."""
    log_prior: Tensor | None = None
    """What is added to the logits, (T,), where other classes are frequent than in the training."""


class Model:
    """A trained model that predicts the target classes of images.

    module is the torch module, (N, 3, size, size) float32 normalised images to (N, T) logits, in
    evaluation mode on `device`; classes are the T names; size is the side in pixels; calibration
    has the temperature of the probabilities and thresholds; prior (T,) are the shares of the
    classes that the model answers to, None where they are not known; scale is what becomes black
    and white of images of more than eight bits, by their kind.
    """

    def __init__(
        self,
        module: nn.Module,
        classes: list[str],
        data: DataConfig,
        device: torch.device,
        calibration: Calibration | None = None,
        prior: list[float] | None = None,
        scale: Scale | None = None,
    ) -> None:
        self.module: Any = module.eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.classes = classes
        self.device = device
        self.size = data.size
        self.calibration = calibration or Calibration()
        self.prior = prior
        self.scale = scale or {}
        self._data, self._geometry = data, evaluation_geometry(data)
        self._dtype = PRECISIONS[best_precision(device)]

    def predict(
        self,
        images: AnyImage | Iterable[AnyImage],
        top: int = 5,
        batch: int = EVALUATION_BATCH,
        *,
        threshold: float | None = None,
        by_class: bool = False,
        tta: str = "none",
        prior: Mapping[str, float] | None = None,
    ) -> list[Prediction]:
        """Return the `top` most probable classes of each image.

        images: one image, a folder, whose images are taken in the order of their paths, sub-folders
        included, or any number of images: paths, Pillow images, or arrays (H, W, 3) uint8. They are
        prepared as `fastlt eval` does, `batch` at a time. threshold: the probability below which a
        prediction is unsure, by default the one that `fastlt eval --precision` has stored, if any;
        by_class: take the stored thresholds of the classes. tta: none, flip or crops. prior: the
        share of each class where the model is used. Raises DataError that names an image that
        cannot be read.
        """
        answers = self.answers(top, threshold, by_class, tta, prior)
        found: list[Prediction] = []
        for one in self.stream(images, answers, batch):
            if isinstance(one, Unreadable):
                raise DataError(one.reason)
            found.append(one)
        return found

    def answers(
        self,
        top: int = 5,
        threshold: float | None = None,
        by_class: bool = False,
        tta: str = "none",
        prior: Mapping[str, float] | None = None,
    ) -> Answers:
        """Return how probabilities become answers; see `predict`. Raises UserError for bad ones."""
        if top < 1:
            raise UserError(f"top={top}: ask for at least one class")
        if tta not in TTA:
            raise UserError(f"there is no test-time augmentation '{tta}': {', '.join(TTA)}")
        if threshold is not None and not 0 <= threshold <= 1:
            raise UserError(f"threshold={threshold} is no probability: give one from 0 to 1")
        known = self.calibration
        if by_class and not known.by_class:
            raise UserError(
                "the model has no thresholds by class: `fastlt eval RUN --precision 0.9` chooses "
                "and stores them"
            )
        change = None
        if prior is not None:
            if self.prior is None:
                raise UserError(
                    "it is not known to which shares of the classes this model answers, so they "
                    "cannot be changed: it was written by a version before 0.3"
                )
            change = log_prior_change(self.prior, dict(prior), self.classes).to(self.device)
        return Answers(
            min(top, len(self.classes)),
            known.threshold if threshold is None else threshold,
            known.by_class if by_class else {},
            tta,
            change,
        )

    def stream(
        self,
        images: AnyImage | Iterable[AnyImage],
        answers: Answers,
        batch: int = EVALUATION_BATCH,
    ) -> Iterator[Prediction | Unreadable]:
        """Yield what is found of each image in turn, in bounded memory.

        images: as of `predict`; answers: as of `answers`. An image that cannot be read comes as
        Unreadable.
        """
        for some, pixels in self._loaded(images, batch, self._views(answers.tta)):
            good = [i for i, made in enumerate(pixels) if not isinstance(made, str)]
            rows: dict[int, tuple[list[float], list[int]]] = {}
            if good:
                stacked = np.stack([cast(np.ndarray, pixels[i]) for i in good])
                best = self._probabilities(stacked, answers).topk(answers.top)
                found = zip(good, best.values.tolist(), best.indices.tolist(), strict=True)
                rows = {i: (values, numbers) for i, values, numbers in found}
            for i, image in enumerate(some):
                yield (
                    self._prediction(image, *rows[i], answers)
                    if i in rows
                    else Unreadable(path_of(image), str(pixels[i]))
                )

    def _prediction(
        self, image: AnyImage, values: list[float], numbers: list[int], answers: Answers
    ) -> Prediction:
        names = [self.classes[number] for number in numbers]
        threshold = answers.by_class.get(names[0], answers.threshold)
        is_unsure = threshold is not None and values[0] < threshold
        return Prediction(names, values, path_of(image), is_unsure)

    def features(
        self, images: AnyImage | Iterable[AnyImage], batch: int = EVALUATION_BATCH
    ) -> Tensor:
        """Return the features (n, D) float32 of images by the backbone, on the CPU.

        images and batch: as of `predict`.
        """
        mean, std, device = self._data.mean, self._data.std, self.device
        parts = []
        for _, pixels in self._loaded(images, batch, [self._geometry]):
            for made in pixels:
                if isinstance(made, str):
                    raise DataError(made)
            given = torch.from_numpy(np.stack(cast(list[np.ndarray], pixels))[:, 0])
            found = output_of(self.module.backbone, given, mean, std, device)
            parts.append(found.float().cpu())
        return torch.cat(parts)

    def _loaded(
        self, images: AnyImage | Iterable[AnyImage], batch: int, views: list[Geometry]
    ) -> Iterator[tuple[list[AnyImage], list[np.ndarray | str]]]:
        """Yield `batch` images at a time with the pixels (V, size, size, 3) uint8 of each.

        In place of pixels stands the reason where an image cannot be read. The next batch is
        decoded while this one is used.
        """
        if batch < 1:
            raise UserError(f"batch={batch}: take at least one image at a time")
        each = iter(listed(images))
        with ThreadPoolExecutor(cores()) as threads:

            def begun() -> tuple[list[AnyImage], list[Future[np.ndarray | str]]]:
                some = list(islice(each, batch))
                return some, [threads.submit(self._readable, image, views) for image in some]

            some, waiting = begun()
            while some:
                following = begun()
                yield some, [made.result() for made in waiting]
                some, waiting = following

    def transform(self, image: AnyImage) -> Tensor:
        """Return an image as `module` takes it, (3, size, size) float32 on the CPU."""
        pixels = torch.from_numpy(self._pixels(image, [self._geometry]).copy())
        return normalise(pixels, self._data.mean, self._data.std)[0]

    def _readable(self, image: AnyImage, views: list[Geometry]) -> np.ndarray | str:
        """Return the pixels of an image, or why there are none."""
        try:
            return self._pixels(image, views)
        except DataError as error:
            return str(error)

    def _pixels(self, image: AnyImage, views: list[Geometry]) -> np.ndarray:
        """Return views of an image, (V, size, size, 3) uint8, as evaluation cuts them."""
        picture = opened(image, self.scale)
        sides = np.array([picture.height]), np.array([picture.width])
        place = np.zeros(1, np.int64)
        found = []
        for view in views:
            boxes, _ = boxes_of(view, *sides, place, seed=0, epoch=0)
            found.append(fill_box(picture, moved(boxes[0], view, picture), False, self.size))
        return np.stack(found)

    def _views(self, tta: str) -> list[Geometry]:
        """Return the cuts of an image that test-time augmentation takes."""
        if tta != "crops":
            return [self._geometry]
        resize = max(self._geometry.resize, math.ceil(self.size / (1 - MAX_LEFT_OUT)))
        cut = replace(self._geometry, resize=resize)
        return [Corner(**vars(cut), at=at) for at in ((0.5, 0.5), *CORNERS)]

    @torch.inference_mode()
    def _probabilities(self, pixels: np.ndarray, answers: Answers) -> Tensor:
        """Return the probabilities (n, T) of pixels (n, V, size, size, 3) uint8, over the views."""
        count, views = pixels.shape[:2]
        flat = torch.from_numpy(pixels).flatten(0, 1)
        found = self._softmax(flat, answers)
        if answers.tta != "none":
            found = (found + self._softmax(flat.flip(2), answers)) / 2
        return found.unflatten(0, (count, views)).mean(dim=1)

    def _softmax(self, pixels: Tensor, answers: Answers) -> Tensor:
        """Return the calibrated probabilities (n, T) of pixels (n, size, size, 3) uint8."""
        mean, std = self._data.mean, self._data.std
        logits = output_of(self.module, pixels, mean, std, self.device, self._dtype).float()
        logits = logits / self.calibration.temperature
        return (logits if answers.log_prior is None else logits + answers.log_prior).softmax(dim=1)


CORNERS = ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0))


@dataclass(frozen=True)
class Corner(Geometry):
    """The centre crop, moved: `at` (0.5, 0.5) is the centre, (0, 0) the corner at the top left."""

    at: tuple[float, float] = (0.5, 0.5)


def moved(box: np.ndarray, view: Geometry, picture: Image.Image) -> np.ndarray:
    """Return the box (4,) of a view within a picture."""
    if not isinstance(view, Corner):
        return box
    down, right = view.at
    top = round(down * (picture.height - int(box[2])))
    return np.array([top, round(right * (picture.width - int(box[3]))), box[2], box[3]])


def load_model(place: Path | str, device: str = "auto", range: str | None = None) -> Model:
    """Return the model of a RUN, or of a .safetensors file that `fastlt export` wrote.

    device: a torch device; auto: a GPU where there is one. range: of images of more than eight
    bits, full or LOW,HIGH, in place of what the training's pack had.
    """
    scale = None if range is None else named_scale(range)
    path = weights_file(str(place))
    if path.suffix == ".onnx":
        raise UserError(
            f"{path} is for onnxruntime: load the RUN, or export it to a .safetensors file"
        )
    if not path.is_file():
        raise UserError(f"there is no run or model at {place}: name what `fastlt train` wrote")
    module, classes = load_exported(path)
    described = read_metadata(path)
    data = DataConfig.model_validate(described["data"])
    calibration = (
        parsed(json.dumps(described["calibration"]), str(path))
        if "calibration" in described
        else read_calibration(path.parent)
    )
    scale = scale_of(described.get("scale")) if scale is None else scale
    prior = described.get("prior")
    return Model(module, classes, data, find_device(device), calibration, prior, scale)
