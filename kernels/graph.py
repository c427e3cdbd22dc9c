"""The class graph: the auxiliary classes of each target class, as a sparse relation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

Direction: TypeAlias = Literal["both", "target_rows", "aux_rows"]
TARGETS, AUXILIARIES = 1, 2  # blocks of classes, as bits


class Mask(NamedTuple):
    """A rule of which classes a label silences, of the release's family.

    direction: the rows that hold the pairs; None: no pair is silenced. target_blocks,
    auxiliary_blocks: all the classes, but for the label's own, that rows of targets and of
    auxiliaries silence: TARGETS, AUXILIARIES, both added, or 0. In a silenced block it is the pairs
    that are heard.
    """

    direction: Direction | None
    target_blocks: int = 0
    auxiliary_blocks: int = 0
    few_shot: bool = False  # of the pairs, those of targets with few images alone


MASKS = {
    "none": Mask(None),
    "both": Mask("both"),
    "target-rows": Mask("target_rows"),
    "auxiliary-rows": Mask("aux_rows"),
    "few-shot": Mask("both", few_shot=True),
    "few-shot-target-rows": Mask("target_rows", few_shot=True),
    "few-shot-auxiliary-rows": Mask("aux_rows", few_shot=True),
    "both-back": Mask("both", auxiliary_blocks=AUXILIARIES),
    "auxiliary-rows-back": Mask("aux_rows", auxiliary_blocks=AUXILIARIES),
    "auxiliary-rows-alone": Mask(None, auxiliary_blocks=TARGETS + AUXILIARIES),
    "normal": Mask("target_rows", target_blocks=AUXILIARIES, auxiliary_blocks=AUXILIARIES),
}


@dataclass(frozen=True, eq=False)
class ClassGraph:
    """The silenced set S(y) of every class, as the rows of a CSR matrix over all C classes.

    It is made by `from_pairs`.

    Row y of a target holds the auxiliaries added for it; row y of an auxiliary holds the targets it
    was added for (an auxiliary may have several). Siblings are not linked, and no class is in its
    own row.

    Beside these pairs, rows of targets and of auxiliaries may silence whole blocks of classes: see
    `Mask` and `masked`.

    indptr (C + 1,) int64 and indices (nnz,) int64, ascending in each row. The counts are Python
    integers, so that a padded gather has a static shape. `max_degree` is the length of the longest
    row.
    """

    indptr: Tensor
    indices: Tensor
    num_targets: int
    num_classes: int
    num_pairs: int
    max_degree: int
    target_blocks: int = 0
    auxiliary_blocks: int = 0

    @staticmethod
    def from_pairs(
        num_targets: int, num_classes: int, pairs: Tensor | np.ndarray | Sequence[Sequence[int]]
    ) -> ClassGraph:
        """Return the graph of pairs (P, 2) integers: target id in 0..T-1, auxiliary id in T..C-1.

        The relation is many-to-many; duplicates are merged.

        Raises ValueError, naming the argument, for a wrong shape or dtype or an id out of range.
        """
        _check_counts(num_targets, num_classes)
        return _from_checked_pairs(
            num_targets, num_classes, _as_pairs(num_targets, num_classes, pairs), "both"
        )

    def to(self, device: torch.device | str) -> ClassGraph:
        """Return the same graph on another device."""
        return replace(self, indptr=self.indptr.to(device), indices=self.indices.to(device))

    @property
    def silences(self) -> bool:
        """Whether any label silences any class."""
        return self.max_degree > 0 or self.silences_blocks

    @property
    def silences_blocks(self) -> bool:
        """Whether any label silences a whole block of classes."""
        return self.target_blocks + self.auxiliary_blocks > 0

    def blocks_of(self, labels: Tensor) -> Tensor | None:
        """Return the blocks that labels int64 silence, of their shape; None where none does."""
        if not self.silences_blocks:
            return None
        blocks = torch.full_like(labels, self.auxiliary_blocks)
        return blocks.masked_fill_(labels < self.num_targets, self.target_blocks)

    def silenced_counts(self, labels: Tensor) -> Tensor:
        """Return how many classes labels int64 silence, int64, of their shape."""
        listed = self.indptr[labels + 1] - self.indptr[labels]
        blocks = self.blocks_of(labels)
        if blocks is None:
            return listed
        is_target = labels < self.num_targets
        targets = self.num_targets - is_target.long()
        auxiliaries = self.num_classes - self.num_targets - (~is_target).long()
        # a target lists auxiliaries, an auxiliary targets: in a silenced block they are heard
        in_block = (blocks & torch.where(is_target, AUXILIARIES, TARGETS)) != 0
        return (
            torch.where(in_block, -listed, listed)
            + targets * (blocks & TARGETS).clamp(max=1)
            + auxiliaries * (blocks & AUXILIARIES).clamp(max=1)
        )

    def silenced_by(self, labels: Tensor) -> Tensor:
        """Return which classes labels (N,) int64 silence, (N, C) bool."""
        columns, real = self.neighbours(labels)
        ids = torch.arange(self.num_classes, device=labels.device)
        none = torch.zeros(len(labels), self.num_classes, dtype=torch.bool, device=labels.device)
        mask = none.scatter(1, columns, real)
        blocks = self.blocks_of(labels)
        if blocks is not None:
            block = torch.where(ids < self.num_targets, TARGETS, AUXILIARIES)
            mask = mask ^ (blocks[:, None] & block).bool()
        return mask & (ids != labels[:, None])

    def masked(self, name: str, few_shot: Tensor | None = None) -> ClassGraph:
        """Return the pairs under a rule of `MASKS`.

        few_shot: (T,) bool, the targets with few images, for the rules that need them. Raises
        ValueError for other names, and without few_shot where it is needed.
        """
        if name not in MASKS:
            raise ValueError(f"mask must be one of {', '.join(MASKS)}, not {name!r}")
        mask = MASKS[name]
        if mask.few_shot and few_shot is None:
            raise ValueError(f"few_shot must be given for the mask {name!r}")
        pairs = self.pairs() if mask.direction else self.indptr.new_empty(0, 2)
        graph = _from_checked_pairs(
            self.num_targets, self.num_classes, pairs, mask.direction or "both"
        )
        if mask.few_shot and few_shot is not None:
            graph = graph.restricted(few_shot)
        return replace(
            graph, target_blocks=mask.target_blocks, auxiliary_blocks=mask.auxiliary_blocks
        )

    def pairs(self) -> Tensor:
        """Return the distinct (target, auxiliary) pairs in ascending order, (P, 2) int64."""
        # a target's id is the smaller one
        return torch.stack(_entries(self), dim=1).sort(dim=1).values.unique(dim=0)

    def directed(self, direction: Direction) -> ClassGraph:
        """Return the same pairs, silencing in all rows (`both`) or in those of one side.

        The sides are targets and auxiliaries.
        """
        if direction not in ("both", "target_rows", "aux_rows"):
            raise ValueError(
                f"direction must be 'both', 'target_rows' or 'aux_rows', not {direction!r}"
            )
        return _from_checked_pairs(self.num_targets, self.num_classes, self.pairs(), direction)

    def restricted(self, keep: Tensor) -> ClassGraph:
        """Return the pairs of targets where keep (T,) bool is True, in the same direction.

        It is the release's few-shot restriction.
        """
        if (
            not isinstance(keep, Tensor)
            or keep.shape != (self.num_targets,)
            or keep.dtype != torch.bool
        ):
            raise ValueError(
                f"keep must be a ({self.num_targets},) bool mask, got {_described(keep)}"
            )
        rows, columns = _entries(self)
        kept = keep.to(rows.device)[torch.minimum(rows, columns)]
        return _from_entries(self.num_targets, self.num_classes, rows[kept], columns[kept])

    def neighbours(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the silenced columns of labels (N,) int64, and whether each is real, both (N, K).

        Columns are int64, the latter (N, K) bool, and K = max_degree.

        Shorter rows are padded with the label itself, which is never in its own silenced set.
        """
        return padded_neighbours(self.indptr, self.indices, self.max_degree, labels)


