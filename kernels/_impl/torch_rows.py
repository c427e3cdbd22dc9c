"""The terms and the gradient of a tile of logits, in torch.

They are made in place, a few rows at a time, so that these stay in cache.

torch's softmax makes one exponential per element, and its largest value tells the log-sum-exp. The
columns that any label of the row silences (a few) are taken out of the tile and handled beside it.
So two labels with different silenced sets share one pass, each with its own log-sum-exp, and
nothing is ever subtracted from a sum. Where labels silence whole blocks of classes, each block has
a softmax of its own, and what is handled beside it are the label and the listed classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlt_kernels._impl.rows import Rows, Terms, join_terms
from fastlt_kernels.graph import padded_neighbours

# off the CPU there is no such cache, and each block is some twenty launches
DEVICE_BLOCK_BYTES = 2**26
# measured: 0.5 to 2 MiB of rows at a time are equal, smaller blocks cost calls, larger ones cache
BLOCK_BYTES = 2**20


def row_terms(logits: Tensor, first: int, rows: Rows) -> Terms:
    """Return the terms of logits (n, c) of the classes first..first + c - 1, left as they are."""
    silenced = silenced_columns(rows, first, logits.shape[1])
    terms = []
    for block, base, room in _blocks(logits, rows, None):
        best = _best(base, first, rows.num_predicted)
        part, part_silenced = rows.part(block), silenced.part(block)
        terms.append(
            _softmax_(
                _add_prior_(base, first, rows), room, first, part, part_silenced
            ).terms._replace(**best)
        )
    return join_terms(terms)


def row_gradient(logits: Tensor, first: int, rows: Rows, log_sum: Tensor, out: Tensor) -> None:
    """Write the gradient to out (n, c), which may be logits; log_sum (L, n) is over all classes."""
    silenced = silenced_columns(rows, first, logits.shape[1])
    for block, base, room in _blocks(logits, rows, out):
        part, part_silenced = rows.part(block), silenced.part(block)
        shared = _softmax_(_add_prior_(base, first, rows), room, first, part, part_silenced)
        _write_gradient(base, first, part, part_silenced, shared, log_sum[:, block])
        _store(out[block], base)


def row_loss_and_gradient(logits: Tensor, rows: Rows, out: Tensor) -> Terms:
    """Return the terms of logits (n, C) over all classes; write the gradient to out (n, C).

    out may be logits.
    """
    silenced = silenced_columns(rows, 0, logits.shape[1])
    terms = []
    for block, base, room in _blocks(logits, rows, out):
        best = _best(base, 0, rows.num_predicted)
        part, part_silenced = rows.part(block), silenced.part(block)
        shared = _softmax_(_add_prior_(base, 0, rows), room, 0, part, part_silenced)
        terms.append(shared.terms._replace(**best))
        _write_gradient(base, 0, part, part_silenced, shared, shared.terms.log_sum)
        _store(out[block], base)
    return join_terms(terms)


class SilencedColumns(NamedTuple):
    """The columns of the tile that the labels list, and that some of them silence.

    They are a union in M = L * max_degree slots per row; where blocks are silenced, the labels
    themselves are in it, in M = L * (max_degree + 1) slots.
    """

    columns: Tensor  # (n, M) int64
    real: Tensor  # (n, M) bool; the other slots are padding, or repeat an earlier slot's column
    by_label: Tensor  # (L, n, M) bool, whether this label silences the column of this real slot

    def part(self, rows: slice) -> SilencedColumns:
        """Return the same for some of the rows."""
        return SilencedColumns(self.columns[rows], self.real[rows], self.by_label[:, rows])


def silenced_columns(rows: Rows, first: int, columns: int) -> SilencedColumns:
    """Return the silenced columns among some classes, counted from `first`.

    M = 0 where nothing is silenced.
    """
    if rows.blocks is not None:
        return _inside(_listed_and_labels(rows), first, columns)
    if rows.graph_rows is None or rows.indptr is None or rows.indices is None:
        none = rows.labels.new_empty(rows.labels.shape[1], 0)
        return SilencedColumns(none, none.bool(), none.bool().expand(rows.labels.shape[0], -1, -1))
    ids, real = padded_neighbours(rows.indptr, rows.indices, rows.max_degree, rows.graph_rows[0])
    if rows.labels.shape[0] == 1:
        return _inside(SilencedColumns(ids, real, real[None]), first, columns)
    ids_b, real_b = padded_neighbours(
        rows.indptr, rows.indices, rows.max_degree, rows.graph_rows[1]
    )
    in_b = _contained(ids, real, ids_b, real_b)
    fresh_b = real_b & ~_contained(ids_b, real_b, ids, real)
    by_first = torch.cat([real, torch.zeros_like(real)], dim=1)
    by_second = torch.cat([in_b, fresh_b], dim=1)
    union = SilencedColumns(
        torch.cat([ids, ids_b], dim=1),
        torch.cat([real, fresh_b], dim=1),
        torch.stack([by_first, by_second]),
    )
    return _inside(union, first, columns)


def _listed_and_labels(rows: Rows) -> SilencedColumns:
    """Return the listed classes of all labels and the labels, with what silences them."""
    assert rows.graph_rows is not None and rows.indptr is not None and rows.indices is not None
    lists = [
        padded_neighbours(rows.indptr, rows.indices, rows.max_degree, labels)
        for labels in rows.graph_rows
    ]
    beyond = torch.iinfo(torch.int64).max
    # not graph_rows: in a sample of classes these are no labels, and a label may be absent
    own = rows.labels.masked_fill(rows.labels < 0, beyond)
    ids = torch.cat([*(i.masked_fill(~real, beyond) for i, real in lists), own.T], 1)
    ids = ids.sort(dim=1).values
    real = ids < beyond
    real[:, 1:] &= ids[:, 1:] != ids[:, :-1]
    block = torch.where(ids < rows.split, 1, 2)
    assert rows.blocks is not None
    lowered = (rows.blocks[..., None] & block).bool()
    listed = torch.stack([_contained(ids, real, *one) for one in lists])
    is_own = ids == own[..., None]
    return SilencedColumns(ids, real, real & ~is_own & (lowered ^ listed))


class Block(NamedTuple):
    """Neighbouring columns of a tile that a label silences all, or none of them."""

    columns: slice
    # (L, n) bool, whether the label silences them; None: no label does, and the block is the tile
    lowered: Tensor | None

    def of(self, tile: Tensor) -> Tensor:
        """Return the block's columns of a tile (n, c)."""
        return tile if self.lowered is None else tile[:, self.columns]


