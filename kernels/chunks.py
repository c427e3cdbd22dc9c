"""How the linear loss is cut so that its temporaries fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

# Fewer rows starve the matrix products, and on a GPU each chunk reads and writes the whole fp32 weight gradient once
# more, which costs about 240 / rows of the time of the products; making the logits a second time costs a third.
GPU_ROWS = 1024
# Measured on AVX-512 at C = 10k and 100k: 64 rows starve the matrix products (1.1 times the time in fp32, 2 in bf16),
# and more than 512 leave the caches and gain nothing in fp32. In bf16 every chunk adds a rounded weight gradient.
CPU_ROWS = 512
CPU_LEAST_ROWS = 32
LEAST_CLASSES = 1024  # of a tile, whatever chunk_bytes says


class Chunking(NamedTuple):
    """How the work is cut."""

    rows: int  # of features at a time
    classes: int  # of logits at a time; fewer than all: the logits are made twice
    products: int  # of weight at a time where a product needs a temporary
    cast_weight_once: bool  # a whole copy of weight in the dtype of the products fits


def plan_chunks(
    rows: int,
    width: int,
    classes: int,
    *,
    slots: int,
    weight_dtype: torch.dtype,
    product: torch.dtype,
    total: torch.dtype,
    on_cpu: bool,
    chunk_bytes: int,
    gradients: bool = True,
) -> Chunking:
    """slots: silenced columns per row, padded; product and total: dtypes of the matrix products and of the sums."""
    lowered = product != total
    copy_bytes = classes * width * product.itemsize if weight_dtype != product else 0
    cast_once = 0 < copy_bytes <= chunk_bytes // 4
    per_class = width * product.itemsize if copy_bytes > 0 and not cast_once else 0
    per_class += width * (product.itemsize + total.itemsize) if lowered else 0  # a product, widened to be added
    products = min(classes, max(1, chunk_bytes // 4 // per_class)) if per_class else classes
    left = chunk_bytes - products * per_class - (copy_bytes if cast_once else 0)
    per_logit = product.itemsize + (total.itemsize / 8 if on_cpu else 0)  # and the rows in work
    per_row = width * 2 * (product.itemsize + total.itemsize)  # features and, as above, their gradient
    per_row += slots * 13 * total.itemsize  # indices, masks and values of the silenced columns, as measured
    wanted = min(rows, CPU_ROWS if on_cpu and not lowered else 4 * GPU_ROWS)
    fitting = int(left // (classes * per_logit + per_row))
    if fitting >= min(wanted, CPU_LEAST_ROWS if on_cpu else GPU_ROWS) or not gradients or classes == 0:
        return Chunking(max(1, min(wanted, fitting)), classes, products, cast_once)
    return _tiles(rows, classes, left, per_logit, per_row, on_cpu, products, cast_once)


def _tiles(
    rows: int, classes: int, left: int, per_logit: float, per_row: int, on_cpu: bool, products: int, cast_once: bool
) -> Chunking:  # fmt: skip
    """As many rows as the products need, and of the classes what then fits."""
    count = min(rows, CPU_ROWS if on_cpu else 16 * GPU_ROWS)
    count = max(1, min(count, int(left // (per_row + 16 * per_logit))))
    tile = int((left - count * per_row) // (count * per_logit))
    return Chunking(count, min(classes, max(LEAST_CLASSES, tile)), products, cast_once)


def slices(length: int, step: int, start: int = 0) -> Iterator[slice]:
    """start..length - 1 in steps; one empty slice where there is nothing."""
    for begin in range(start, max(length, start + 1), max(step, 1)):
        yield slice(begin, min(begin + step, length))
