"""Images of more than eight bits a value, as microscopes, X-ray machines and scanners write them.

Models see eight bits. Which values become black and white is a `Range` of the whole data set:
cameras fill a part of their 16 bits, and scaled by the whole of them their images are black.
"""

import io
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

# what a value is -> the largest that it can hold
KINDS = {
    "16-bit": 65535.0,
    "signed 16-bit": 32767.0,
    "32-bit": 2.0**31 - 1,
    "floating-point": 1.0,
}
GREY = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
COLOURS = ("RGB", "RGBX", "RGBA", "LA", "CMYK")
# Pillow keeps the higher eight of 16 bits, and the lower ones where the order of bytes is swapped
OTHER_ORDER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
PHOTOMETRIC, WHITE_IS_ZERO = 262, 0  # a tag of TIFF


@dataclass(frozen=True)
class Range:
    """The value that becomes black, and the one that becomes white."""

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}"


Scale: TypeAlias = Mapping[str, Range]  # by kind of value; of others, the whole of the kind


def limits_of(scale: Scale) -> dict[str, list[float]]:
    """Return a scale as files keep it: by kind, black and white."""
    return {kind: [chosen.low, chosen.high] for kind, chosen in scale.items()}


def scale_of(limits: object) -> Scale:
    """Return what `limits_of` made; an empty one of what is none, as files of old have it."""
    if not isinstance(limits, dict):
        return {}
    return {
        kind: Range(float(pair[0]), float(pair[1]))
        for kind, pair in limits.items()
        if kind in KINDS and isinstance(pair, list) and len(pair) == 2
    }


@dataclass(frozen=True)
class Deep:
    """An image's values as they are in its file, not turned."""

    values: np.ndarray  # (H, W) or (H, W, 3) uint16, int32 or float32
    kind: str  # of KINDS
    opacity: np.ndarray | None = None  # (H, W) float32, 0 to 1
    inverted: bool = False  # black is the largest value

    @property
    def own_scale(self) -> Scale:
        """The range of this image alone, for looking at it."""
        finite = self.values[np.isfinite(self.values)]
        low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
        return {self.kind: Range(low, max(high, low + 1))}

    def eight_bits(self, scale: Scale | None = None) -> Image.Image:
        """The image as grey or RGB of Pillow, over white.

        Values outside the range become black or white, and what is no number black.
        """
        chosen = (scale or {}).get(self.kind, Range(0, KINDS[self.kind]))
        low, high = chosen.low, chosen.high
        exact = np.float64 if self.values.dtype == np.int32 else np.float32
        scaled = (self.values.astype(exact) - exact(low)) * exact(255 / (high - low))
        scaled = np.nan_to_num(scaled, nan=0.0, posinf=255.0, neginf=0.0).clip(0, 255)
        if self.inverted:
            scaled = 255 - scaled
        if self.opacity is not None:
            opacity = self.opacity.reshape(self.opacity.shape + (1,) * (scaled.ndim - 2))
            scaled = scaled * opacity + 255 * (1 - opacity)
        return Image.fromarray(np.rint(scaled).astype(np.uint8))


def is_deep(image: Image.Image) -> bool:
    """Return whether an image that was opened, and not loaded yet, has more than eight bits."""
    if image.format == "JPEG":
        return False
    return image.mode in GREY or bool(_wide_colours(image)) or _has_wide_samples(image)


def deep_values(image: Image.Image, data: bytes | memoryview | None = None) -> Deep:
    """Return the values of an image for which `is_deep` holds; data are its encoded bytes, where
    it has some.

    Raises what Pillow raises on damage.
    """
    if image.mode in GREY:
        return _grey(image)
    if _has_wide_samples(image):
        return _samples(image, data or b"")
    wide = _wide_colours(image)
    if wide.startswith("LA"):
        four = np.asarray(_decoded(data or b"", "RGBA"))  # two bytes of grey, two of opacity
        grey, opacity = np.moveaxis(four[..., 0::2].astype(np.uint16) << 8 | four[..., 1::2], 2, 0)
        return Deep(grey, "16-bit", opacity.astype(np.float32) / 65535)
    high, low = (
        np.asarray(_decoded(data or b"", mode), np.uint16)
        for mode in (wide, wide[:-1] + OTHER_ORDER[wide[-1]])
    )
    return _colours(image, high << 8 | low)