def _column_blocks(rows: Rows, first: int, columns: int) -> list[Block]:
    """Return the blocks of a tile of the classes first..first + columns - 1."""
    if rows.blocks is None:
        return [Block(slice(0, columns), None)]
    border = min(max(rows.split - first, 0), columns)
    return [
        Block(slice(0, border), (rows.blocks & 1) != 0),
        Block(slice(border, columns), (rows.blocks & 2) != 0),
    ]


def _inside(silenced: SilencedColumns, first: int, columns: int) -> SilencedColumns:
    local = silenced.columns - first
    inside = (local >= 0) & (local < columns)
    return SilencedColumns(
        local.clamp_(0, columns - 1), silenced.real & inside, silenced.by_label & inside
    )


class Shared(NamedTuple):
    """The values of the first pass that the gradient needs."""

    terms: Terms
    # (n, c), over the columns of each block that are not handled beside it; 0 at those
    softmax: Tensor
    log_rests: list[Tensor]  # of each block (n,) or (L, n), log-sum-exp over those columns
    # (L, n, M), logits plus prior of the silenced columns, silenced where this label does
    silenced_values: Tensor


def _softmax_(
    base: Tensor, room: Tensor, first: int, rows: Rows, silenced: SilencedColumns
) -> Shared:
    """Write the softmax of base (n, c), logits plus prior, to room (n, c).

    base loses its silenced columns. Return what the gradient needs.
    """
    columns, real, by_label = silenced
    label_logit = _label_logit(base, first, rows.labels)
    values = base.gather(1, columns).masked_fill_(~real, -torch.inf)
    blocks = _column_blocks(rows, first, base.shape[1])
    logit_sum = None
    if rows.smoothing is not None:
        logit_sum = _unsilenced_sum_(base, values, silenced, blocks)

    # Adding, not writing: slots that are not real add zero, wherever they point.
    base.scatter_add_(1, columns, torch.where(real, -torch.inf, torch.zeros_like(values)))
    log_silence = math.log(rows.silence) if rows.silence > 0 else -math.inf
    log_rests = [
        _lowered(_softmax_of_block_(block.of(base), block.of(room)), block.lowered, log_silence)
        for block in blocks
    ]
    silenced_values = torch.where(by_label, values + log_silence, values)
    rests = [log_rest.expand(rows.labels.shape)[..., None] for log_rest in log_rests]
    log_sum = torch.logsumexp(torch.cat([*rests, silenced_values], dim=2), dim=2)
    return Shared(
        Terms(log_sum, label_logit, logit_sum, None, None), room, log_rests, silenced_values
    )