def padded_neighbours(
    indptr: Tensor, indices: Tensor, max_degree: int, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Return `ClassGraph.neighbours` for the bare tensors of a graph."""
    slots = torch.arange(max_degree, device=labels.device)
    start = indptr[labels]
    real = slots < (indptr[labels + 1] - start)[:, None]
    if max_degree == 0:
        return labels[:, None].expand(real.shape), real
    columns = indices[(start[:, None] + slots).clamp(max=indices.shape[0] - 1)]
    return torch.where(real, columns, labels[:, None]), real


def _described(value: object) -> str:
    return (
        f"{tuple(value.shape)} {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
    )


def _check_counts(num_targets: int, num_classes: int) -> None:
    for name, value in (("num_targets", num_targets), ("num_classes", num_classes)):
        if not isinstance(value, int | np.integer) or isinstance(value, bool):
            raise ValueError(f"{name} must be an integer, got {type(value).__name__}")
    if num_targets < 1:
        raise ValueError(f"num_targets must be at least 1, got {num_targets}")
    if num_classes < num_targets:
        raise ValueError(
            f"num_classes must be at least num_targets = {num_targets}, got {num_classes}"
        )


def _as_pairs(
    num_targets: int, num_classes: int, pairs: Tensor | np.ndarray | Sequence[Sequence[int]]
) -> Tensor:
    """Return pairs (P, 2) int64, distinct and ascending."""
    try:
        table = torch.as_tensor(pairs)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"pairs must be a (P, 2) table of integers: {error}") from error
    if table.numel() == 0:
        return torch.empty(0, 2, dtype=torch.int64, device=table.device)
    if table.ndim != 2 or table.shape[1] != 2:
        raise ValueError(f"pairs must have shape (P, 2), got {tuple(table.shape)}")
    if table.is_floating_point() or table.is_complex() or table.dtype == torch.bool:
        raise ValueError(f"pairs must hold integers, got {table.dtype}")
    table = table.to(torch.int64)
    _check_ids(table[:, 0], 0, num_targets, "target")
    _check_ids(table[:, 1], num_targets, num_classes, "auxiliary")
    return table.unique(dim=0)


def _check_ids(ids: Tensor, low: int, high: int, kind: str) -> None:
    wrong = (ids < low) | (ids >= high)
    if wrong.any():
        row = int(wrong.nonzero()[0])
        allowed = f"{low}..{high - 1}" if high > low else "empty, as num_classes equals num_targets"
        raise ValueError(
            f"pairs: {kind} id {int(ids[row])} in row {row} is out of range ({allowed})"
        )


def _from_checked_pairs(
    num_targets: int, num_classes: int, pairs: Tensor, direction: Direction
) -> ClassGraph:
    target, auxiliary = pairs.unbind(1)
    ways = {
        "both": (torch.cat([target, auxiliary]), torch.cat([auxiliary, target])),
        "target_rows": (target, auxiliary),
        "aux_rows": (auxiliary, target),
    }
    return _from_entries(num_targets, num_classes, *ways[direction])


def _from_entries(num_targets: int, num_classes: int, rows: Tensor, columns: Tensor) -> ClassGraph:
    """Return the graph whose row rows[i] holds columns[i].

    The entries are distinct, in any order.
    """
    order = torch.argsort(rows * num_classes + columns)
    degrees = torch.bincount(rows, minlength=num_classes)
    indptr = torch.cat([degrees.new_zeros(1), degrees.cumsum(0)])
    # A symmetric graph holds each pair twice, a directed one once.
    lower, upper = torch.minimum(rows, columns), torch.maximum(rows, columns)
    num_pairs = int(torch.unique(lower * num_classes + upper).numel())
    return ClassGraph(
        indptr, columns[order], num_targets, num_classes, num_pairs, int(degrees.max())
    )


def _entries(graph: ClassGraph) -> tuple[Tensor, Tensor]:
    """Return row and column of every stored entry, each (nnz,) int64."""
    classes = torch.arange(graph.num_classes, device=graph.indptr.device)
    return torch.repeat_interleave(classes, graph.indptr.diff()), graph.indices
