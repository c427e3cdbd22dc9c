"""Decoding and cropping one image with Pillow: the reference that every engine is held to."""

import io
import struct
import warnings

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from fastlt.decode.deep import GREY, Deep, Scale, deep_values, is_deep
from fastlt.decode.formats import FORMATS, PLUGINS, kind_of, register
from fastlt.decode.region import DAMAGED, examine

MAX_PIXELS = 178_956_970  # Pillow's own limit; more is taken for a decompression bomb
# the limit is checked here, as an error with a reason instead of a warning
Image.MAX_IMAGE_PIXELS = None
# what Pillow raises on damaged bytes
FAILURES = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
)
READ = tuple(kind for kind in FORMATS if kind != "MPO" and kind not in PLUGINS)
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
    data: bytes | memoryview,
    max_pixels: int = MAX_PIXELS,
    is_sound: bool = False,
    scale: Scale | None = None,
) -> Image.Image:
    """Return an image as `decode` does, but as an RGB Pillow image.

    EXIF rotation applied, transparency laid over white, and of several pages or frames the first.

    is_sound: known from before, which saves looking for damage that Pillow conceals.
    scale: of values of more than eight bits, by kind, None for all that a kind can hold; BadImage
    where it does not name theirs.
    """
    image = open_image(data, max_pixels)
    if is_deep(image):
        return turned(scaled(deep(image, data), scale), orientation(image)).convert("RGB")
    load(image, data, is_sound)
    try:
        return to_rgb(upright(image))
    except FAILURES as error:
        raise BadImage(f"cannot be decoded: {error}") from error


def scaled(found: Deep, scale: Scale | None) -> Image.Image:
    """Return values as grey or RGB of eight bits. Raises BadImage where their kind has no range."""
    if scale is not None and found.kind not in scale:
        raise BadImage(
            f"its values are {found.kind}, and which become black and white is not known: give "
            "--range"
        )
    return found.eight_bits(scale)


def deep(image: Image.Image, data: bytes | memoryview) -> Deep:
    """Return the values of what `open_image` made of data, of more than eight bits each. Raises
    BadImage.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # as in `open_image`
            return deep_values(image, data)
    except FAILURES as error:
        raise BadImage(f"cannot be decoded: {error}") from error


def load(image: Image.Image, data: bytes | memoryview, is_sound: bool = False) -> None:
    """Decode the pixels of what `open_image` made of data. Raises BadImage."""
    try:
        image.load()
    except FAILURES as error:
        raise BadImage(f"cannot be decoded: {error}") from error
    if (
        image.format in ("JPEG", "MPO") and not is_sound and examine(data) == DAMAGED
    ):  # which Pillow decodes to something
        raise BadImage("cannot be decoded: its JPEG code is damaged")


def open_image(data: bytes | memoryview, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Read the header only. Raises BadImage for what is empty, unknown or too large."""
    if len(data) == 0:
        raise BadImage("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged EXIF, which does not matter to the pixels
            image = _opened(data)
    except UnidentifiedImageError as error:
        raise BadImage(_unknown(data)) from error
    except FAILURES as error:
        raise BadImage(f"damaged header: {error}") from error
    if image.width * image.height > max_pixels:
        raise BadImage(
            f"{image.width} x {image.height} pixels are more than the limit of {max_pixels}"
        )
    return image


def _opened(data: bytes | memoryview) -> Image.Image:
    kind = kind_of(data)
    if kind in PLUGINS and kind not in Image.OPEN and (missing := register(kind)):
        raise BadImage(missing)
    return Image.open(io.BytesIO(data), formats=READ if kind not in PLUGINS else (kind,))


def _unknown(data: bytes | memoryview) -> str:
    kind = kind_of(data)
    if kind is None:
        return "not an image (JPEG, PNG, WebP, GIF, AVIF, BMP, TIFF or PPM)"
    if kind == "TIFF":
        return (
            "a TIFF of a kind that cannot be read: save it as grey or RGB of 8 or 16 bits, or as "
            "grey of floating point"
        )
    return f"it begins like {kind}, but its header is damaged"


def frames(image: Image.Image) -> int:
    """Return how many pages or frames an image has, of which the first is taken."""
    try:
        return int(getattr(image, "n_frames", 1))
    except FAILURES:  # damage behind the first one
        return 1


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
    return turned(image, orientation(image))


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """Return an image turned from an EXIF orientation, 1 to 8, to upright."""
    turn = TURNS.get(orientation)
    return image if turn is None else image.transpose(turn)


def to_rgb(image: Image.Image, scale: Scale | None = None) -> Image.Image:
    """Any mode to RGB as a person would see it; `scale` as in `decode_pil`."""
    if image.mode in GREY:  # Pillow's own conversion clips at 255 instead of scaling
        return scaled(deep_values(image), scale).convert("RGB")
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
