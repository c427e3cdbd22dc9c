"""The Triton kernels: tiles of logits to their terms and their gradient, with prior and silencing, in fp32 inside.

A program has a few rows and goes over its classes in blocks of columns. Where a whole row is one block it stays in
registers: read once, written once, one exponential per element and label. Longer rows are gone over twice, by one
program or, where there are few rows, by several that never wait for each other.

The silenced classes of a label are a row of the class graph, ascending. Each block looks its own up by bisection, and
compares its columns with those few alone; no mask over rows and classes is ever made.

Offsets of rows are 64 bits wide: 16k rows of 1M classes are more than 2^31 logits. Names: L labels per row (1 or 2),
ROWS and BLOCK the shape of a block, `first` the class of column 0, `part` one of several programs of a row, `width` the columns
that memory has, of which those from `classes` on mean nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4028234663852886e38)  # finite, so that the difference of two maxima is never NaN
NEVER = tl.constexpr(2147483647)  # above every class


@triton.jit
def _logits(logits, stride, row, columns, mask, stop):
    """(ROWS, BLOCK) fp32; -inf from column `stop` on. The mask says where there is memory, in wide strides where it can."""
    read = tl.load(logits + row.to(tl.int64)[:, None] * stride + columns[None, :], mask=mask, other=float("-inf")).to(tl.float32)
    return tl.where((columns < stop)[None, :], read, float("-inf"))


@triton.jit
def _add_prior(base, log_prior, first, columns, width):
    if log_prior is not None:
        base += tl.load(log_prior + first + columns, mask=columns < width, other=0.0)[None, :]
    return base


@triton.jit
def _neighbour(indices, slot, end, first):
    """(ROWS,) int32, the silenced class in each row's slot, as a column; NEVER after the last."""
    found = tl.load(indices + slot, mask=slot < end, other=0) - first
    return tl.where(slot < end, tl.minimum(found, NEVER), NEVER).to(tl.int32)


