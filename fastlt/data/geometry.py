"""Which part of an image fills the output, and whether it is mirrored: a pure function of (seed,
epoch, place in the epoch).

Every engine gets the same boxes, so the same picture comes out whichever engine made it.
"""

from dataclasses import dataclass

import numpy as np

from fastlt.config import DataConfig

ATTEMPTS = 10  # as torchvision and FFCV: then the largest centred box of an allowed shape


@dataclass(frozen=True)
class Geometry:
    """From a stored image to a square of `size` pixels.

    kind: `random-resized-crop` (area share from `scale`, aspect ratio from `ratio`), `pad-crop`
    (the whole image, shifted by up to `padding` output pixels, black outside: the CIFAR crop),
    `centre-crop` (shorter side to `resize`, centre `size`) or `view` (one of `views` that were cut
    before, whose number stands in place of the top).
    """

    kind: str
    size: int
    flip: bool = False
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    padding: int = 4
    resize: int = 0
    views: int = 1


def geometry_of(data: DataConfig, size: int | None = None) -> Geometry:
    """Return how training images are cut, of `size` pixels a side: by default the configured."""
    return Geometry(
        data.crop,
        size or data.size,
        data.flip,
        data.scale,
        data.ratio,
        data.padding,
        data.eval_resize,
    )


def boxes_of(
    geometry: Geometry,
    heights: np.ndarray,
    widths: np.ndarray,
    places: np.ndarray,
    seed: int,
    epoch: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return boxes (n, 4) int32 (top, left, height, width) and flips (n,) bool.

    heights, widths and places are (n,) int.
    """
    heights, widths = heights.astype(np.int64), widths.astype(np.int64)
    uniforms = place_uniforms(places, seed, epoch, 4 * ATTEMPTS + 1)
    flips = (uniforms[:, -1] < 0.5) & geometry.flip
    draw = {
        "random-resized-crop": _random_resized,
        "pad-crop": _shifted,
        "centre-crop": _centre,
        "view": _view,
    }[geometry.kind]
    return draw(geometry, heights, widths, uniforms).astype(np.int32), flips


def place_uniforms(places: np.ndarray, seed: int, epoch: int, count: int) -> np.ndarray:
    """(n, count) float64 in [0, 1), each a hash of (seed, epoch, place, column): splitmix64, so no
    state and any order.
    """
    with np.errstate(over="ignore"):
        key = _mix(_mix(np.uint64(seed) + np.uint64(0x9E3779B97F4A7C15)) ^ np.uint64(epoch))
        rows = _mix(key ^ places.astype(np.uint64)[:, None])
        columns = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return (_mix(rows + columns) >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray | np.uint64) -> np.ndarray:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    x = np.asarray(x, dtype=np.uint64)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _random_resized(
    geometry: Geometry, heights: np.ndarray, widths: np.ndarray, uniforms: np.ndarray
) -> np.ndarray:
    """All attempts at once; the first that fits inside the image is taken (Inception crop, as in
    torchvision).
    """
    u = uniforms[:, :-1].reshape(len(heights), ATTEMPTS, 4)
    area = (heights * widths)[:, None] * (
        geometry.scale[0] + u[..., 0] * (geometry.scale[1] - geometry.scale[0])
    )
    low, high = np.log(geometry.ratio)
    aspect = np.exp(low + u[..., 1] * (high - low))
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (w > 0) & (h > 0) & (w <= widths[:, None]) & (h <= heights[:, None])
    first = (np.arange(len(heights)), fits.argmax(axis=1))
    top = np.floor(u[..., 2][first] * (heights - h[first] + 1))
    left = np.floor(u[..., 3][first] * (widths - w[first] + 1))
    drawn = np.stack([top, left, h[first], w[first]], axis=1)
    return np.where(
        fits.any(axis=1)[:, None], drawn, _largest_centred(geometry.ratio, heights, widths)
    )


def _largest_centred(
    ratio: tuple[float, float], heights: np.ndarray, widths: np.ndarray
) -> np.ndarray:
    w = np.minimum(widths, np.maximum(1, np.rint(heights * ratio[1])))
    h = np.minimum(heights, np.maximum(1, np.rint(widths / ratio[0])))
    return np.stack([(heights - h) // 2, (widths - w) // 2, h, w], axis=1)


def _shifted(
    geometry: Geometry, heights: np.ndarray, widths: np.ndarray, uniforms: np.ndarray
) -> np.ndarray:
    steps = np.floor(uniforms[:, :2] * (2 * geometry.padding + 1)) - geometry.padding
    top = np.rint(steps[:, 0] * heights / geometry.size)
    left = np.rint(steps[:, 1] * widths / geometry.size)
    return np.stack([top, left, heights, widths], axis=1)


def _centre(
    geometry: Geometry, heights: np.ndarray, widths: np.ndarray, uniforms: np.ndarray
) -> np.ndarray:
    short = np.minimum(heights, widths)
    side = np.maximum(1, np.rint(short * geometry.size / max(geometry.resize, geometry.size)))
    return np.stack([(heights - side) // 2, (widths - side) // 2, side, side], axis=1)


def _view(
    geometry: Geometry, heights: np.ndarray, widths: np.ndarray, uniforms: np.ndarray
) -> np.ndarray:
    views = np.floor(uniforms[:, 0] * geometry.views)
    return np.stack([views, np.zeros_like(views), heights, widths], axis=1)
