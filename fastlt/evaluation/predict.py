"""Predictions of a trained model on images of the user's own, wherever they come from."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fastlt.config import DataConfig
from fastlt.data.augment import normalise
from fastlt.data.geometry import boxes_of
from fastlt.decode.images import (
    EXTENSIONS,
    FAILURES,
    BadImage,
    decode_pil,
    fill_box,
    to_rgb,
    upright,
)
from fastlt.errors import DataError, UserError
from fastlt.evaluation.evaluate import EVALUATION_BATCH, evaluation_geometry
from fastlt.evaluation.forward import output_of
from fastlt.models.classifier import Classifier
from fastlt.models.device import PRECISIONS, best_precision, find_device
from fastlt.models.export import load_exported, read_metadata
from fastlt.models.weight_files import weights_file
from fastlt.utils.pool import cores

# A path, an image of Pillow, or an array (H, W, 3) uint8.
AnyImage: TypeAlias = str | PathLike[str] | Image.Image | np.ndarray | Tensor


class Prediction(NamedTuple):
    """The most probable classes of an image, the most probable first."""

    names: list[str]
    """The names of the classes."""
    probabilities: list[float]
    """Their probabilities, among all targets."""
    path: Path | None
    """The image's file, if it came from one."""


class Model:
    """A trained model that predicts the target classes of images.

    module is the torch module, (N, 3, size, size) float32 normalised images to (N, T) logits, in
    evaluation mode on `device`; classes are the T names; size is the side in pixels.
    """

    def __init__(
        self, module: Classifier, classes: list[str], data: DataConfig, device: torch.device
    ) -> None:
        self.module = module.eval().to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.classes = classes
        self.device = device
        self.size = data.size
        self._data, self._geometry = data, evaluation_geometry(data)
        self._dtype = PRECISIONS[best_precision(device)]

    def predict(
        self, images: AnyImage | Iterable[AnyImage], top: int = 5, batch: int = EVALUATION_BATCH
    ) -> list[Prediction]:
        """Return the `top` most probable classes of each image.

        images: one image, a folder, whose images are taken in the order of their paths, sub-folders
        included, or any number of images: paths, Pillow images, or arrays (H, W, 3) uint8. They are
        prepared as `fastlt eval` does, `batch` at a time. Raises DataError that names an image that
        cannot be read.
        """
        if top < 1:
            raise UserError(f"top={top}: ask for at least one class")
        found: list[Prediction] = []
        for some, pixels in self._loaded(images, batch):
            best = self._probabilities(pixels).topk(min(top, len(self.classes)))
            for image, values, classes in zip(
                some, best.values.tolist(), best.indices.tolist(), strict=True
            ):
                names = [self.classes[number] for number in classes]
                found.append(Prediction(names, values, path_of(image)))
        return found

    def features(
        self, images: AnyImage | Iterable[AnyImage], batch: int = EVALUATION_BATCH
    ) -> Tensor:
        """Return the features (n, D) float32 of images by the backbone, on the CPU.

        images and batch: as of `predict`.
        """
        mean, std, device = self._data.mean, self._data.std, self.device
        return torch.cat(
            [
                output_of(self.module.backbone, pixels, mean, std, device).float().cpu()
                for _, pixels in self._loaded(images, batch)
            ]
        )

    def _loaded(
        self, images: AnyImage | Iterable[AnyImage], batch: int
    ) -> Iterator[tuple[list[AnyImage], Tensor]]:
        """Yield `batch` images at a time, with their pixels (n, size, size, 3) uint8."""
        if batch < 1:
            raise UserError(f"batch={batch}: take at least one image at a time")
        each = iter(listed(images))
        with ThreadPoolExecutor(cores()) as threads:
            while some := list(islice(each, batch)):
                yield some, torch.from_numpy(np.stack(list(threads.map(self._pixels, some))))

    def transform(self, image: AnyImage) -> Tensor:
        """Return an image as `module` takes it, (3, size, size) float32 on the CPU."""
        pixels = torch.from_numpy(self._pixels(image)[None].copy())
        return normalise(pixels, self._data.mean, self._data.std)[0]

    def _pixels(self, image: AnyImage) -> np.ndarray:
        """Return the centre of an image, (size, size, 3) uint8, as evaluation cuts it."""
        picture = opened(image)
        sides = np.array([picture.height]), np.array([picture.width])
        boxes, _ = boxes_of(self._geometry, *sides, np.zeros(1, np.int64), seed=0, epoch=0)
        return fill_box(picture, boxes[0], False, self.size)

    @torch.inference_mode()
    def _probabilities(self, pixels: Tensor) -> Tensor:
        """Return the probabilities (n, T) of pixels (n, size, size, 3) uint8."""
        mean, std = self._data.mean, self._data.std
        logits = output_of(self.module, pixels, mean, std, self.device, self._dtype)
        return logits.float().softmax(dim=1)


def load_model(place: Path | str, device: str = "auto") -> Model:
    """Return the model of a RUN, or of a .safetensors file that `fastlt export` wrote.

    device: a torch device; auto: a GPU where there is one.
    """
    path = weights_file(str(place))
    if path.suffix == ".onnx":
        raise UserError(
            f"{path} is for onnxruntime: load the RUN, or export it to a .safetensors file"
        )
    if not path.is_file():
        raise UserError(f"there is no run or model at {place}: name what `fastlt train` wrote")
    module, classes = load_exported(path)
    data: dict[str, Any] = read_metadata(path)["data"]
    return Model(module, classes, DataConfig.model_validate(data), find_device(device))


def listed(images: AnyImage | Iterable[AnyImage]) -> Iterable[AnyImage]:
    """Return the single images: those of a folder by path, of a batch (n, H, W, 3) one by one.

    Raises DataError where a folder holds none.
    """
    if isinstance(images, str | PathLike):
        path = Path(images)
        return images_below(path) if path.is_dir() else [path]
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, np.ndarray | Tensor) and images.ndim == 3:
        return [images]
    return images


def images_below(folder: Path) -> list[Path]:
    """Return the images in a folder and its sub-folders, sorted. Raises DataError if none is."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS)
    if not found:
        raise DataError(f"{folder} holds no images ({', '.join(EXTENSIONS)})")
    return found


def path_of(image: AnyImage) -> Path | None:
    """Return the path of an image that was given as one."""
    return Path(image) if isinstance(image, str | PathLike) else None


def opened(image: AnyImage) -> Image.Image:
    """Return an image upright, as RGB. Raises DataError where it cannot be read."""
    if isinstance(image, Image.Image):
        try:
            return to_rgb(upright(image))
        except FAILURES as error:
            raise DataError(f"an image cannot be decoded: {error}") from error
    if isinstance(image, str | PathLike):
        try:
            return decode_pil(Path(image).read_bytes())
        except OSError as error:
            raise DataError(f"cannot read the image {image}: {error.strerror}") from error
        except BadImage as error:
            raise DataError(f"the image {image}: {error}") from error
    return from_array(image)


def from_array(image: np.ndarray | Tensor) -> Image.Image:
    """Return an array (H, W, 3) uint8 as an image. Raises DataError for other arrays."""
    array = image.cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise DataError(
            f"an array of shape {array.shape} and type {array.dtype} is no image: give (H, W, 3) "
            "uint8, red first"
        )
    return Image.fromarray(array)
