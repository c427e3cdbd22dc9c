"""The terms and the gradient of a tile of logits, by the Triton kernels of `row_kernels`."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastlt_kernels._impl import row_kernels
from fastlt_kernels._impl.rows import Rows, Terms, merge_terms

# Measured on an H100, bf16 and fp32, with prior and silencing. Programs that take one row after
# another, so that the L2 cache still holds a row at its second reading, were slower, and hints to
# the caches changed nothing.
WHOLE_ROW = 2_048  # classes that stay in registers
SHORT, MEDIUM = 16_384, 65_536  # classes: below, rows go in smaller blocks, by fewer warps
# classes: a program alone is through with fewer before the parts of several have been put together
SHARED_FROM = 2**18
SHARED_ROWS = 64  # and with so many rows it is too
# what Triton must know a number to be a multiple of, to read and write several elements at once
VECTOR = 16


class Cut(NamedTuple):
    """The way in which rows of logits go to programs."""

    block: int  # columns of a program at a time, a power of two
    warps: int
    parts: int  # programs that share a row


def plan_cut(rows: int, classes: int, labels: int, processors: int) -> Cut:
    """Return the cut: whole rows in registers where they fit.

    Long rows are in one program, a few very long ones in parts.
    """
    if classes <= WHOLE_ROW // labels:  # two labels keep two sets of values and their gradient
        block = triton.next_power_of_2(max(classes, 16))
        return Cut(block, max(1, block // 1024), 1)
    block, warps = (
        (2_048, 8) if classes < SHORT else (8_192, 16) if classes < MEDIUM else (8_192, 32)
    )
    if classes < SHARED_FROM or rows > SHARED_ROWS:
        return Cut(block, warps, 1)
    return Cut(
        block,
        warps,
        min(triton.cdiv(classes, 2 * block), triton.cdiv(2 * processors, max(rows, 1))),
    )


def row_terms(logits: Tensor, first: int, rows: Rows) -> Terms:
    """Return the terms of logits (n, c) of the classes first..first + c - 1, left as they are."""
    rows = _laid_out(rows)
    count, columns = logits.shape
    labels = rows.labels.shape[0]
    cut = _cut(logits, labels)
    out = _empty_terms(rows, logits, cut.parts)
    aligned, (stride,) = _in_units(logits.stride(0))
    with _on(logits):
        row_kernels.part_terms[count, cut.parts](
            logits,
            stride,
            rows.log_prior,
            rows.labels,
            rows.smoothing,
            rows.graph_rows,
            rows.indptr,
            rows.indices,
            rows.blocks,
            rows.split,
            *out,
            count,
            columns,
            first,
            _span(columns, cut),
            rows.num_predicted,
            _log_silence(rows),
            _steps(rows),
            LABELS=labels,
            BLOCK=cut.block,
            LANE=_lane(logits),
            ALIGNED=aligned,
            num_warps=cut.warps,
        )
    return _merged(out)


def row_gradient(logits: Tensor, first: int, rows: Rows, log_sum: Tensor, out: Tensor) -> None:
    """Write the gradient to out (n, c), which may be logits; log_sum (L, n) is over all classes."""
    rows = _laid_out(rows)
    count, columns = logits.shape
    labels = rows.labels.shape[0]
    cut = _cut(logits, labels)
    aligned, (stride, out_stride) = _in_units(logits.stride(0), out.stride(0))
    with _on(logits):
        row_kernels.part_gradient[count, cut.parts](
            logits,
            stride,
            out,
            out_stride,
            rows.log_prior,
            rows.labels,
            rows.shares,
            rows.smoothing,
            rows.graph_rows,
            rows.indptr,
            rows.indices,
            rows.blocks,
            rows.split,
            log_sum.contiguous(),
            count,
            columns,
            first,
            _span(columns, cut),
            _log_silence(rows),
            rows.label_smoothing,
            _steps(rows),
            LABELS=labels,
            BLOCK=cut.block,
            LANE=_lane(logits),
            ALIGNED=aligned,
            num_warps=cut.warps,
        )


def row_loss_and_gradient(logits: Tensor, rows: Rows, out: Tensor) -> Terms:
    """Return the terms of logits (n, C) over all classes; write the gradient to out (n, C).

    out may be logits.
    """
    rows = _laid_out(rows)
    count, columns = logits.shape
    labels = rows.labels.shape[0]
    cut = _cut(logits, labels)
    whole = columns <= cut.block
    if not whole and cut.parts > 1:
        terms = row_terms(logits, 0, rows)
        row_gradient(logits, 0, rows, terms.log_sum, out)
        return terms
    written = _empty_terms(rows, logits, 1)
    kernel, widths = (
        (row_kernels.whole_rows, [_width(logits, out)]) if whole else (row_kernels.long_rows, [])
    )
    prior = _padded(rows.log_prior) if whole else rows.log_prior
    aligned, (stride, out_stride, *widths) = _in_units(logits.stride(0), out.stride(0), *widths)
    with _on(logits):
        kernel[count, 1](
            logits,
            stride,
            out,
            out_stride,
            prior,
            rows.labels,
            rows.shares,
            rows.smoothing,
            rows.graph_rows,
            rows.indptr,
            rows.indices,
            rows.blocks,
            rows.split,
            *written,
            count,
            columns,
            *widths,
            rows.num_predicted,
            _log_silence(rows),
            rows.label_smoothing,
            LABELS=labels,
            BLOCK=cut.block,
            LANE=_lane(logits),
            ALIGNED=aligned,
            num_warps=cut.warps,
        )
    return _merged(written)


def scale_(values: Tensor, scale: Tensor) -> Tensor:
    """Multiply values by scale (), in place; memory is not touched where scale is 1."""
    block = 4096
    with _on(values):
        row_kernels.scale_in_place[(triton.cdiv(values.numel(), block),)](
            values, scale, values.numel(), BLOCK=block, num_warps=8
        )
    return values


def _laid_out(rows: Rows) -> Rows:
    """Return the rows with contiguous labels.

    Some rows of two labels are not, and the kernels take (L, n) as it is.
    """
    tensors = {
        name: getattr(rows, name)
        for name in ("labels", "shares", "smoothing", "graph_rows", "blocks")
    }
    return rows._replace(**{name: t.contiguous() for name, t in tensors.items() if t is not None})


def _padded(prior: Tensor | None) -> Tensor | None:
    """Return the prior, readable as far as a whole row's columns are."""
    return None if prior is None else torch.nn.functional.pad(prior, (0, VECTOR))


