"""Decoding and cropping one image with Pillow: the reference that every engine is held to."""

import io
import struct
import warnings

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from fastlt.decode.region import DAMAGED, examine

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp")
FORMATS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}
MAX_PIXELS = 178_956_970  # Pillow's own limit; more is taken for a decompression bomb
# the limit is checked here, as an error with a reason instead of a warning
Image.MAX_IMAGE_PIXELS = None
SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")
# what Pillow raises on damaged bytes
FAILURES = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
)
# from each EXIF orientation to upright
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class BadImage(Exception):
    """An image that cannot be used; the message is the reason."""


def decode(data: bytes | memoryview, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Encoded bytes to the upright image, (height, width, 3) uint8 RGB. Raises BadImage."""
    return np.asarray(decode_pil(data, max_pixels))


def decode_pil(
    data: bytes | memoryview, max_pixels: int = MAX_PIXELS, is_sound: bool = False
) -> Image.Image:
    """Return an image as `decode` does, but as an RGB Pillow image.

    EXIF rotation applied, 16 bits scaled to 8, transparency laid over white.

    is_sound: known from before, which saves looking for damage that Pillow conceals.
    """
    image = open_image(data, max_pixels)
    load(image, data, is_sound)
    try:
        return to_rgb(upright(image))
    except FAILURES as error:
        raise BadImage(f"cannot be decoded: {error}") from error


def load(image: Image.Image, data: bytes | memoryview, is_sound: bool = False) -> None:
    """Decode the pixels of what `open_image` made of data. Raises BadImage."""
    try:
        image.load()
    except FAILURES as error:
        raise BadImage(f"cannot be decoded: {error}") from error
    if (
        image.format == "JPEG" and not is_sound and examine(data) == DAMAGED
    ):  # which Pillow decodes to something
        raise BadImage("cannot be decoded: its JPEG code is damaged")


def open_image(data: bytes | memoryview, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read the header only. Raises BadImage for what is empty, unknown or too large."""
    if len(data) == 0:
        raise BadImage("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged EXIF, which does not matter to the pixels
            image = Image.open(io.BytesIO(data), formats=tuple(FORMATS))
    except UnidentifiedImageError as error:
        raise BadImage("not a JPEG, PNG or WebP image") from error
    except FAILURES as error:
        raise BadImage(f"damaged header: {error}") from error
    if image.width * image.height > max_pixels:
        raise BadImage(
            f"{image.width} x {image.height} pixels are more than the limit of {max_pixels}"
        )
    return image


def orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 (upright) to 8; 1 where there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = image.getexif().get(ExifTags.Base.Orientation, 1)
    # Damaged metadata raise about anything and do not matter to the pixels, unlike in
    # ImageOps.exif_transpose.
    except Exception:
        return 1
    return found if found in TURNS else 1


def upright(image: Image.Image) -> Image.Image:
    """Return the image turned by its EXIF orientation."""
    turn = TURNS.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB as a person would see it."""
    if image.mode in SIXTEEN_BIT:  # Pillow's own conversion clips at 255 instead of scaling
        return Image.fromarray(
            (np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)
        ).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image.convert("RGB")


def fill_box(image: Image.Image, box: np.ndarray, flip: bool, size: int) -> np.ndarray:
    """The part `box` (top, left, height, width) of an upright RGB image as (size, size, 3) uint8;
    black beyond the edge.

    Shrinking averages over areas, enlarging is bilinear: what FFCV's INTER_AREA does.
    """
    top, left, height, width = (int(x) for x in box)
    if top < 0 or left < 0 or top + height > image.height or left + width > image.width:
        image = image.crop((left, top, left + width, top + height))
        top = left = 0
    if (height, width) == (size, size):
        part = image.crop((left, top, left + width, top + height))
    else:
        resample = Image.Resampling.BOX if min(height, width) >= size else Image.Resampling.BILINEAR
        part = image.resize((size, size), resample, box=(left, top, left + width, top + height))
    pixels = np.asarray(part)
    return pixels[:, ::-1] if flip else pixels
