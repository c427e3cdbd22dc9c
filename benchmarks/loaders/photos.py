"""Generated JPEGs, as large as the photos of ImageNet, and about as busy.

Free of torch, for worker processes import it.
"""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image

from fastlt.packing.collection import ImageRef
from fastlt.utils.pool import cores, ordered_map

LONG_SIDE, SHORT_SIDE = 500, (330, 500)  # pixels
QUALITY = 90  # with subsampled colours: 60 to 110 KB a file
NOISE_SIDE = 1024
LEAVES = 10
WORTH_A_PROCESS = 400  # images; fewer are done before it has started
PIECE = 50  # images that a worker takes at once


def write_photos(folder: Path, count: int) -> list[ImageRef]:
    """Write photos; they are the same files for the same count."""
    pieces = [range(start, min(start + PIECE, count)) for start in range(0, count, PIECE)]
    with ordered_map(min(cores(), 1 + count // WORTH_A_PROCESS)) as apply:
        return [ref for refs in apply(partial(_write_piece, folder), pieces) for ref in refs]


def _write_piece(folder: Path, numbers: range) -> list[ImageRef]:
    refs = []
    for number in numbers:
        path = folder / f"{number:06}.jpg"
        Image.fromarray(draw_photo(number)).save(path, quality=QUALITY, subsampling="4:2:0")
        refs.append(ImageRef(path.stem, 0, str(path)))
    return refs


def draw_photo(number: int) -> np.ndarray:
    """Return (height, width, 3) uint8: overlapping leaves with colours and texture.

    The amplitude of the texture falls with its frequency.
    """
    rng = np.random.default_rng([0, number])
    height, width = int(rng.integers(*SHORT_SIDE)), LONG_SIDE
    if rng.random() < 0.3:
        height, width = width, height
    rows, columns = (np.arange(side) + rng.integers(0, NOISE_SIDE) for side in (height, width))
    texture = _noise()[rows[:, None] % NOISE_SIDE, columns[None] % NOISE_SIDE]
    image = np.empty((height, width, 3), np.float32)
    for leaf in range(LEAVES):
        inside = _ellipse(height, width, rng) if leaf else np.ones((height, width), bool)
        colour, contrast = rng.uniform(50, 200, 3), rng.uniform(10, 34)
        image[inside] = colour.astype(np.float32) + np.float32(contrast) * texture[inside]
    return image.clip(0, 255).astype(np.uint8)


def _ellipse(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    y, x = (
        np.arange(height)[:, None] - rng.uniform(0, height),
        np.arange(width)[None] - rng.uniform(0, width),
    )
    angle, long, short = rng.uniform(0, np.pi), rng.uniform(40, 200), rng.uniform(20, 120)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    return (along / long) ** 2 + (across / short) ** 2 < 1


@cache
def _noise() -> np.ndarray:
    """(side, side, 3) float32, periodic: as in photos the amplitude is one over the frequency, and
    the channels nearly agree.
    """
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(NOISE_SIDE)[:, None], np.fft.rfftfreq(NOISE_SIDE)[None])
    frequency[0, 0] = np.inf
    phases = rng.standard_normal((4, 2, *frequency.shape))
    fields = np.fft.irfft2(
        (phases[:, 0] + 1j * phases[:, 1]) / frequency, s=(NOISE_SIDE, NOISE_SIDE)
    )
    fields /= fields.std(axis=(1, 2), keepdims=True)
    return np.stack([fields[0] + 0.2 * fields[channel] for channel in (1, 2, 3)], axis=-1).astype(
        np.float32
    )
