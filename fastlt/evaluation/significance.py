"""Whether differences are more than chance."""

from collections.abc import Hashable, Mapping
from typing import TypeVar

import numpy as np
from scipy import stats

Key = TypeVar("Key", bound=Hashable)


def t_test(differences: np.ndarray) -> float | None:
    """Return the two-sided p of a mean other than 0; None for too few values, or equal ones."""
    if len(differences) < 2 or np.ptp(differences) == 0:
        return None
    return float(stats.ttest_1samp(differences, 0.0).pvalue)


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """Return Holm's correction: the k-th smallest of n times n - k + 1, ascending, at most 1."""
    corrected, highest = {}, 0.0
    for rank, (level, p) in enumerate(sorted(p_values.items(), key=lambda entry: entry[1])):
        highest = max(highest, min(1.0, p * (len(p_values) - rank)))
        corrected[level] = highest
    return corrected
