"""The Triton kernels: rows of logits to their terms and their gradient, with prior and silencing,
in fp32 inside.

A program has one row, or a part of one, and goes over its classes in blocks of columns. Where a
whole row is one block it stays in registers: read once, written once. Longer rows are gone over
twice, by one program or, where there are few rows, by several that never wait for each other.
Within a program no thread waits for another either until the end: each keeps a log-sum-exp of its
own columns.

The silenced classes of a label are a row of the class graph, ascending, so they are met one by one
on the way: a block compares its columns with those that lie in it, mostly none. No mask over rows
and classes is ever made.

Offsets of rows are 64 bits wide: 16k rows of 1M classes are more than 2^31 logits. Names: L labels
per row (1 or 2; a and b), BLOCK columns in LANEs that one thread reads at once, `first` the class
of column 0, `part` one of several programs of a row, `width` the columns that memory has, of which
those from `classes` on mean nothing. Strides and `width` are in units of ALIGNED columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

# finite, so that the difference of two maxima is never NaN
LOWEST = tl.constexpr(-3.4028234663852886e38)
NEVER = tl.constexpr(2147483647)  # above every class


@triton.jit
def _columns(start, BLOCK: tl.constexpr, LANE: tl.constexpr):
    """Return columns (BLOCK // LANE, LANE) int32, the shape of all tiles."""
    return start + tl.arange(0, BLOCK // LANE)[:, None] * LANE + tl.arange(0, LANE)[None, :]


@triton.jit
def _column_of(label, first):
    """Return the column of a label, int32; none of this tile where the class is in another one."""
    return tl.maximum(tl.minimum(label - first, NEVER), -1).to(tl.int32)


# ---- silenced classes


@triton.jit
def _silenced_range(indptr, indices, graph_rows, label_row, begin_class, steps):
    """Return place and end in `indices` of the label's silenced classes from begin_class on."""
    graph_row = tl.load(graph_rows + label_row)
    slot, end = tl.load(indptr + graph_row), tl.load(indptr + graph_row + 1)
    high = end
    for _ in range(steps):
        middle = (slot + high) // 2
        before = tl.load(indices + middle, mask=slot < high, other=begin_class) < begin_class
        slot = tl.where(before, middle + 1, slot)
        high = tl.where(before, high, middle)
    return slot, end


@triton.jit
def _column_at(indices, slot, end, first):
    """Return the column of the silenced class at that place; NEVER after the last."""
    return tl.where(
        slot < end,
        tl.minimum(tl.load(indices + slot, mask=slot < end, other=0) - first, NEVER),
        NEVER,
    ).to(tl.int32)


@triton.jit
def _silenced_block(blocks, labels, label_row, split, first):
    """Return first and end of the columns that are silenced but for the label's, and that one.

    The columns below `split` are targets, those from there on auxiliaries; see `Rows.blocks`.
    """
    low, high, own = 0, 0, 0
    if blocks is not None:
        which = tl.load(blocks + label_row)
        border = tl.zeros((), tl.int64) + split - first
        border = tl.minimum(tl.maximum(border, 0), NEVER).to(tl.int32)
        low = tl.where((which & 1) != 0, 0, border)
        high = tl.where((which & 2) != 0, NEVER, border)
        own = _column_of(tl.load(labels + label_row), first)
    return low, high, own


@triton.jit
def _silenced(
    base,
    blocks,
    indices,
    low,
    high,
    own,
    slot,
    end,
    first,
    columns,
    stop,
    log_silence,
    smoothing,
):
    """Return base with its silenced columns below `stop` lowered, and where to go on.

    Between them it returns which columns are not silenced.

    The latter tile is made only where labels are smoothed.
    """
    values = base
    unsilenced = columns >= 0
    if blocks is not None:
        inside = (columns >= low) & (columns < high) & (columns != own)
        values = tl.where(inside, base + log_silence, base)
        if smoothing is not None:
            unsilenced = unsilenced & (inside == 0)
    if indices is not None:
        column = _column_at(indices, slot, end, first)
        while column < stop:
            if blocks is not None:  # what is listed is the other way round
                is_heard = (column >= low) & (column < high)
                heard = tl.where(is_heard, base, base + log_silence)
                values = tl.where(columns == column, heard, values)
                if smoothing is not None:
                    unsilenced = tl.where(columns == column, is_heard, unsilenced)
            else:
                values = tl.where(columns == column, values + log_silence, values)
                if smoothing is not None:
                    unsilenced = unsilenced & (columns != column)
            slot += 1
            column = _column_at(indices, slot, end, first)
    return values, unsilenced, slot


# ---- reading


@triton.jit
def _block(logits, log_prior, first, columns, stop, MASKED: tl.constexpr):
    """Return the logits of a row at these columns, and the same plus prior, fp32.

    They are -inf from `stop` on, where they are masked.
    """
    if MASKED:
        inside = columns < stop
        read = tl.load(logits + columns, mask=inside, other=float("-inf")).to(tl.float32)
        base = read
        if log_prior is not None:
            base += tl.load(log_prior + first + columns, mask=inside, other=0.0)
    else:
        read = tl.load(logits + columns).to(tl.float32)
        base = read
        if log_prior is not None:
            base += tl.load(log_prior + first + columns)
    return read, base


@triton.jit
def _store_label_logit(logits, log_prior, labels, label_logits, label_row, classes, first):
    """Store logit plus prior of a label; -inf where it is in another tile."""
    label = tl.load(labels + label_row)
    column = label - first
    inside = (column >= 0) & (column < classes)
    logit = tl.load(logits + column, mask=inside, other=float("-inf")).to(tl.float32)
    if log_prior is not None:
        logit += tl.load(log_prior + label, mask=inside, other=0.0)
    tl.store(label_logits + label_row, logit)


@triton.jit
def _best_of(read, start, first, num_predicted, best_logit, best, BLOCK: tl.constexpr):
    """Return the running best over the predicted classes with a block; the first of equals."""
    classes = start + first + tl.arange(0, BLOCK)
    considered = tl.where(classes < num_predicted, tl.reshape(read, (BLOCK,)), float("-inf"))
    here, where = tl.max(considered, axis=0, return_indices=True)
    return tl.maximum(here, best_logit), tl.where(
        here > best_logit, where.to(tl.int64) + start + first, best
    )


# ---- log-sum-exp, of each thread's own columns


@triton.jit
def _taken_in(peak, weight, values):
    """Return running maximum and sum of exponentials above it, with a tile taken in.

    Both are (BLOCK // LANE,).
    """
    higher = tl.maximum(peak, tl.max(values, axis=1))
    return higher, weight * tl.exp(peak - higher) + tl.sum(tl.exp(values - higher[:, None]), axis=1)


@triton.jit
def _log_sum_of(peak, weight):
    highest = tl.max(peak, axis=0)
    return highest + tl.log(tl.sum(weight * tl.exp(peak - highest), axis=0))


@triton.jit
def _gradient_of(values, log_sum, share, unsilenced, spread, smoothing):
    """Return share * softmax, less what label smoothing spreads."""
    gradient = tl.where(share != 0, tl.exp(values - log_sum) * share, 0.0)
    if smoothing is not None:
        gradient -= tl.where(unsilenced, spread, 0.0)
    return gradient


@triton.jit
def _less_label(gradient, columns, column, start, stop, mass):
    if (column >= start) & (column < stop):
        gradient -= tl.where(columns == column, mass, 0.0)
    return gradient


@triton.jit
def _label_of(labels, shares, smoothing, label_row, first, label_smoothing):
    """Return a label's column, its share, and what of that is on each class.

    The latter is for the label and for each unsilenced class.
    """
    column = _column_of(tl.load(labels + label_row), first)
    share = tl.load(shares + label_row)
    spread = 0.0
    if smoothing is not None:
        spread = share * tl.load(smoothing + label_row)
    return column, share, share * (1.0 - label_smoothing), spread


# ---- short rows


@triton.jit
def _whole_row_of_label(
    base,
    columns,
    log_prior,
    labels,
    shares,
    smoothing,
    graph_rows,
    indptr,
    indices,
    blocks,
    split,
    log_sums,
    logit_sums,
    label_row,
    classes,
    log_silence,
    label_smoothing,
    BLOCK: tl.constexpr,
):
    """Store the terms of one label, and return its part of the gradient."""
    slot, end = 0, 0
    if indices is not None:
        slot, end = _silenced_range(indptr, indices, graph_rows, label_row, 0, 0)
    low, high, own = _silenced_block(blocks, labels, label_row, split, 0)
    values, unsilenced, _ = _silenced(
        base,
        blocks,
        indices,
        low,
        high,
        own,
        slot,
        end,
        0,
        columns,
        BLOCK,
        log_silence,
        smoothing,
    )
    highest = tl.maximum(tl.max(values), LOWEST)
    exponentials = tl.exp(values - highest)
    total = tl.sum(exponentials)
    tl.store(log_sums + label_row, highest + tl.log(total))
    column, share, mass, spread = _label_of(
        labels, shares, smoothing, label_row, 0, label_smoothing
    )
    gradient = tl.where(share != 0, exponentials * (share / total), 0.0)
    if smoothing is not None:
        tl.store(
            logit_sums + label_row, tl.sum(tl.where(unsilenced & (columns < classes), base, 0.0))
        )
        gradient -= tl.where(unsilenced, spread, 0.0)
    return gradient - tl.where(columns == column, mass, 0.0)


@triton.jit
def whole_rows(
    logits,
    stride,  # (n, C), rows contiguous
    out,
    out_stride,  # (n, C) the gradient, may be logits
    log_prior,  # fp32, (C,) and readable up to the tile's width; or None
    labels,
    shares,
    smoothing,  # (L, n) int64; fp32; fp32 or None
    graph_rows,
    indptr,
    indices,  # (L, n) int64, CSR; or None
    blocks,  # (L, n) int64, or None
    split,
    log_sums,
    label_logits,
    logit_sums,  # (L, n) fp32, written
    best_logits,
    bests,  # (n,) fp32 and int64, written; or None
    rows,
    classes,
    width,
    num_predicted,
    log_silence,
    label_smoothing,
    LABELS: tl.constexpr,
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Write the terms and the gradient of rows that fit in registers."""
    stride, out_stride, width = stride * ALIGNED, out_stride * ALIGNED, width * ALIGNED
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    columns = _columns(0, BLOCK, LANE)
    read, base = _block(logits, log_prior, 0, columns, width, True)
    read, base = (
        tl.where(columns < classes, read, float("-inf")),
        tl.where(columns < classes, base, float("-inf")),
    )
    if bests is not None:
        best_logit, best = _best_of(
            read, 0, 0, num_predicted, float("-inf"), tl.zeros((), tl.int64), BLOCK
        )
        tl.store(best_logits + row, best_logit)
        tl.store(bests + row, best)
    for which in tl.static_range(LABELS):
        _store_label_logit(logits, log_prior, labels, label_logits, which * rows + row, classes, 0)
    gradient = tl.zeros((BLOCK // LANE, LANE), tl.float32)
    for which in tl.static_range(LABELS):
        gradient += _whole_row_of_label(
            base,
            columns,
            log_prior,
            labels,
            shares,
            smoothing,
            graph_rows,
            indptr,
            indices,
            blocks,
            split,
            log_sums,
            logit_sums,
            which * rows + row,
            classes,
            log_silence,
            label_smoothing,
            BLOCK,
        )
    # Where out is logits, other warps may still have to read the label's logit.
    tl.debug_barrier()
    tl.store(
        out + row.to(tl.int64) * out_stride + columns,
        gradient.to(out.dtype.element_ty),
        mask=columns < width,
    )


# ---- long rows


@triton.jit
def _scan_block(
    logits,
    log_prior,
    smoothing,
    blocks,
    indices,
    bests,
    start,
    stop,
    first,
    num_predicted,
    log_silence,
    low_a,
    high_a,
    own_a,
    slot_a,
    end_a,
    peak_a,
    weight_a,
    sum_a,
    low_b,
    high_b,
    own_b,
    slot_b,
    end_b,
    peak_b,
    weight_b,
    sum_b,
    best_logit,
    best,
    LABELS: tl.constexpr,
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,
    MASKED: tl.constexpr,
):
    columns = _columns(start, BLOCK, LANE)
    read, base = _block(logits, log_prior, first, columns, stop, MASKED)
    if bests is not None and start + first < num_predicted:
        best_logit, best = _best_of(read, start, first, num_predicted, best_logit, best, BLOCK)
    values, unsilenced, slot_a = _silenced(
        base,
        blocks,
        indices,
        low_a,
        high_a,
        own_a,
        slot_a,
        end_a,
        first,
        columns,
        start + BLOCK,
        log_silence,
        smoothing,
    )
    peak_a, weight_a = _taken_in(peak_a, weight_a, values)
    if smoothing is not None:
        sum_a += tl.sum(tl.where(unsilenced & (columns < stop), base, 0.0), axis=1)
    if LABELS == 2:
        values, unsilenced, slot_b = _silenced(
            base,
            blocks,
            indices,
            low_b,
            high_b,
            own_b,
            slot_b,
            end_b,
            first,
            columns,
            start + BLOCK,
            log_silence,
            smoothing,
        )
        peak_b, weight_b = _taken_in(peak_b, weight_b, values)
        if smoothing is not None:
            sum_b += tl.sum(tl.where(unsilenced & (columns < stop), base, 0.0), axis=1)
    return slot_a, peak_a, weight_a, sum_a, slot_b, peak_b, weight_b, sum_b, best_logit, best


@triton.jit
def _scan(
    logits,
    log_prior,
    labels,
    smoothing,
    blocks,
    split,
    indices,
    slot_a,
    end_a,
    slot_b,
    end_b,
    log_sums,
    logit_sums,
    best_logits,
    bests,
    part,
    row,
    rows,
    begin,
    stop,
    first,
    num_predicted,
    log_silence,
    LABELS: tl.constexpr,
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,
):
    """Store the terms over the columns begin..stop - 1 as this part's; return the log-sum-exp
    for each label.
    """
    peak_a, weight_a = (
        tl.full((BLOCK // LANE,), LOWEST, tl.float32),
        tl.zeros((BLOCK // LANE,), tl.float32),
    )
    peak_b, weight_b = peak_a, weight_a
    sum_a, sum_b = weight_a, weight_a
    low_a, high_a, own_a = _silenced_block(blocks, labels, row, split, first)
    low_b, high_b, own_b = low_a, high_a, own_a
    if LABELS == 2:
        low_b, high_b, own_b = _silenced_block(blocks, labels, rows + row, split, first)
    best_logit, best = tl.full((), float("-inf"), tl.float32), tl.zeros((), tl.int64)
    full = begin + tl.maximum(stop - begin, 0) // BLOCK * BLOCK
    for start in range(begin, full, BLOCK):
        slot_a, peak_a, weight_a, sum_a, slot_b, peak_b, weight_b, sum_b, best_logit, best = (
            _scan_block(
                logits,
                log_prior,
                smoothing,
                blocks,
                indices,
                bests,
                start,
                stop,
                first,
                num_predicted,
                log_silence,
                low_a,
                high_a,
                own_a,
                slot_a,
                end_a,
                peak_a,
                weight_a,
                sum_a,
                low_b,
                high_b,
                own_b,
                slot_b,
                end_b,
                peak_b,
                weight_b,
                sum_b,
                best_logit,
                best,
                LABELS,
                BLOCK,
                LANE,
                False,
            )
        )
    if full < stop:
        slot_a, peak_a, weight_a, sum_a, slot_b, peak_b, weight_b, sum_b, best_logit, best = (
            _scan_block(
                logits,
                log_prior,
                smoothing,
                blocks,
                indices,
                bests,
                full,
                stop,
                first,
                num_predicted,
                log_silence,
                low_a,
                high_a,
                own_a,
                slot_a,
                end_a,
                peak_a,
                weight_a,
                sum_a,
                low_b,
                high_b,
                own_b,
                slot_b,
                end_b,
                peak_b,
                weight_b,
                sum_b,
                best_logit,
                best,
                LABELS,
                BLOCK,
                LANE,
                True,
            )
        )
    part_row = part.to(tl.int64) * rows + row
    place = part.to(tl.int64) * LABELS * rows + row
    log_sum_a = _log_sum_of(peak_a, weight_a)
    log_sum_b = log_sum_a
    tl.store(log_sums + place, log_sum_a)
    if smoothing is not None:
        tl.store(logit_sums + place, tl.sum(sum_a))
    if LABELS == 2:
        log_sum_b = _log_sum_of(peak_b, weight_b)
        tl.store(log_sums + place + rows, log_sum_b)
        if smoothing is not None:
            tl.store(logit_sums + place + rows, tl.sum(sum_b))
    if bests is not None:
        tl.store(best_logits + part_row, best_logit)
        tl.store(bests + part_row, best)
    return log_sum_a, log_sum_b


@triton.jit
def _gradient_block(
    logits,
    out,
    log_prior,
    smoothing,
    blocks,
    indices,
    start,
    stop,
    first,
    log_silence,
    low_a,
    high_a,
    slot_a,
    end_a,
    log_sum_a,
    column_a,
    share_a,
    mass_a,
    spread_a,
    low_b,
    high_b,
    slot_b,
    end_b,
    log_sum_b,
    column_b,
    share_b,
    mass_b,
    spread_b,
    LABELS: tl.constexpr,
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,
    MASKED: tl.constexpr,
):
    columns = _columns(start, BLOCK, LANE)
    _, base = _block(logits, log_prior, first, columns, stop, MASKED)
    values, unsilenced, slot_a = _silenced(
        base,
        blocks,
        indices,
        low_a,
        high_a,
        column_a,
        slot_a,
        end_a,
        first,
        columns,
        start + BLOCK,
        log_silence,
        smoothing,
    )
    gradient = _gradient_of(values, log_sum_a, share_a, unsilenced, spread_a, smoothing)
    gradient = _less_label(gradient, columns, column_a, start, start + BLOCK, mass_a)
    if LABELS == 2:
        values, unsilenced, slot_b = _silenced(
            base,
            blocks,
            indices,
            low_b,
            high_b,
            column_b,
            slot_b,
            end_b,
            first,
            columns,
            start + BLOCK,
            log_silence,
            smoothing,
        )
        gradient += _gradient_of(values, log_sum_b, share_b, unsilenced, spread_b, smoothing)
        gradient = _less_label(gradient, columns, column_b, start, start + BLOCK, mass_b)
    if MASKED:
        tl.store(out + columns, gradient.to(out.dtype.element_ty), mask=columns < stop)
    else:
        tl.store(out + columns, gradient.to(out.dtype.element_ty))
    return slot_a, slot_b


@triton.jit
def _write_gradient(
    logits,
    out,
    log_prior,
    labels,
    shares,
    smoothing,
    blocks,
    split,
    indices,
    slot_a,
    end_a,
    slot_b,
    end_b,
    log_sum_a,
    log_sum_b,
    row,
    rows,
    begin,
    stop,
    first,
    log_silence,
    label_smoothing,
    LABELS: tl.constexpr,
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,
):
    """Write the gradient at the columns begin..stop - 1; the log-sum-exps are over all classes."""
    column_a, share_a, mass_a, spread_a = _label_of(
        labels, shares, smoothing, row, first, label_smoothing
    )
    column_b, share_b, mass_b, spread_b = column_a, share_a, mass_a, spread_a
    low_a, high_a, _ = _silenced_block(blocks, labels, row, split, first)
    low_b, high_b = low_a, high_a
    if LABELS == 2:
        column_b, share_b, mass_b, spread_b = _label_of(
            labels, shares, smoothing, rows + row, first, label_smoothing
        )
        low_b, high_b, _ = _silenced_block(blocks, labels, rows + row, split, first)
    full = begin + tl.maximum(stop - begin, 0) // BLOCK * BLOCK
    for start in range(begin, full, BLOCK):
        slot_a, slot_b = _gradient_block(
            logits,
            out,
            log_prior,
            smoothing,
            blocks,
            indices,
            start,
            stop,
            first,
            log_silence,
            low_a,
            high_a,
            slot_a,
            end_a,
            log_sum_a,
            column_a,
            share_a,
            mass_a,
            spread_a,
            low_b,
            high_b,
            slot_b,
            end_b,
            log_sum_b,
            column_b,
            share_b,
            mass_b,
            spread_b,
            LABELS,
            BLOCK,
            LANE,
            False,
        )
    if full < stop:
        _gradient_block(
            logits,
            out,
            log_prior,
            smoothing,
            blocks,
            indices,
            full,
            stop,
            first,
            log_silence,
            low_a,
            high_a,
            slot_a,
            end_a,
            log_sum_a,
            column_a,
            share_a,
            mass_a,
            spread_a,
            low_b,
            high_b,
            slot_b,
            end_b,
            log_sum_b,
            column_b,
            share_b,
            mass_b,
            spread_b,
            LABELS,
            BLOCK,
            LANE,
            True,
        )


@triton.jit
def _silenced_ranges(
    indptr, indices, graph_rows, row, rows, begin_class, steps, LABELS: tl.constexpr
):
    """Return _silenced_range of both labels; of one twice where there is one."""
    slot_a, end_a = _silenced_range(indptr, indices, graph_rows, row, begin_class, steps)
    slot_b, end_b = slot_a, end_a
    if LABELS == 2:
        slot_b, end_b = _silenced_range(indptr, indices, graph_rows, rows + row, begin_class, steps)
    return slot_a, end_a, slot_b, end_b


@triton.jit
def long_rows(
    logits,
    stride,
    out,
    out_stride,
    log_prior,
    labels,
    shares,
    smoothing,
    graph_rows,
    indptr,
    indices,
    blocks,
    split,
    log_sums,
    label_logits,
    logit_sums,
    best_logits,
    bests,
    rows,
    classes,
    num_predicted,
    log_silence,
    label_smoothing,
    LABELS: tl.constexpr,
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Write the terms and the gradient of rows of several blocks, one program each.

    The second time they come from the cache.
    """
    stride, out_stride = stride * ALIGNED, out_stride * ALIGNED
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    for which in tl.static_range(LABELS):
        _store_label_logit(logits, log_prior, labels, label_logits, which * rows + row, classes, 0)
    slot_a, end_a, slot_b, end_b = 0, 0, 0, 0
    if indices is not None:  # column 0 is class 0: nothing has to be searched
        slot_a, end_a, slot_b, end_b = _silenced_ranges(
            indptr, indices, graph_rows, row, rows, 0, 0, LABELS
        )
    log_sum_a, log_sum_b = _scan(
        logits,
        log_prior,
        labels,
        smoothing,
        blocks,
        split,
        indices,
        slot_a,
        end_a,
        slot_b,
        end_b,
        log_sums,
        logit_sums,
        best_logits,
        bests,
        tl.program_id(1),
        row,
        rows,
        0,
        classes,
        0,
        num_predicted,
        log_silence,
        LABELS,
        BLOCK,
        LANE,
    )
    # Where out is logits, every warp must have read the labels' logits before any warp writes.
    tl.debug_barrier()
    _write_gradient(
        logits,
        out + row.to(tl.int64) * out_stride,
        log_prior,
        labels,
        shares,
        smoothing,
        blocks,
        split,
        indices,
        slot_a,
        end_a,
        slot_b,
        end_b,
        log_sum_a,
        log_sum_b,
        row,
        rows,
        0,
        classes,
        0,
        log_silence,
        label_smoothing,
        LABELS,
        BLOCK,
        LANE,
    )


@triton.jit
def part_terms(
    logits,
    stride,
    log_prior,
    labels,
    smoothing,
    graph_rows,
    indptr,
    indices,
    blocks,
    split,
    log_sums,
    label_logits,
    logit_sums,
    best_logits,
    bests,  # the first, third, fourth and fifth once per part
    rows,
    classes,
    first,
    span,
    num_predicted,
    log_silence,
    steps,
    LABELS: tl.constexpr,
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Write the terms of a part of each row: `span` columns of a tile.

    Its column 0 is class `first`.
    """
    stride = stride * ALIGNED
    row, part = tl.program_id(0), tl.program_id(1)
    logits += row.to(tl.int64) * stride
    begin = part * span
    if part == 0:
        for which in tl.static_range(LABELS):
            _store_label_logit(
                logits, log_prior, labels, label_logits, which * rows + row, classes, first
            )
    slot_a, end_a, slot_b, end_b = 0, 0, 0, 0
    if indices is not None:
        slot_a, end_a, slot_b, end_b = _silenced_ranges(
            indptr, indices, graph_rows, row, rows, first + begin, steps, LABELS
        )
    _scan(
        logits,
        log_prior,
        labels,
        smoothing,
        blocks,
        split,
        indices,
        slot_a,
        end_a,
        slot_b,
        end_b,
        log_sums,
        logit_sums,
        best_logits,
        bests,
        part,
        row,
        rows,
        begin,
        tl.minimum(begin + span, classes),
        first,
        num_predicted,
        log_silence,
        LABELS,
        BLOCK,
        LANE,
    )


@triton.jit
def part_gradient(
    logits,
    stride,
    out,
    out_stride,
    log_prior,
    labels,
    shares,
    smoothing,
    graph_rows,
    indptr,
    indices,
    blocks,
    split,
    log_sums,
    rows,
    classes,
    first,
    span,
    log_silence,
    label_smoothing,
    steps,
    LABELS: tl.constexpr,
    BLOCK: tl.constexpr,
    LANE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Write the gradient of a part of each row; log_sums (L, n) are over all classes."""
    stride, out_stride = stride * ALIGNED, out_stride * ALIGNED
    row = tl.program_id(0)
    begin = tl.program_id(1) * span
    log_sum_a = tl.load(log_sums + row)
    log_sum_b = log_sum_a
    if LABELS == 2:
        log_sum_b = tl.load(log_sums + rows + row)
    slot_a, end_a, slot_b, end_b = 0, 0, 0, 0
    if indices is not None:
        slot_a, end_a, slot_b, end_b = _silenced_ranges(
            indptr, indices, graph_rows, row, rows, first + begin, steps, LABELS
        )
    _write_gradient(
        logits + row.to(tl.int64) * stride,
        out + row.to(tl.int64) * out_stride,
        log_prior,
        labels,
        shares,
        smoothing,
        blocks,
        split,
        indices,
        slot_a,
        end_a,
        slot_b,
        end_b,
        log_sum_a,
        log_sum_b,
        row,
        rows,
        begin,
        tl.minimum(begin + span, classes),
        first,
        log_silence,
        label_smoothing,
        LABELS,
        BLOCK,
        LANE,
    )


@triton.jit
def scale_in_place(values, scale, count, BLOCK: tl.constexpr):
    """Multiply values (count,) by scale, a tensor of one element; where that is 1, do nothing."""
    factor = tl.load(scale).to(tl.float32)
    if factor != 1.0:
        place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        scaled = tl.load(values + place, mask=place < count).to(tl.float32) * factor
        tl.store(values + place, scaled.to(values.dtype.element_ty), mask=place < count)