def _grey(image: Image.Image) -> Deep:
    rawmode = _rawmode(image)
    inverted = _tag(image, PHOTOMETRIC) == WHITE_IS_ZERO
    values = np.asarray(image)
    if values.dtype == np.int32:
        if image.format in ("PNG", "PPM"):
            return Deep(values.astype(np.uint16), "16-bit")
        kind = "32-bit" if "32" in rawmode else "16-bit"
        kind = "signed 16-bit" if kind == "16-bit" and rawmode.endswith("S") else kind
        return Deep(values, kind, inverted=inverted)
    if values.dtype.kind == "f":
        return Deep(values, "floating-point", inverted=inverted)
    opacity = None
    if isinstance(key := image.info.get("transparency"), int):
        opacity = (values != key).astype(np.float32)
    return Deep(values.astype(np.uint16), "16-bit", opacity, inverted)


def _colours(image: Image.Image, values: np.ndarray) -> Deep:
    """16 bits of (H, W, channels)."""
    if image.mode == "CMYK":
        black = 65535 - values[..., 3:].astype(np.float32)
        light = (65535 - values[..., :3].astype(np.float32)) * black / 65535
        return Deep(np.rint(light).astype(np.uint16), "16-bit")
    if values.shape[2] == 4:
        return Deep(values[..., :3], "16-bit", values[..., 3].astype(np.float32) / 65535)
    opacity = None
    if isinstance(key := image.info.get("transparency"), tuple):
        opacity = (values != np.array(key, np.uint16)).any(axis=2).astype(np.float32)
    return Deep(values, "16-bit", opacity)


def _samples(image: Image.Image, data: bytes | memoryview) -> Deep:
    """The values of a PPM of 16 bits, which Pillow scales down."""
    start = _tiles(image)[0].offset
    count = image.width * image.height * 3
    if len(data) - start < 2 * count:
        raise OSError("image file is truncated")
    values = np.frombuffer(data, ">u2", count, start).astype(np.uint16)
    return Deep(values.reshape(image.height, image.width, 3), "16-bit")


def _has_wide_samples(image: Image.Image) -> bool:
    return any(tile.codec_name == "ppm" and tile.args == ("RGB", 65535) for tile in _tiles(image))


def _wide_colours(image: Image.Image) -> str:
    """The raw mode of colours of 16 bits, of which Pillow keeps the higher eight; else empty."""
    mode, _, order = _rawmode(image).partition(";16")
    return f"{mode};16{order}" if order in OTHER_ORDER and mode in COLOURS else ""


def _rawmode(image: Image.Image) -> str:
    tiles = _tiles(image)
    args = tiles[0].args if tiles else ""
    found = args[0] if isinstance(args, tuple) and args else args
    return found if isinstance(found, str) else ""


def _decoded(data: bytes | memoryview, rawmode: str) -> Image.Image:
    """The image, each of its values unpacked as `rawmode` says."""
    image: Any = Image.open(io.BytesIO(data))
    image.tile = [
        tile._replace(args=(rawmode, *tile.args[1:]) if isinstance(tile.args, tuple) else rawmode)
        for tile in image.tile
    ]
    image.load()
    return image


def _tiles(image: Image.Image) -> list[Any]:
    """How Pillow is going to decode an image; empty of one that it has decoded, or that it made."""
    return getattr(image, "tile", None) or []


def _tag(image: Image.Image, number: int) -> object:
    tags = getattr(image, "tag_v2", None)
    return None if tags is None else tags.get(number)
