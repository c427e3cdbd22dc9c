"""The terms of a tile of logits, and how those of several tiles are put together.

A tile is some rows by some neighbouring classes: all of them, or a slice of a million, or the shard
of one rank. Its terms are small. Merged over all tiles of a row they give the loss, and the log-
sum-exp that each tile needs to turn its logits into their gradient. `torch_rows` and `triton_rows`
compute them, with the same three functions:

    row_terms(logits, first, rows)                       what the tile says
    row_gradient(logits, first, rows, log_sum, out)      d loss / d logits, given log_sum
    row_loss_and_gradient(logits, rows, out)             both, where the tile holds all classes
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fastlt_kernels.graph import ClassGraph


class Rows(NamedTuple):
    """All that the loss of n rows depends on beside their logits; L = 1 or 2 labels a row."""

    labels: Tensor  # (L, n) int64
    shares: Tensor  # (L, n) fp32 or fp64, what each label's loss counts
    log_prior: Tensor | None  # (C,) as shares
    smoothing: Tensor | None  # (L, n) as shares, label smoothing's mass on each unsilenced class
    # (L, n) int64, the row of the CSR matrix that holds the silenced classes, ascending
    graph_rows: Tensor | None
    indptr: Tensor | None
    indices: Tensor | None
    max_degree: int
    silence: float
    label_smoothing: float
    # (L, n) int64, blocks of classes that each label silences, its own class apart: 1, the classes
    # below `split`, 2, those from there on, or 3; a listed class of such a block is heard
    blocks: Tensor | None
    split: int
    # the prediction is the best of the classes 0..num_predicted - 1 by logit; 0: none is made
    num_predicted: int

    def part(self, rows: slice) -> Rows:
        """Return the same for some of the rows."""
        return self._replace(
            labels=self.labels[:, rows],
            shares=self.shares[:, rows],
            smoothing=None if self.smoothing is None else self.smoothing[:, rows],
            graph_rows=None if self.graph_rows is None else self.graph_rows[:, rows],
            blocks=None if self.blocks is None else self.blocks[:, rows],
        )


class Terms(NamedTuple):
    """The terms of n rows over the classes of a tile, with silencing and prior."""

    log_sum: Tensor  # (L, n), log-sum-exp over the tile's classes
    label_logit: Tensor  # (L, n), logit plus prior of the label; -inf where it is in another tile
    # (L, n), sum of logits plus prior over the unsilenced classes; only where labels are smoothed
    logit_sum: Tensor | None
    best_logit: Tensor | None  # (n,), of the predicted classes; -inf where none is in the tile
    best: Tensor | None  # (n,) int64, which class that is


def describe_rows(
    labels: Tensor,
    shares: Tensor,
    log_prior: Tensor | None,
    graph: ClassGraph | None,
    num_classes: int,
    silence: float,
    label_smoothing: float,
    num_predicted: int = 0,
) -> Rows:
    """Return the rows of labels and shares (L, n); silencing that changes nothing is left out."""
    silencing = graph if graph is not None and graph.silences and silence < 1 else None
    # Where values are not looked at, a label out of range gives an infinite loss, and no reading
    # outside of the graph.
    graph_rows = None if silencing is None else labels.clamp(0, silencing.num_classes - 1)
    blocks = None if silencing is None or graph_rows is None else silencing.blocks_of(graph_rows)
    smoothing = None
    if label_smoothing > 0:
        unsilenced = torch.full_like(shares, num_classes)
        if silencing is not None and graph_rows is not None:
            unsilenced -= silencing.silenced_counts(graph_rows)
        smoothing = label_smoothing / unsilenced
    return Rows(
        labels,
        shares,
        None if log_prior is None else log_prior.detach().to(shares.dtype),
        smoothing,
        graph_rows,
        None if silencing is None else silencing.indptr,
        None if silencing is None else silencing.indices,
        0 if silencing is None else silencing.max_degree,
        silence,
        label_smoothing,
        blocks,
        0 if blocks is None or silencing is None else silencing.num_targets,
        num_predicted,
    )


def merge_terms(tiles: list[Terms]) -> Terms:
    """Return the terms of all the tiles of the same rows as those of one tile.

    Of equal best logits the first tile's counts.
    """
    if len(tiles) == 1:
        return tiles[0]
    best_logit = best = None
    if tiles[0].best_logit is not None:
        best_logit, tile = _stack([t.best_logit for t in tiles]).max(dim=0)
        best = _stack([t.best for t in tiles]).gather(0, tile[None])[0]
    return Terms(
        torch.logsumexp(_stack([t.log_sum for t in tiles]), dim=0),
        _stack([t.label_logit for t in tiles]).amax(dim=0),
        None if tiles[0].logit_sum is None else _stack([t.logit_sum for t in tiles]).sum(dim=0),
        best_logit,
        best,
    )


def join_terms(blocks: list[Terms]) -> Terms:
    """Return the terms of blocks of rows, over the same classes, as those of all the rows."""
    if len(blocks) == 1:
        return blocks[0]
    whole = [
        torch.cat(parts, dim=-1) if parts[0] is not None else None
        for parts in zip(*blocks, strict=True)
    ]
    log_sum, label_logit, logit_sum, best_logit, best = whole
    assert log_sum is not None and label_logit is not None
    return Terms(log_sum, label_logit, logit_sum, best_logit, best)


def _stack(parts: list[Tensor | None]) -> Tensor:
    return torch.stack([part for part in parts if part is not None])


def losses_of(terms: Terms, rows: Rows) -> Tensor:
    """Return the losses (n,): sums over labels of share * (log_sum - expected logit)."""
    expected = (1 - rows.label_smoothing) * terms.label_logit
    if rows.smoothing is not None and terms.logit_sum is not None:
        expected = expected + rows.smoothing * terms.logit_sum
    losses = rows.shares * (terms.log_sum - expected)
    # A label of no share has no say, whatever its logit: 0 * inf is not 0.
    return torch.where(rows.shares == 0, torch.zeros_like(losses), losses).sum(dim=0)


def implementation(backend: str) -> ModuleType:
    """Return the module with the three functions, "torch" or "triton"."""
    if backend == "triton":
        from fastlt_kernels._impl import triton_rows

        return triton_rows
    from fastlt_kernels._impl import torch_rows

    return torch_rows
