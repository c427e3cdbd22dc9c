"""Hashes of images: of their bytes, and of their looks.

The latter survive resizing and new compression.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from PIL import Image

from fastlt.decode.deep import deep_values, is_deep
from fastlt.decode.images import BadImage, open_image, orientation, to_rgb, turned, upright
from fastlt.packing.reader import Split

SIDE, KEPT = 32, 8  # pixels that are transformed, and frequencies a side that are kept: 64 bits
FLAT = 2.0  # grey levels of deviation below which an image looks like nothing in particular
BANDS = 6  # two hashes that differ in up to 5 bits agree in one of them (the pigeonhole)
BLOCK = 1 << 22  # pairs looked at together


Row = tuple[bytes, int, int, bool]  # exact, seen, mirrored, has_look


@dataclass(frozen=True)
class Hashes:
    """The hashes of n images."""

    exact: list[bytes]  # sha256
    seen: np.ndarray  # (n,) uint64
    mirrored: np.ndarray  # (n,) uint64, of the image flipped from left to right
    has_look: np.ndarray  # (n,) bool; not so for what is flat, or cannot be decoded

    def __len__(self) -> int:
        return len(self.exact)

    def take(self, images: np.ndarray) -> "Hashes":
        """Return the hashes of some of the images."""
        exact = [self.exact[image] for image in images.tolist()]
        return Hashes(exact, self.seen[images], self.mirrored[images], self.has_look[images])


def hashes_of(split: Split, images: Sequence[int]) -> Hashes:
    """Return the hashes of some images of a split."""
    return from_rows([hash_row(bytes(split.read(image))) for image in images])


def from_rows(rows: Sequence[Row]) -> Hashes:
    """Return the hashes of images from those of each."""
    exact, seen, mirrored, has_look = zip(*rows, strict=True) if rows else ((), (), (), ())
    return Hashes(
        list(exact),
        np.array(seen, np.uint64),
        np.array(mirrored, np.uint64),
        np.array(has_look, bool),
    )


def concatenated(parts: Sequence[Hashes]) -> Hashes:
    """Return the hashes of several parts, one after the other."""
    exact = [digest for part in parts for digest in part.exact]
    columns = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("seen", "mirrored", "has_look")
    )
    return Hashes(exact, *columns)


def hash_row(data: bytes) -> Row:
    """Return the hashes of the encoded bytes of an image."""
    digest = hashlib.sha256(data).digest()
    try:
        return look_row(digest, small_grey(data))
    except BadImage:
        return digest, 0, 0, False


def look_row(digest: bytes, grey: np.ndarray) -> Row:
    """Return the hashes of an image by its digest and its shades of grey (SIDE, SIDE)."""
    return digest, look(grey), look(grey[:, ::-1]), float(grey.std()) >= FLAT


def small_grey(data: bytes) -> np.ndarray:
    """Return an image as (SIDE, SIDE) float64 shades of grey. Raises BadImage."""
    image = open_image(data)
    image.draft("RGB", (4 * SIDE, 4 * SIDE))  # a JPEG is decoded at a fraction of its size
    try:
        if is_deep(image):  # of which many have the same few values of all that they could have
            found = deep_values(image, data)
            seen = turned(found.eight_bits(found.own_scale), orientation(image))
        else:
            seen = to_rgb(upright(image))
        grey = seen.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
    except (OSError, ValueError, SyntaxError) as error:
        raise BadImage(str(error)) from error
    return np.asarray(grey, np.float64)


def look(grey: np.ndarray) -> int:
    """Return 64 bits: which of the lowest frequencies of the cosine transform exceed their median.

    The constant one is left out.
    """
    low = (COSINES @ grey @ COSINES.T).ravel()
    bits = low > np.median(low[1:])
    bits[0] = False
    return int(np.packbits(bits).view(">u8")[0])


def _cosines() -> np.ndarray:
    frequency, place = np.arange(KEPT)[:, None], np.arange(SIDE)[None, :]
    return np.cos(np.pi * frequency * (2 * place + 1) / (2 * SIDE))


COSINES = _cosines()


def same_look(queries: Hashes, known: Hashes, distance: int) -> np.ndarray:
    """Return (P, 2) int64 pairs (query, known) that look the same.

    Their hashes, as they are or mirrored, differ in up to `distance` bits. Of the known ones with
    one and the same hash the first stands for all.
    """
    if distance < 0 or not len(queries) or not len(known):
        return np.zeros((0, 2), np.int64)
    usable, sought = np.flatnonzero(known.has_look), np.flatnonzero(queries.has_look)
    # thousands may have the look of an empty page
    looks, first = np.unique(known.seen[usable], return_index=True)
    found = []
    for bits in (queries.seen, queries.mirrored):
        own, which = np.unique(bits[sought], return_inverse=True)
        by_own, counts = np.argsort(which, kind="stable"), np.bincount(which, minlength=len(own))
        starts = np.cumsum(counts) - counts
        for rows, columns in _near(own, looks, distance):
            images = sought[by_own[_ranges(starts[rows], counts[rows])]]
            found.append(
                np.stack([images, np.repeat(usable[first[columns]], counts[rows])], axis=1)
            )
    return np.unique(np.concatenate(found), axis=0) if found else np.zeros((0, 2), np.int64)


def _near(
    queries: np.ndarray, known: np.ndarray, distance: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield indices of pairs that agree in a band, and whose whole hashes are near."""
    for shift, width in _bands():
        mask = np.uint64((1 << width) - 1)
        band = (known >> np.uint64(shift)) & mask
        order = np.argsort(band, kind="stable")
        sought = (queries >> np.uint64(shift)) & mask
        first = np.searchsorted(band[order], sought, "left")
        counts = np.searchsorted(band[order], sought, "right") - first
        for start, end in _blocks(counts):
            rows = np.repeat(np.arange(start, end), counts[start:end])
            columns = order[_ranges(first[start:end], counts[start:end])]
            near = np.bitwise_count(queries[rows] ^ known[columns]) <= distance
            yield rows[near], columns[near]


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return start, start + 1, ... of each range, one after the other."""
    ends = np.cumsum(counts)
    return np.arange(int(counts.sum())) + np.repeat(starts - (ends - counts), counts)


def _bands() -> list[tuple[int, int]]:
    """Return (shift, width in bits) of each band."""
    edges = np.linspace(0, KEPT * KEPT, BANDS + 1).round().astype(int).tolist()
    return [(start, end - start) for start, end in pairwise(edges)]


def _blocks(counts: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield ranges of queries with about BLOCK pairs each."""
    block = np.cumsum(counts) // BLOCK
    edges = [0, *(np.flatnonzero(np.diff(block)) + 1).tolist(), len(counts)]
    return ((start, end) for start, end in pairwise(edges) if end > start)
