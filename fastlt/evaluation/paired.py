"""Differences of two kinds of runs, paired over seeds: how large, how sure."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from fastlt.evaluation.significance import holm

RESAMPLES = 10_000  # of the bootstrap, and of sign flips where there are more
LEVEL = 0.95


class Paired(NamedTuple):
    """The difference of two kinds of runs, over the seeds that both have."""

    mean: float
    low: float  # of the bootstrap interval
    high: float
    p: float  # two-sided, by flipping signs; the least that n seeds can give is 2 / 2^n
    t: float  # Student's, nan where all differences are equal
    seeds: int


def paired(values: Mapping[int, float], others: Mapping[int, float]) -> Paired | None:
    """Return the difference values - others by seed; None where they share fewer than two seeds."""
    shared = sorted(values.keys() & others.keys())
    if len(shared) < 2:
        return None
    differences = np.array([values[seed] - others[seed] for seed in shared])
    spread = differences.std(ddof=1)
    t = differences.mean() / (spread / np.sqrt(len(shared))) if spread > 0 else np.nan
    low, high = bootstrap(differences)
    return Paired(
        float(differences.mean()), low, high, sign_flips(differences), float(t), len(shared)
    )


def bootstrap(differences: np.ndarray) -> tuple[float, float]:
    """Return the percentile interval of the mean of differences (n,)."""
    rng = np.random.default_rng(0)
    drawn = rng.choice(differences, (RESAMPLES, len(differences)))
    low, high = np.quantile(drawn.mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def sign_flips(differences: np.ndarray) -> float:
    """Return the share of all ways to flip signs whose mean is as far from 0: a two-sided p.

    All ways are counted where they are few; else as many are drawn at random, with the one that was
    seen among them.
    """
    count = len(differences)
    if 2**count <= RESAMPLES:
        bits = np.arange(2**count)[:, None] >> np.arange(count) & 1
        signs = 1.0 - 2.0 * bits
    else:
        rng = np.random.default_rng(0)
        signs = rng.choice([-1.0, 1.0], (RESAMPLES, count))
        signs[0] = 1.0
    means = np.abs((signs * differences).mean(axis=1))
    return float((means >= abs(differences.mean()) - 1e-12).mean())


def corrected(found: Mapping[str, Paired | None]) -> dict[str, float]:
    """Return the p of each by Holm's correction over the family."""
    return holm({name: one.p for name, one in found.items() if one is not None})
