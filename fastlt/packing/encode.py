"""What a pack stores of one image. Runs in the packing workers, so nothing here imports torch."""

import hashlib
import io
import stat
import sys
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from fastlt.decode.deep import Scale, is_deep
from fastlt.decode.formats import FORMATS, HEAD, kind_of
from fastlt.decode.images import (
    BadImage,
    decode,
    decode_pil,
    deep,
    frames,
    load,
    open_image,
    orientation,
    scaled,
    turned,
)
from fastlt.decode.region import transcode
from fastlt.packing.cifar import png_bytes
from fastlt.packing.collection import ImageRef
from fastlt.packing.parquet import row_bytes

DEFAULT_QUALITY = 95  # of JPEG, where images are shrunk and no quality is given


@dataclass(frozen=True)
class ImageSettings:
    """The options of a pack that change what is stored of an image."""

    max_side: int  # pixels; larger images are shrunk and stored as JPEG; 0: none
    quality: int  # of JPEG; without max_side all images are stored so; 0: as they are
    max_pixels: int
    # JPEG losslessly, so that the region decoder can enter it in its middle
    transcode: bool = False
    # of values of more than eight bits; one of a kind that it does not name is refused
    scale: Scale = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Stored:
    """The bytes that are stored of one image, and what the tables say of it."""

    data: bytes
    extension: str  # .jpg, .png or .webp
    height: int  # pixels, of the upright image
    width: int
    digest: bytes  # sha256 of the source bytes
    frames: int = 1  # pages or frames of the source, of which the first is stored


def store_batch(refs: list[ImageRef], settings: ImageSettings) -> list[Stored | str]:
    """For each image what is stored, or the reason why it cannot be used."""
    return [_store_or_reason(ref, settings) for ref in refs]


def _store_or_reason(ref: ImageRef, settings: ImageSettings) -> Stored | str:
    try:
        data = read_bytes(ref)
        stored, extension, height, width = encode(data, settings)
        if settings.transcode and extension == ".jpg":
            stored = transcoded(stored)
    except BadImage as reason:
        return str(reason)
    return Stored(stored, extension, height, width, hashlib.sha256(data).digest(), frames_of(data))


def read_bytes(ref: ImageRef) -> bytes:
    """The encoded image. Raises BadImage where it cannot be read."""
    if ref.column:
        return row_bytes(ref.path, ref.column, ref.offset)
    return png_bytes(ref.path, ref.part) if ref.part >= 0 else _read(ref, ref.size)


def head_bytes(ref: ImageRef) -> bytes:
    """The first bytes of an encoded image that is no part of a strip, enough to tell its kind.
    Raises BadImage.
    """
    return read_bytes(ref) if ref.column else _read(ref, HEAD)


def _read(ref: ImageRef, size: int) -> bytes:
    path = Path(ref.path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # opening a named pipe would wait for ever
            raise BadImage("not a regular file")
        with path.open("rb") as file:
            file.seek(ref.offset)
            return file.read(size)
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror}") from error


def encode(data: bytes, settings: ImageSettings) -> tuple[bytes, str, int, int]:
    """(bytes, extension, height, width) as stored.

    Every image is decoded, which is what finds truncation. Raises BadImage.

    JPEG stays as it is, and so do PNG and WebP that are plain 8-bit grey or RGB and upright; the
    rest becomes grey or RGB PNG, losslessly, but that values of more than eight bits are scaled by
    the range.
    """
    image = open_image(data, settings.max_pixels)
    longer = max(image.size)
    reencoded = longer > settings.max_side if settings.max_side else settings.quality > 0
    if not reencoded and (kept := _as_it_is(image, data)):
        return kept
    upright = _upright(image, data, settings)
    if reencoded:
        return _as_jpeg(upright.convert("RGB"), settings)
    return _saved(upright, "PNG"), ".png", upright.height, upright.width


def _upright(image: Image.Image, data: bytes, settings: ImageSettings) -> Image.Image:
    """What `open_image` made of data as 8-bit grey or RGB, upright."""
    if is_deep(image):
        return turned(scaled(deep(image, data), settings.scale), orientation(image))
    is_grey = image.mode in ("1", "L") and "transparency" not in image.info
    upright = decode_pil(data, settings.max_pixels)
    return upright.convert("L") if is_grey else upright


def _as_it_is(image: Image.Image, data: bytes) -> tuple[bytes, str, int, int] | None:
    """What `encode` returns of an image that is stored as it is; None for others."""
    width, height = image.size
    kind = FORMATS[str(image.format)]
    if kind == ".jpg":
        # At an eighth of the size the whole stream is still read, and truncation found, but the
        # inverse DCT is saved.
        image.draft(None, (max(1, width // 8), max(1, height // 8)))
    elif not _is_plain(image, data):
        return None
    load(image, data)
    if kind == ".jpg" and orientation(image) >= 5:  # a quarter turn
        width, height = height, width
    return data, kind, height, width


def frames_of(data: bytes) -> int:
    """Return the number of pages or frames of an image that can be decoded."""
    return 1 if kind_of(data) == "JPEG" else frames(open_image(data, sys.maxsize))


def transcoded(data: bytes) -> bytes:
    """The same JPEG with restart markers; as it was where it cannot be rewritten, or where not
    every pixel would be the same.
    """
    rewritten = transcode(data)
    return (
        rewritten
        if rewritten and (decode(rewritten, sys.maxsize) == decode(data, sys.maxsize)).all()
        else data
    )


def _is_plain(image: Image.Image, data: bytes) -> bool:
    """Every decoder makes the same of it."""
    # the bit depth in IHDR, which always comes first
    eight_bit = image.format != "PNG" or data[24] == 8
    still = not getattr(image, "is_animated", False)
    return (
        image.format in ("PNG", "WEBP")
        and image.mode in ("L", "RGB")
        and "transparency" not in image.info
        and eight_bit
        and still
        and orientation(image) == 1
    )


def _as_jpeg(image: Image.Image, settings: ImageSettings) -> tuple[bytes, str, int, int]:
    longer = max(image.size)
    if settings.max_side and longer > settings.max_side:
        width, height = (max(1, round(side * settings.max_side / longer)) for side in image.size)
        image = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return (
        _saved(image, "JPEG", quality=settings.quality or DEFAULT_QUALITY),
        ".jpg",
        image.height,
        image.width,
    )


def _saved(image: Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
