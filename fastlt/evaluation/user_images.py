"""Images of the user's own, wherever they come from: files, folders, arrays, Pillow images."""

from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import Image
from torch import Tensor

from fastlt.decode.deep import Scale
from fastlt.decode.formats import is_image_file
from fastlt.decode.images import FAILURES, BadImage, decode_pil, to_rgb, upright
from fastlt.errors import DataError

# A path, an image of Pillow, or an array (H, W, 3) uint8.
AnyImage: TypeAlias = str | PathLike[str] | Image.Image | np.ndarray | Tensor


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
    found = sorted(path for path in folder.rglob("*") if is_image_file(path))
    if not found:
        raise DataError(f"{folder} holds no images")
    return found


def path_of(image: AnyImage) -> Path | None:
    """Return the path of an image that was given as one."""
    return Path(image) if isinstance(image, str | PathLike) else None


def opened(image: AnyImage, scale: Scale) -> Image.Image:
    """Return an image upright, as RGB.

    scale: of images of more than eight bits, by kind. Raises DataError where the image cannot be
    read, or is of a kind that has none.
    """
    if isinstance(image, Image.Image):
        try:
            return to_rgb(upright(image), scale)
        except (BadImage, *FAILURES) as error:
            raise DataError(f"an image cannot be decoded: {error}") from error
    if isinstance(image, str | PathLike):
        try:
            return decode_pil(Path(image).read_bytes(), scale=scale)
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
