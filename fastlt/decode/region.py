"""Decoding of a JPEG only what a crop needs, and transcoding that makes it cheap: the way to the C
in jpeg/.

Free of torch, as packing workers import it. The libraries are compiled when fastlt is installed,
where there is a C compiler; for transcoding it needs libjpeg's headers, too.
"""

import ctypes
from functools import cache
from importlib.util import find_spec

import numpy as np

from fastlt.errors import UserError

ARRAY = ctypes.c_void_p
SOUND, UNSURE, DAMAGED = 0, 1, 2  # as region.c numbers what becomes of an image


@cache
def _library() -> ctypes.CDLL | None:
    """The decoder, for the best that this machine can run."""
    plain, wide = _decoder("fastlt.decode._region"), _decoder("fastlt.decode._region_avx2")
    return (
        wide if plain is not None and wide is not None and plain.fastlt_jpeg_has_avx2() else plain
    )


def _decoder(name: str) -> ctypes.CDLL | None:
    library = _load(name)
    if library is not None:
        library.fastlt_jpeg_boxes.argtypes = [ARRAY] * 6 + [
            ctypes.c_int64,
            ctypes.c_int32,
            ARRAY,
            ARRAY,
        ]
        library.fastlt_jpeg_boxes.restype = None
        library.fastlt_jpeg_check.argtypes = [ARRAY, ctypes.c_int64]
    return library


@cache
def _transcoder() -> ctypes.CDLL | None:
    library = _load("fastlt.decode._transcode")
    if library is not None:
        library.fastlt_jpeg_transcode.argtypes = [ARRAY, ctypes.c_int64, ARRAY, ARRAY]
        library.fastlt_jpeg_free.argtypes = [ctypes.c_void_p]
        library.fastlt_jpeg_free.restype = None
    return library


def _load(name: str) -> ctypes.CDLL | None:
    found = find_spec(name)
    if found is None or found.origin is None:
        return None
    try:
        return ctypes.CDLL(found.origin)
    except OSError:  # compiled, but the machine has lost its libjpeg
        return None


def has_region() -> bool:
    """Return whether the decoder of regions was compiled."""
    return _library() is not None


def has_transcoder() -> bool:
    """Return whether transcoding was compiled."""
    return _transcoder() is not None


def region_obstacle(option: str) -> str | None:
    """Return why `option` cannot be used without the decoder; None where it was compiled."""
    if has_region():
        return None
    return (
        f"{option} needs fastlt's JPEG decoder, which was not compiled when fastlt was installed: "
        "`make setup` does it, or install a C compiler and then fastlt again"
    )


def check_transcoder(option: str) -> None:
    """Raise UserError where transcoding was not compiled; `option` is what needs it."""
    if not has_transcoder():
        raise UserError(
            f"{option} needs libjpeg, whose headers were missing when fastlt was installed: `make "
            "setup` does it, "
            "or install a C compiler and libjpeg's headers (libjpeg-turbo) and then fastlt again"
        )


def decode_boxes(
    # (n,) uint64, of the first byte of each image; the caller keeps the memory alive
    addresses: np.ndarray,
    sizes: np.ndarray,  # (n,) int, bytes
    heights: np.ndarray,  # (n,) int, pixels of the upright image, as the index has them
    widths: np.ndarray,
    # (n, 4) int: top, left, height, width; may reach over the edge, which is filled with black
    boxes: np.ndarray,
    flips: np.ndarray,  # (n,) bool
    out: np.ndarray,  # (n, size, size, 3) uint8, contiguous, written
) -> np.ndarray:
    """(n,) bool: whether an image was decoded; one that was not is damaged or no JPEG of the usual
    kind.

    As images.fill_box, but that nothing is rounded but the result. Of progressive, CMYK and other
    unusual JPEGs decoding by parts gains nothing. The GIL is released meanwhile.
    """
    library = _library()
    assert library is not None
    if not (
        out.flags.c_contiguous
        and out.dtype == np.uint8
        and out.shape == (len(sizes), out.shape[1], out.shape[1], 3)
    ):
        raise ValueError("out must be a contiguous (n, size, size, 3) uint8 array")
    kinds = (np.uint64, np.int64, np.int32, np.int32, np.int32, np.uint8)
    given = (addresses, sizes, heights, widths, boxes, flips)
    columns = [
        np.ascontiguousarray(values, kind) for values, kind in zip(given, kinds, strict=True)
    ]
    failed = np.empty(len(sizes), np.uint8)
    library.fastlt_jpeg_boxes(
        *(c.ctypes.data for c in columns),
        len(sizes),
        out.shape[1],
        out.ctypes.data,
        failed.ctypes.data,
    )
    return failed == 0


def examine(data: bytes | memoryview) -> int:
    """Return whether the code of a whole JPEG is sound.

    SOUND; DAMAGED, broken or ending before the pixels do, where decoders that conceal it make
    something up; or UNSURE, without the compiled decoder, and of what is progressive, unusual or no
    JPEG.
    """
    library, code = _library(), np.frombuffer(data, np.uint8)
    return UNSURE if library is None else library.fastlt_jpeg_check(code.ctypes.data, code.size)


def transcode(data: bytes) -> bytes | None:
    """The same JPEG, pixel for pixel, as baseline with optimised Huffman tables and a restart
    marker every few blocks.

    None where it is damaged, or none that libjpeg can rewrite. Metadata is kept.
    """
    library = _transcoder()
    assert library is not None
    written, size = ctypes.c_void_p(), ctypes.c_int64()
    if library.fastlt_jpeg_transcode(data, len(data), ctypes.byref(written), ctypes.byref(size)):
        return None
    try:
        return ctypes.string_at(written, size.value)
    finally:
        library.fastlt_jpeg_free(written)
