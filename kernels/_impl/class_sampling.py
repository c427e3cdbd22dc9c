"""Sampled negatives for the class-parallel loss.

They are all that a batch must see of a shard, and some of its auxiliaries.

After Partial FC (arXiv 2203.15565), which samples all classes but the batch's own. Here targets are
few and always in, and so is what the batch's labels silence. Two things differ: each sampled
auxiliary stands for those that were not drawn, and all sizes are known before the labels are, so
that no device has to be waited for.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastlt_kernels._impl.rows import Rows
from fastlt_kernels._impl.shards import length, shard_of
from fastlt_kernels.graph import ClassGraph, padded_neighbours

BEYOND = torch.iinfo(
    torch.int32
).max  # above every position, and where the kernels end a row themselves


class Sample(NamedTuple):
    """The classes of a sample: k of the c classes of a shard."""

    classes: Tensor  # (k,) int64, ascending, counted from the shard's first
    positions: Tensor  # (c,) int64, where a class is in `classes`; -1: not drawn
    correction: (
        Tensor  # (k,), added to a drawn class's logit in the sum: log of how many it stands for
    )


def sample_size(shard: slice, graph: ClassGraph, sample_rate: float, labels: int) -> int:
    """Return k for a batch with that many labels.

    It is what they may force and the sampled share, and so one at least beyond the forced.
    """
    targets = _targets(shard, graph)
    auxiliaries = length(shard) - targets
    # A target label forces its neighbours, an auxiliary one itself, its neighbours being targets.
    forced = min(auxiliaries, labels * max(1, graph.max_degree) + 1)
    return targets + max(math.ceil(sample_rate * auxiliaries), forced)


def sampled_classes(
    num_classes: int, world: int, graph: ClassGraph, sample_rate: float, labels: int
) -> int:
    """Return how many classes all ranks draw together."""
    return sum(
        sample_size(shard_of(num_classes, rank, world), graph, sample_rate, labels)
        for rank in range(world)
    )


def draw(
    labels: Tensor,
    graph: ClassGraph,
    shard: slice,
    sample_rate: float,
    generator: torch.Generator | None,
    dtype: torch.dtype,
) -> Sample:
    """Return the sample for the labels (L, N) of all ranks.

    Forced: the targets, the labels and their neighbours; the rest uniformly.
    """
    size = sample_size(shard, graph, sample_rate, labels.numel())
    forced = _forced(labels, graph, shard)
    scores = torch.rand(length(shard), device=labels.device, generator=generator)
    classes = scores.masked_fill_(forced, 2.0).topk(size, sorted=False).indices.sort().values
    positions = torch.full_like(forced, -1, dtype=torch.int64)
    positions[classes] = torch.arange(size, device=labels.device)
    number = forced.sum().to(dtype)
    stands_for = torch.log((len(forced) - number) / (size - number))
    return Sample(
        classes, positions, torch.where(forced[classes], torch.zeros_like(stands_for), stands_for)
    )


def rows_in_sample(rows: Rows, sample: Sample, graph: ClassGraph, shard: slice) -> Rows:
    """Return the rows with positions in the sample for class ids.

    A class that is not there is outside of every tile.
    """
    prior = sample.correction
    if rows.log_prior is not None:
        prior = prior + rows.log_prior[shard][sample.classes]
    # The targets are all in the sample, and first.
    predicted = min(max(rows.num_predicted - shard.start, 0), _targets(shard, graph))
    rows = rows._replace(
        labels=_positions(rows.labels, sample, shard, -1), log_prior=prior, num_predicted=predicted
    )
    if rows.graph_rows is None or rows.indptr is None or rows.indices is None:
        return rows
    ids, real = padded_neighbours(
        rows.indptr, rows.indices, rows.max_degree, rows.graph_rows.flatten()
    )
    silenced = _positions(ids, sample, shard, BEYOND).masked_fill_(~real, BEYOND).sort(dim=1).values
    each = torch.arange(len(silenced) + 1, device=ids.device)
    return rows._replace(
        graph_rows=each[:-1].view(rows.labels.shape),
        indptr=each * rows.max_degree,
        indices=silenced.flatten(),
        split=_targets(shard, graph),
    )


def _targets(shard: slice, graph: ClassGraph) -> int:
    """Return how many of the shard's classes are targets; they are its first."""
    return min(max(graph.num_targets - shard.start, 0), length(shard))


def _forced(labels: Tensor, graph: ClassGraph, shard: slice) -> Tensor:
    """Return which classes the labels force into the sample, (c,) bool."""
    # padded with the label
    ids, _ = padded_neighbours(graph.indptr, graph.indices, graph.max_degree, labels.flatten())
    local = torch.cat([labels.flatten(), ids.flatten()]) - shard.start
    count = length(shard)
    # the last is for other shards' classes
    forced = torch.zeros(count + 1, dtype=torch.bool, device=labels.device)
    forced[torch.where((local >= 0) & (local < count), local, count)] = True
    forced[: _targets(shard, graph)] = True
    return forced[:count]


def _positions(ids: Tensor, sample: Sample, shard: slice, absent: int) -> Tensor:
    if length(shard) == 0:
        return torch.full_like(ids, absent)
    local = ids - shard.start
    inside = (local >= 0) & (local < length(shard))
    found = sample.positions[local.clamp(0, length(shard) - 1)]
    return torch.where(inside & (found >= 0), found, absent)