@triton.jit
def _penalty(
    indptr, indices, graph_rows, label_row, mask, first, start, log_silence, steps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """(ROWS, BLOCK) fp32: log_silence at the silenced columns start..start + BLOCK - 1, 0 elsewhere."""
    columns = start + tl.arange(0, BLOCK)
    penalty = tl.zeros((ROWS, BLOCK), tl.float32)
    graph_row = tl.load(graph_rows + label_row, mask=mask, other=0)
    slot = tl.load(indptr + graph_row, mask=mask, other=0)
    end = tl.load(indptr + graph_row + 1, mask=mask, other=0)
    high = end
    for _ in range(steps):
        middle = (slot + high) // 2
        before = tl.load(indices + middle, mask=slot < high, other=start + first) < start + first
        slot = tl.where(before, middle + 1, slot)
        high = tl.where(before, high, middle)
    neighbour = _neighbour(indices, slot, end, first)
    while tl.min(neighbour, axis=0) < start + BLOCK:
        penalty = tl.where(columns[None, :] == neighbour[:, None], log_silence, penalty)
        slot += (neighbour < start + BLOCK).to(tl.int64)
        neighbour = _neighbour(indices, slot, end, first)
    return penalty


@triton.jit
def _silenced(
    base, indptr, indices, graph_rows, label_row, mask, first, start, log_silence, steps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """base with its silenced columns lowered, and whether each column is unsilenced, (ROWS, BLOCK)."""
    if indices is None:
        return base, tl.full((ROWS, BLOCK), 1, tl.int1)
    else:  # the compiler goes on after a return that is not at the end
        penalty = _penalty(indptr, indices, graph_rows, label_row, mask, first, start, log_silence, steps, ROWS, BLOCK)
        return base + penalty, penalty == 0.0


@triton.jit
def _label_logit(logits, stride, row, log_prior, label, classes, first, mask):
    """(ROWS,) fp32, logit plus prior of each row's label; -inf where it is in another tile."""
    column = label - first
    inside = mask & (column >= 0) & (column < classes)
    logit = tl.load(logits + row.to(tl.int64) * stride + column, mask=inside, other=float("-inf")).to(tl.float32)
    if log_prior is not None:
        logit += tl.load(log_prior + label, mask=inside, other=0.0)
    return logit


@triton.jit
def _best_of(logits, columns, start, first, num_predicted, best_logit, best):
    """The running best over the predicted classes, with a block's logits (ROWS, BLOCK) taken in; the first of equals."""
    considered = tl.where((columns + first < num_predicted)[None, :], logits, float("-inf"))
    here, where = tl.max(considered, axis=1, return_indices=True)
    column = where.to(tl.int64) + start + first
    better = here > best_logit
    return tl.where(better, here, best_logit), tl.where(better, column, best)


@triton.jit
def _mass(columns, first, label, unsilenced, share, smooth, label_smoothing, smoothing):
    """(ROWS, BLOCK): share * target mass, to be taken off the softmax."""
    taken = tl.where((columns + first)[None, :] == label[:, None], (share * (1.0 - label_smoothing))[:, None], 0.0)
    if smoothing is not None:
        taken += tl.where(unsilenced, (share * smooth)[:, None], 0.0)
    return taken


@triton.jit
def whole_rows(
    logits, stride,  # (n, C), rows contiguous
    out, out_stride,  # (n, C) the gradient, may be logits
    log_prior,  # fp32, (C,) and readable up to the tile's width; or None
    labels, shares, smoothing,  # (L, n) int64; fp32; fp32 or None
    graph_rows, indptr, indices,  # (L, n) int64, CSR; or None
    log_sums, label_logits, logit_sums,  # (L, n) fp32, written
    best_logits, bests,  # (n,) fp32 and int64, written; or None
    rows, classes, width, num_predicted, log_silence, label_smoothing,
    LABELS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows that fit into one block: terms and gradient."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    mask = row < rows
    inside = mask[:, None] & (columns < width)[None, :]
    base = _logits(logits, stride, row, columns, inside, classes)
    if bests is not None:
        best_logit = tl.full((ROWS,), float("-inf"), tl.float32)
        best_logit, best = _best_of(base, columns, 0, 0, num_predicted, best_logit, tl.zeros((ROWS,), tl.int64))
        tl.store(best_logits + row, best_logit, mask=mask)
        tl.store(bests + row, best, mask=mask)
    base = _add_prior(base, log_prior, 0, columns, width)
    gradient = tl.zeros((ROWS, BLOCK), tl.float32)
    for which in tl.static_range(LABELS):
        label_row = which * rows + row
        label = tl.load(labels + label_row, mask=mask, other=0)
        tl.store(label_logits + label_row, _label_logit(logits, stride, row, log_prior, label, classes, 0, mask), mask=mask)
        # Column 0 is class 0: the first neighbour is the row's first, and nothing has to be searched.
        values, unsilenced = _silenced(base, indptr, indices, graph_rows, label_row, mask, 0, 0, log_silence, 0, ROWS, BLOCK)
        highest = tl.maximum(tl.max(values, axis=1), LOWEST)
        exponentials = tl.exp(values - highest[:, None])
        total = tl.sum(exponentials, axis=1)
        tl.store(log_sums + label_row, highest + tl.log(total), mask=mask)
        smooth = tl.zeros((ROWS,), tl.float32)
        if smoothing is not None:
            smooth = tl.load(smoothing + label_row, mask=mask, other=0.0)
            logit_sum = tl.sum(tl.where(unsilenced & (columns < classes)[None, :], base, 0.0), axis=1)
            tl.store(logit_sums + label_row, logit_sum, mask=mask)
        share = tl.load(shares + label_row, mask=mask, other=0.0)
        gradient += tl.where((share != 0)[:, None], exponentials * (share / total)[:, None], 0.0)
        gradient -= _mass(columns, 0, label, unsilenced, share, smooth, label_smoothing, smoothing)
    # Where out is logits, other warps may still have to read the label's logit.
    tl.debug_barrier()
    place = out + row.to(tl.int64)[:, None] * out_stride + columns[None, :]
    tl.store(place, gradient.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _scan(
    logits, stride, log_prior, smoothing, graph_rows, indptr, indices,
    log_sums, logit_sums, best_logits, bests, part,
    row, mask, rows, begin, stop, classes, width, first, num_predicted, log_silence, steps,
    LABELS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Terms over the columns begin..stop - 1, stored as those of this part; returns log-sum-exp (LABELS, ROWS)."""
    which_label = tl.arange(0, LABELS)[:, None]
    highest = tl.full((LABELS, ROWS), LOWEST, tl.float32)
    total = tl.zeros((LABELS, ROWS), tl.float32)
    logit_sum = tl.zeros((LABELS, ROWS), tl.float32)
    best_logit = tl.full((ROWS,), float("-inf"), tl.float32)
    best = tl.zeros((ROWS,), tl.int64)
    for start in range(begin, stop, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = mask[:, None] & (columns < width)[None, :]
        base = _logits(logits, stride, row, columns, inside, stop)
        if bests is not None and start + first < num_predicted:
            best_logit, best = _best_of(base, columns, start, first, num_predicted, best_logit, best)
        base = _add_prior(base, log_prior, first, columns, width)
        for which in tl.static_range(LABELS):
            values, unsilenced = _silenced(
                base, indptr, indices, graph_rows, which * rows + row, mask, first, start, log_silence, steps, ROWS, BLOCK
            )
            mine = which_label == which
            higher = tl.where(mine, tl.maximum(highest, tl.max(values, axis=1)[None, :]), highest)
            reference = tl.max(tl.where(mine, higher, LOWEST), axis=0)
            added = tl.sum(tl.exp(values - reference[:, None]), axis=1)
            total = total * tl.exp(highest - higher) + tl.where(mine, added[None, :], 0.0)
            highest = higher
            if smoothing is not None:
                logit_sum += tl.where(
                    mine, tl.sum(tl.where(unsilenced & (columns < stop)[None, :], base, 0.0), axis=1)[None, :], 0.0
                )
    log_sum = highest + tl.log(total)
    place = (part.to(tl.int64) * LABELS + which_label) * rows + row[None, :]
    tl.store(log_sums + place, log_sum, mask=mask[None, :])
    if smoothing is not None:
        tl.store(logit_sums + place, logit_sum, mask=mask[None, :])
    if bests is not None:
        tl.store(best_logits + part.to(tl.int64) * rows + row, best_logit, mask=mask)
        tl.store(bests + part.to(tl.int64) * rows + row, best, mask=mask)
    return log_sum


@triton.jit
def _write_gradient(
    logits, stride, out, out_stride, log_prior, labels, shares, smoothing, graph_rows, indptr, indices, log_sum,
    row, mask, rows, begin, stop, classes, width, first, log_silence, label_smoothing, steps,
    LABELS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient at the columns begin..stop - 1; log_sum (LABELS, ROWS) is over all classes."""
    for start in range(begin, stop, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        inside = mask[:, None] & (columns < width)[None, :]
        base = _add_prior(_logits(logits, stride, row, columns, inside, stop), log_prior, first, columns, width)
        gradient = tl.zeros((ROWS, BLOCK), tl.float32)
        for which in tl.static_range(LABELS):
            label_row = which * rows + row
            values, unsilenced = _silenced(
                base, indptr, indices, graph_rows, label_row, mask, first, start, log_silence, steps, ROWS, BLOCK
            )
            label = tl.load(labels + label_row, mask=mask, other=0)
            share = tl.load(shares + label_row, mask=mask, other=0.0)
            smooth = tl.zeros((ROWS,), tl.float32)
            if smoothing is not None:
                smooth = tl.load(smoothing + label_row, mask=mask, other=0.0)
            of_label = tl.sum(tl.where((tl.arange(0, LABELS) == which)[:, None], log_sum, 0.0), axis=0)
            gradient += tl.where((share != 0)[:, None], tl.exp(values - of_label[:, None]) * share[:, None], 0.0)
            gradient -= _mass(columns, first, label, unsilenced, share, smooth, label_smoothing, smoothing)
        place = out + row.to(tl.int64)[:, None] * out_stride + columns[None, :]
        tl.store(place, gradient.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _store_label_logits(
    logits, stride, log_prior, labels, label_logits, row, mask, rows, classes, first, LABELS: tl.constexpr
):  # fmt: skip
    for which in tl.static_range(LABELS):
        label = tl.load(labels + which * rows + row, mask=mask, other=0)
        logit = _label_logit(logits, stride, row, log_prior, label, classes, first, mask)
        tl.store(label_logits + which * rows + row, logit, mask=mask)


@triton.jit
def long_rows(
    logits, stride, out, out_stride, log_prior, labels, shares, smoothing, graph_rows, indptr, indices,
    log_sums, label_logits, logit_sums, best_logits, bests,
    rows, classes, width, num_predicted, log_silence, label_smoothing, steps,
    LABELS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As `whole_rows`, for rows of several blocks: the second time they come from the cache."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = row < rows
    _store_label_logits(logits, stride, log_prior, labels, label_logits, row, mask, rows, classes, 0, LABELS)
    log_sum = _scan(
        logits, stride, log_prior, smoothing, graph_rows, indptr, indices,
        log_sums, logit_sums, best_logits, bests, tl.program_id(1),
        row, mask, rows, 0, classes, classes, width, 0, num_predicted, log_silence, steps, LABELS, ROWS, BLOCK,
    )  # fmt: skip
    # Where out is logits, every warp must have read the labels' logits before any warp writes.
    tl.debug_barrier()
    _write_gradient(
        logits, stride, out, out_stride, log_prior, labels, shares, smoothing, graph_rows, indptr, indices, log_sum,
        row, mask, rows, 0, classes, classes, width, 0, log_silence, label_smoothing, steps, LABELS, ROWS, BLOCK,
    )  # fmt: skip


@triton.jit
def part_terms(
    logits, stride, log_prior, labels, smoothing, graph_rows, indptr, indices,
    log_sums, label_logits, logit_sums, best_logits, bests,  # the first, third, fourth and fifth once per part
    rows, classes, width, first, span, num_predicted, log_silence, steps,
    LABELS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Terms of a part of each row, `span` columns of a tile whose column 0 is class `first`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = row < rows
    part = tl.program_id(1)
    begin = part * span
    if part == 0:
        _store_label_logits(logits, stride, log_prior, labels, label_logits, row, mask, rows, classes, first, LABELS)
    _scan(
        logits, stride, log_prior, smoothing, graph_rows, indptr, indices,
        log_sums, logit_sums, best_logits, bests, part,
        row, mask, rows, begin, tl.minimum(begin + span, classes), classes, width, first, num_predicted, log_silence, steps,
        LABELS, ROWS, BLOCK,
    )  # fmt: skip


@triton.jit
def part_gradient(
    logits, stride, out, out_stride, log_prior, labels, shares, smoothing, graph_rows, indptr, indices, log_sums,
    rows, classes, width, first, span, log_silence, label_smoothing, steps,
    LABELS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of a part of each row; log_sums (L, n) are over all classes."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = row < rows
    begin = tl.program_id(1) * span
    log_sum = tl.load(log_sums + tl.arange(0, LABELS)[:, None] * rows + row[None, :], mask=mask[None, :], other=0.0)
    _write_gradient(
        logits, stride, out, out_stride, log_prior, labels, shares, smoothing, graph_rows, indptr, indices, log_sum,
        row, mask, rows, begin, tl.minimum(begin + span, classes), classes, width, first, log_silence, label_smoothing, steps,
        LABELS, ROWS, BLOCK,
    )  # fmt: skip


@triton.jit
def scale_in_place(values, scale, count, BLOCK: tl.constexpr):
    """values (count,) *= scale, a tensor of one element; where that is 1, memory is not touched."""
    factor = tl.load(scale).to(tl.float32)
    if factor != 1.0:
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        scaled = tl.load(values + place, mask=place < count).to(tl.float32) * factor
        tl.store(values + place, scaled.to(values.dtype.element_ty), mask=place < count)