def _softmax_of_block_(base: Tensor, room: Tensor) -> Tensor:
    """Write the softmax of base (n, c) to room (n, c); return the log-sum-exp (n,)."""
    if base.shape[1] == 0:
        return base.new_full(base.shape[:1], -torch.inf)
    highest = base.amax(dim=1)
    torch.softmax(base, dim=1, out=room)
    # The largest probability is one over the sum of the exponentials that highest was taken off.
    is_empty = highest == -torch.inf  # where every class is handled beside it
    log_rest = highest.sub(room.amax(dim=1).log_()).masked_fill_(is_empty, -torch.inf)
    _zero_rows_(room, is_empty)
    return log_rest


def _lowered(log_rest: Tensor, lowered: Tensor | None, log_silence: float) -> Tensor:
    """Return log-sum-exps (n,) as each label has them, (L, n) where one silences the block."""
    return log_rest if lowered is None else torch.where(lowered, log_rest + log_silence, log_rest)


def _write_gradient(
    base: Tensor, first: int, rows: Rows, silenced: SilencedColumns, shared: Shared, log_sum: Tensor
) -> None:
    """Turn base (n, c) into the sum over labels of share * (softmax - target mass)."""
    columns, real, by_label = silenced
    shares = rows.shares
    # What has no share has no say, whatever its logits: 0 * inf is not 0.
    blocks = _column_blocks(rows, first, base.shape[1])
    for block, log_rest in zip(blocks, shared.log_rests, strict=True):
        factor = (shares * torch.exp(log_rest - log_sum)).masked_fill_(shares == 0, 0).sum(dim=0)
        torch.mul(block.of(shared.softmax), factor[:, None], out=block.of(base))
    _zero_rows_(base, (shares == 0).all(dim=0))
    probabilities = torch.exp(shared.silenced_values - log_sum[..., None]).masked_fill_(
        (shares == 0)[..., None], 0
    )
    if rows.smoothing is not None:
        taken = torch.zeros_like(by_label)  # by which labels from none of a slot's block
        for block in blocks:
            spread = shares * rows.smoothing
            if block.lowered is not None:
                spread = spread.masked_fill(block.lowered, 0)
                start, stop = block.columns.start, block.columns.stop
                taken |= real & (columns >= start) & (columns < stop) & block.lowered[..., None]
            block.of(base).sub_(spread.sum(dim=0)[:, None])
        # gives back what a silenced class must not lose, and takes it from one that is heard
        probabilities = probabilities + rows.smoothing[..., None] * (by_label.int() - taken.int())
    base.scatter_add_(1, columns, (shares[..., None] * probabilities).sum(dim=0))
    column, inside = _label_columns(first, rows.labels, base.shape[1])
    base.scatter_add_(1, column.T, ((rows.label_smoothing - 1) * shares * inside).T)


