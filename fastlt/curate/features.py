"""What is done with features: prototypes of classes, and pairs of images that are nearly the same.

The matrices of similarities are never held as a whole: they are made block by block, on the device
that makes the features.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

ROWS, COLUMNS = 2048, 32768  # of similarities at a time: 256 MB
ROUNDS = 5  # of the robust mean
CORE = 0.5  # share of a class that is trusted


def robust_mean(features: np.ndarray) -> np.ndarray:
    """Return the mean (D,) of length 1 of those (n, D) that are nearest to it, half of them.

    It is found in a few rounds from the mean of all. What does not belong, up to nearly half of a
    class, does not move it far.
    """
    vectors = features.astype(np.float32)
    centre = unit(vectors.mean(axis=0))
    kept = max(1, round(CORE * len(vectors)))
    for _ in range(ROUNDS):
        nearest = np.argsort(-(vectors @ centre), kind="stable")[:kept]
        centre = unit(vectors[nearest].mean(axis=0))
    return centre


def unit(vector: np.ndarray) -> np.ndarray:
    """Return a vector at length 1; zeros stay zeros."""
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


def nearest(
    queries: np.ndarray, known: np.ndarray, threshold: float, device: torch.device
) -> Iterator[tuple[int, int]]:
    """Yield (query, known) for each query that has a known one at least as near as the threshold.

    Of several it is the nearest, by cosine.
    """
    for start in range(0, len(queries), ROWS):
        found = _nearest_of(
            on(queries[start : start + ROWS], device),
            known,
            np.arange(len(known)),
            threshold,
            device,
        )
        for row in np.flatnonzero(found >= 0).tolist():
            yield start + row, int(found[row])


def later_copies(
    features: np.ndarray, threshold: float, device: torch.device
) -> Iterator[tuple[int, int]]:
    """Yield (image, earlier) for each image that has an earlier one as near as the threshold.

    An image that is such a copy itself does not count as earlier. In memory there are never more
    than a block's similarities, however many are alike.
    """
    is_copy = np.zeros(len(features), bool)
    for start in range(0, len(features), ROWS):
        rows = on(features[start : start + ROWS], device)
        found = _nearest_of(rows, features, np.flatnonzero(~is_copy[:start]), threshold, device)
        among = (rows @ rows.T >= threshold).cpu().numpy()
        for row in np.flatnonzero(found < 0).tolist():
            earlier = np.flatnonzero(among[row, :row] & (found[:row] < 0))
            found[row] = start + earlier[0] if len(earlier) else -1
        is_copy[start : start + len(rows)] = found >= 0
        for row in np.flatnonzero(found >= 0).tolist():
            yield start + row, int(found[row])


def _nearest_of(
    rows: Tensor, known: np.ndarray, usable: np.ndarray, threshold: float, device: torch.device
) -> np.ndarray:
    """Return the nearest usable known one to each row, (n,) int64.

    It is -1 where none reaches the threshold.
    """
    best = torch.full((len(rows),), threshold, device=device)
    found = torch.full((len(rows),), -1, dtype=torch.int64, device=device)
    for begin in range(0, len(usable), COLUMNS):
        block = usable[begin : begin + COLUMNS]
        cosine, place = (rows @ on(known[block], device).T).max(dim=1)
        better = (cosine > best) | ((cosine == best) & (found < 0))
        best = torch.where(better, cosine, best)
        found = torch.where(better, torch.from_numpy(block).to(device)[place], found)
    return found.cpu().numpy()


def on(features: np.ndarray, device: torch.device) -> Tensor:
    """Return features as a float32 tensor on the device."""
    return torch.from_numpy(np.ascontiguousarray(features)).to(device).float()
