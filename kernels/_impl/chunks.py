"""The cut of the linear loss into pieces whose temporaries fit."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

# On a GPU each chunk of rows reads and writes the whole fp32 weight gradient once more, which costs
# about 240 / rows of the time of the products; making the logits a second time costs a third.
GPU_ROWS = 1024
# more would take memory; on an H100 at C = 10k they take 0.75 of the time that 4,096 do
GPU_MOST_ROWS = 8192
GPU_TILE = 128  # rows of a matrix product that a processor computes together
# Measured on AVX-512 at C = 10k and 100k: 64 rows starve the matrix products (1.1 times the time in
# fp32, 2 in bf16), and more than 512 leave the caches and gain nothing in fp32. In bf16 every chunk
# adds a rounded weight gradient.
CPU_ROWS = 512
# measured at C = 100k, D = 768: of 16 rows whole takes 1.2 times as long as in tiles, of 64 0.9
# times
CPU_LEAST_ROWS = 32
LEAST_CLASSES = 1024  # of a tile, whatever chunk_bytes says
# elements that slices of classes start at a multiple of: matrix products and loads are wide there
ALIGNED = 64


class Chunking(NamedTuple):
    """The sizes of the pieces."""

    rows: int  # of features at a time
    classes: int  # of logits at a time; fewer than all: for gradients, the logits are made twice
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
    device: str,
    in_torch: bool,
    chunk_bytes: int,
    weight_grad: bool = True,
) -> Chunking:
    """Return the cut of a problem.

    slots: silenced columns per row, padded; product, total: dtypes of products and sums; in_torch:
    rows are torch's.
    """
    cast_bytes = width * product.itemsize if weight_dtype != product else 0  # of a class
    cast_once = 0 < classes * cast_bytes <= chunk_bytes // 4
    # A product that has to be widened before it is added; CUDA's come out wide.
    widened = (
        width * (product.itemsize + total.itemsize) if product != total and device != "cuda" else 0
    )
    per_class = widened + (0 if cast_once else cast_bytes)
    products = (
        min(classes, max(ALIGNED, _down(chunk_bytes // 4 // per_class))) if per_class else classes
    )
    left = chunk_bytes - products * per_class - (classes * cast_bytes if cast_once else 0)

    # torch's rows need room for an eighth of their softmax and, where they are not as wide as the
    # sums, of a wide copy.
    per_logit = product.itemsize + (
        total.itemsize * (1 if product == total else 2) / 8 if in_torch else 0
    )
    per_row = width * (product.itemsize + total.itemsize) + widened  # features and their gradient
    # indices, masks and values of the silenced columns, as measured
    per_row += slots * 13 * total.itemsize if in_torch else 0
    wanted = min(rows, CPU_ROWS if device == "cpu" and product == total else GPU_MOST_ROWS)
    row_bytes = _up(classes) * per_logit + per_row
    # Several chunks sum the weight's gradient beside it; where all rows are one chunk, their logits
    # may have that memory.
    sums = classes * width * total.itemsize if weight_grad and weight_dtype != total else 0
    if wanted == rows and device != "cpu" and (left + sums) // row_bytes >= rows:
        return Chunking(rows, classes, products, cast_once)
    fitting = int(left // row_bytes)
    if (
        fitting >= min(wanted, CPU_LEAST_ROWS if device == "cpu" else GPU_ROWS)
        or classes <= LEAST_CLASSES
    ):
        step = max(1, min(wanted, fitting))
        together = (
            _even(rows, step)
            if device == "cpu" or step < GPU_TILE
            else _up(_even(rows, _down(step, GPU_TILE)), GPU_TILE)
        )
        return Chunking(together, classes, products, cast_once)
    # As many rows as classes: the gradients of both are read and written once per tile.
    square = CPU_ROWS if device == "cpu" else _down(math.isqrt(max(0, int(left / per_logit))))
    count = _even(rows, max(1, min(square, int(left // (per_row + LEAST_CLASSES * per_logit)))))
    tile = _down(int((left - count * per_row) / (count * per_logit)))
    return Chunking(
        count, min(classes, _up(_even(classes, max(LEAST_CLASSES, tile)))), products, cast_once
    )


def _even(length: int, step: int) -> int:
    """Return the step that takes as many as this one does, and leaves no short rest."""
    return math.ceil(length / math.ceil(length / step)) if length else step


def _down(count: int, step: int = ALIGNED) -> int:
    return count // step * step


def _up(count: int, step: int = ALIGNED) -> int:
    return -(-count // step) * step


def slices(length: int, step: int, start: int = 0) -> Iterator[slice]:
    """Yield start..length - 1 in steps; one empty slice where there is nothing."""
    for begin in range(start, max(length, start + 1), max(step, 1)):
        yield slice(begin, min(begin + step, length))
