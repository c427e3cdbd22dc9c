"""Which image comes when. Every engine takes the plan as it is, so engines agree, runs resume at any step and ranks never overlap.

An epoch is a pure function of (seed, epoch); its batches are cut from one global order, so the images of a step, seen as a
set over the ranks, do not depend on how many ranks there are (but for a last batch that the ranks cannot share equally).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fastlt.data.augment import Geometry, boxes_of
from fastlt.data.packed import Split
from fastlt.errors import UserError


@dataclass(frozen=True)
class Batch:
    """What one rank loads in one step. `boxes` are the parts of the upright images that fill the output (see augment.py)."""

    images: np.ndarray  # (n,) int64, indices into the split
    labels: np.ndarray  # (n,) int64
    boxes: np.ndarray  # (n, 4) int32: top, left, height, width; may reach over the edge, which is filled with black
    flips: np.ndarray  # (n,) bool


@dataclass(frozen=True)
class Sampling:
    """How often each class is seen in an epoch."""

    targets: str = "once"  # once: every stored target image once; class-balanced: every target class equally often
    budget: int = 50  # images per auxiliary class and epoch, whatever it stores; 0: none


@dataclass(frozen=True)
class Plan:
    """The training order. `batch` is the global batch; a rank gets every world-th image of it."""

    split: Split
    num_targets: int
    num_classes: int
    geometry: Geometry
    sampling: Sampling
    batch: int
    seed: int
    drop_last: bool = False
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.batch % self.world:
            raise UserError(f"data.batch={self.batch} cannot be shared equally by {self.world} ranks: choose a multiple of that")

    @cached_property
    def class_counts(self) -> np.ndarray:
        """Images of each of the C classes in every epoch, (C,) int64: the n_j of the prior."""
        stored = np.bincount(self.split.label, minlength=self.num_classes)
        targets = np.arange(self.num_classes) < self.num_targets
        if self.sampling.targets == "class-balanced":
            stored = np.where(targets & (stored > 0), self._balanced_budget(stored), stored)
        return np.where(targets | (stored == 0), stored, self.sampling.budget).astype(np.int64)

    def _balanced_budget(self, stored: np.ndarray) -> int:
        """As many target images an epoch as are stored, spread evenly over the classes."""
        targets = stored[: self.num_targets]
        return max(1, round(targets.sum() / max(1, np.count_nonzero(targets))))

    @cached_property
    def images_per_epoch(self) -> int:
        return int(self.class_counts.sum())

    @cached_property
    def steps_per_epoch(self) -> int:
        whole, rest = divmod(self.images_per_epoch, self.batch)
        return whole + (1 if rest >= self.world and not self.drop_last else 0)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of this rank from `first_step` on."""
        order = self.order(epoch)
        for step in range(first_step, self.steps_per_epoch):
            start, stop = step * self.batch, min((step + 1) * self.batch, len(order))
            stop = start + (stop - start) // self.world * self.world  # every rank gets equally many
            places = np.arange(start + self.rank, stop, self.world)
            yield self._batch(order[places], places, epoch)

    def order(self, epoch: int) -> np.ndarray:
        """Image indices of the whole epoch over all ranks, (images_per_epoch,) int64."""
        rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        images = draw_by_class(self.split.label, self.class_counts, rng)
        return rng.permutation(images)

    def _batch(self, images: np.ndarray, places: np.ndarray, epoch: int) -> Batch:
        boxes, flips = boxes_of(self.geometry, self.split.height[images], self.split.width[images], places, self.seed, epoch)
        return Batch(images, self.split.label[images].astype(np.int64), boxes, flips)


def draw_by_class(labels: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For each class c, counts[c] of its images: all of them as often as that goes, and a random part of them once more.

    labels (n,) int, counts (C,) int64; returns (counts.sum(),) int64 indices into labels, ordered by image.
    """
    stored = np.bincount(labels, minlength=len(counts))
    every, part = np.divmod(counts, np.maximum(stored, 1))
    shuffled = rng.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    rank_in_class = np.arange(len(labels)) - np.repeat(np.cumsum(stored) - stored, stored)
    repeats = np.empty(len(labels), dtype=np.int64)
    repeats[by_class] = every[labels[by_class]] + (rank_in_class < part[labels[by_class]])
    return np.repeat(np.arange(len(labels)), repeats)


def evaluation_batches(split: Split, geometry: Geometry, batch: int, rank: int = 0, world: int = 1) -> Iterator[Batch]:
    """Every image once, in stored order, every world-th to this rank; the last batch may be smaller."""
    mine = np.arange(rank, len(split), world)
    for start in range(0, len(mine), batch):
        images = mine[start : start + batch]
        boxes, flips = boxes_of(geometry, split.height[images], split.width[images], images, seed=0, epoch=0)
        yield Batch(images, split.label[images].astype(np.int64), boxes, flips)
