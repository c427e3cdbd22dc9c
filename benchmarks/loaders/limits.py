"""The limit of loaders that decode whole images: libjpeg-turbo alone, on all cores."""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from threading import local

import numpy as np

from fastlt.data.engines.ffcv.native import import_ffcv
from fastlt.decode.images import open_image
from fastlt.errors import UserError
from fastlt.packing.reader import Split
from fastlt.utils.pool import cores
from fastlt_benchmarks.loss.contenders import Unavailable

FAST_DCT = 2048  # TJFLAG_FASTDCT
RGB = 0  # TJPF_RGB
# of libjpeg's own scaling, in which less is computed the smaller the image comes out
DIVISORS = (
    1,
    2,
    4,
    8,
)
PIECE = 16  # images that a thread takes at once


@cache
def turbojpeg() -> ctypes.CDLL | None:
    """Return libjpeg-turbo's shared library: the system's, or that of FFCV; None without."""
    for name in (ctypes.util.find_library("turbojpeg"), ffcv_library()):
        try:
            library = ctypes.CDLL(name) if name else None
            if library is None:
                continue
            library.tjInitDecompress.restype = ctypes.c_void_p
            library.tjDestroy.argtypes = [ctypes.c_void_p]
            pointer, number = ctypes.c_void_p, ctypes.c_int
            library.tjDecompress2.argtypes = [
                pointer,
                pointer,
                ctypes.c_ulong,
                pointer,
                *[number] * 5,
            ]
        except (OSError, AttributeError):
            continue
        return library
    return None


def ffcv_library() -> str | None:
    """Return the library that FFCV was built with, None without."""
    try:
        import_ffcv()
    except UserError:
        return None
    import ffcv

    return ffcv._libffcv.__file__


class Decoder:
    """A handle and a buffer for as long as a thread lives."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.library, self.handle = library, library.tjInitDecompress()
        self.pixels = np.empty(0, np.uint8)

    def decode(self, data: bytes | memoryview, width: int, height: int) -> bool:
        """Decode a JPEG, scaled to width x height; return False where it is damaged.

        The GIL is released meanwhile.
        """
        if self.pixels.size < 3 * width * height:
            self.pixels = np.empty(3 * width * height, np.uint8)
        source, target = np.frombuffer(data, np.uint8).ctypes.data, self.pixels.ctypes.data
        return (
            self.library.tjDecompress2(
                self.handle, source, len(data), target, width, 0, height, RGB, FAST_DCT
            )
            == 0
        )

    def __del__(self) -> None:
        self.library.tjDestroy(self.handle)


def decodes(data: bytes, width: int, height: int) -> bool:
    """Return whether libjpeg-turbo decodes a JPEG without complaint; True without the library."""
    library = turbojpeg()
    if library is None:
        return True
    return Decoder(library).decode(data, width, height)


class DecodingAlone:
    """Epochs of decoding alone.

    With `size`, scaled to the least of 1/1, 1/2, 1/4 and 1/8 whose shorter side is not below it.
    """

    def __init__(self, split: Split, size: int | None) -> None:
        library = turbojpeg()
        if library is None:
            raise Unavailable("libjpeg-turbo's library (libturbojpeg) is not installed")
        self.library = library
        data = [split.read(image) for image in range(len(split))]
        # as stored, not upright
        sides = scaled(np.array([open_image(view).size for view in data]), size)
        self.jobs = list(zip(data, *sides.T.tolist(), strict=True))
        self.mine = local()
        self.pool = ThreadPoolExecutor(cores(), "decoding-alone")

    def epoch(self, number: int) -> Iterator[int]:
        """Decode all images; yield how many are done."""
        pieces = [self.jobs[start : start + PIECE] for start in range(0, len(self.jobs), PIECE)]
        yield from self.pool.map(self._decode, pieces)

    def _decode(self, jobs: list[tuple[memoryview, int, int]]) -> int:
        if not hasattr(self.mine, "decoder"):
            self.mine.decoder = Decoder(self.library)
        return sum(self.mine.decoder.decode(*job) for job in jobs)

    def close(self) -> None:
        """End the threads."""
        self.pool.shutdown(cancel_futures=True)


def scaled(sides: np.ndarray, size: int | None) -> np.ndarray:
    """Return sides (n, 2) int after libjpeg's scaling, which rounds up."""
    if size is None:
        return sides
    result = sides.copy()
    for divisor in DIVISORS:
        smaller = -(-sides // divisor)
        fits = smaller.min(axis=1) >= size
        result[fits] = smaller[fits]
    return result