def _zero_rows_(base: Tensor, rows: Tensor) -> None:
    """Zero base (n, c) where rows (n,) bool are.

    On a CPU a look at them costs less than a pass over all.
    """
    if not base.is_cpu:
        base.masked_fill_(rows[:, None], 0)
    elif rows.any():
        base[rows] = 0


def _label_columns(first: int, labels: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Return the column of each label (L, n), and whether it is in the tile."""
    local = labels - first
    return local.clamp(0, columns - 1), (local >= 0) & (local < columns)


def _label_logit(base: Tensor, first: int, labels: Tensor) -> Tensor:
    column, inside = _label_columns(first, labels, base.shape[1])
    return base.gather(1, column.T).T.masked_fill(~inside, -torch.inf)


def _unsilenced_sum_(
    base: Tensor, values: Tensor, silenced: SilencedColumns, blocks: list[Block]
) -> Tensor:
    """Return the sum of base over what label L does not silence, (L, n).

    It leaves base zero at the union of silenced columns.
    """
    columns, real, by_label = silenced
    # Up and down, which leaves alone what slots that are not real point at, and minds no infinity.
    infinite = torch.full_like(values, torch.inf)
    base.scatter_reduce_(1, columns, torch.where(real, infinite, -infinite), "amax")
    base.scatter_reduce_(1, columns, infinite.masked_fill(real, 0), "amin")
    heard = torch.where(real & ~by_label, values, torch.zeros_like(values)).sum(dim=2)
    for block in blocks:
        total = block.of(base).sum(dim=1)
        lowered = block.lowered
        heard = heard + (total if lowered is None else total.masked_fill(lowered, 0))
    return heard


def _contained(columns: Tensor, real: Tensor, others: Tensor, others_real: Tensor) -> Tensor:
    """Return whether a real column is among the real ones of `others`, (n, K) bool.

    `others` ascend in each row.
    """
    if others.shape[1] == 0:
        return torch.zeros_like(real)
    haystack = others.masked_fill(~others_real, torch.iinfo(others.dtype).max)
    slot = torch.searchsorted(haystack, columns).clamp_(max=others.shape[1] - 1)
    return real & (haystack.gather(1, slot) == columns)


def _blocks(
    logits: Tensor, rows: Rows, out: Tensor | None
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield a few rows at a time in the dtype of the sums, and room for as many.

    They are in `out` where that is as wide, else in a copy.
    """
    count, columns = logits.shape
    dtype = rows.shares.dtype
    fitting = (BLOCK_BYTES if logits.is_cpu else DEVICE_BLOCK_BYTES) // max(
        1, columns * dtype.itemsize
    )
    # room must be little in itself, or beside the tile
    step = max(1, fitting // 4, min(fitting, count // 8))
    in_out = out is not None and out.dtype == dtype
    room = logits.new_empty(1 if in_out else 2, min(step, count), columns, dtype=dtype)
    for start in range(0, max(count, 1), step):
        block = slice(start, min(start + step, count))
        base = out[block] if in_out and out is not None else room[1, : block.stop - start]
        base = base if base.data_ptr() == logits[block].data_ptr() else base.copy_(logits[block])
        yield block, base, room[0, : block.stop - start]


def _store(out: Tensor, base: Tensor) -> None:
    if out.data_ptr() != base.data_ptr():
        out.copy_(base)


def _add_prior_(base: Tensor, first: int, rows: Rows) -> Tensor:
    return (
        base if rows.log_prior is None else base.add_(rows.log_prior[first : first + base.shape[1]])
    )


def _best(logits: Tensor, first: int, num_predicted: int) -> dict[str, Any]:
    """Return the best of the predicted classes among those of the tile."""
    if num_predicted == 0:
        return {}
    count = min(max(num_predicted - first, 0), logits.shape[1])
    if count == 0:
        none = logits.new_full(logits.shape[:1], -torch.inf)
        return {"best_logit": none, "best": torch.zeros_like(none, dtype=torch.int64)}
    best_logit, best = logits[:, :count].max(dim=1)
    return {"best_logit": best_logit, "best": best + first}
