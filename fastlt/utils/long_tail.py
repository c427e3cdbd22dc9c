"""The class counts of the long tails that are cut out of balanced data."""


def long_tail(largest: int, imbalance: float, classes: int, least: int = 0) -> list[int]:
    """Return the images of each class, the largest class first.

    n_i = int(largest * mu ** (i / (classes - 1))) with mu = 1 / imbalance, as in LDAM-DRW (Cao et
    al. 2019, arXiv 1906.07413), and `least` where that is less.
    """
    last = max(1, classes - 1)
    return [max(least, int(largest * (1 / imbalance) ** (i / last))) for i in range(classes)]