class _Out(NamedTuple):
    """The terms as the kernels write them, one set per part but for the label's logit."""

    log_sums: Tensor  # (parts, L, n)
    label_logits: Tensor  # (L, n)
    logit_sums: Tensor | None  # (parts, L, n)
    best_logits: Tensor | None  # (parts, n)
    bests: Tensor | None


def _empty_terms(rows: Rows, logits: Tensor, parts: int) -> _Out:
    labels, count = rows.labels.shape
    new = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=logits.device)  # noqa: E731
    predicted = rows.num_predicted > 0
    return _Out(
        new(parts, labels, count),
        new(labels, count),
        None if rows.smoothing is None else new(parts, labels, count),
        new(parts, count) if predicted else None,
        new(parts, count, dtype=torch.int64) if predicted else None,
    )


def _merged(out: _Out) -> Terms:
    parts = out.log_sums.shape[0]
    pieces = [
        (None,) * parts if t is None else t.unbind()
        for t in (out.log_sums, out.logit_sums, out.best_logits, out.bests)
    ]
    return merge_terms(
        [
            Terms(s, out.label_logits, total, value, best)
            for s, total, value, best in zip(*pieces, strict=True)
        ]
    )


def _cut(logits: Tensor, labels: int) -> Cut:
    return plan_cut(logits.shape[0], logits.shape[1], labels, _processors(logits.device))


def _width(logits: Tensor, out: Tensor) -> int:
    """Return the columns that may be read and written: padded to whole vectors where memory is.

    Behind the columns of logits that become their own gradient is nobody else's memory; behind
    those of others may be.
    """
    columns, stride = logits.shape[1], logits.stride(0)
    padded = triton.cdiv(columns, VECTOR) * VECTOR
    reach = logits.storage_offset() + (logits.shape[0] - 1) * stride + padded
    is_ours = out.data_ptr() == logits.data_ptr()
    has_room = stride >= padded and reach * logits.itemsize <= logits.untyped_storage().nbytes()
    return padded if is_ours and has_room else columns


def _span(columns: int, cut: Cut) -> int:
    """Return the columns of a part, whole blocks."""
    return triton.cdiv(triton.cdiv(columns, cut.parts), cut.block) * cut.block


def _lane(logits: Tensor) -> int:
    """Return the neighbouring columns of one thread: what it reads at once, 16 bytes."""
    return 16 // logits.element_size()


def _in_units(*lengths: int) -> tuple[int, list[int]]:
    """Return a unit, and the lengths in it.

    Triton sees by itself what is a multiple of 16; so rows of 1,000 classes are vectors too.
    """
    unit = 8 if all(length % 8 == 0 for length in lengths) else 1
    return unit, [length // unit for length in lengths]


def _log_silence(rows: Rows) -> float:
    return math.log(rows.silence) if rows.silence > 0 else -math.inf


def _steps(rows: Rows) -> int:
    """Return the bisections that find a place among max_degree neighbours."""
    return rows.max_degree.bit_length()


@cache
def _processors(device: torch.device) -> int:
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 1
    )


def _on(tensor: Tensor) -> Any:
    """Return a context on the tensor's device: Triton launches on the current one."""
    return torch.cuda.device_of(tensor)
