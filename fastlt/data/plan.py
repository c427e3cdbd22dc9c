"""Which image comes when.

Every engine takes the plan as it is, so engines agree, runs resume at any step and ranks never
overlap.

An epoch is a pure function of (seed, epoch); its batches are cut from one global order, so the
images of a step, seen as a set over the ranks, do not depend on how many ranks there are (but for a
last batch that the ranks cannot share equally).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fastlt.data.geometry import Geometry, boxes_of
from fastlt.errors import UserError
from fastlt.packing.concat import MixedSplit
from fastlt.packing.reader import Split


@dataclass(frozen=True)
class Batch:
    """What one rank loads in one step.

    `boxes` are the parts of the upright images that fill the output (see augment.py).
    """

    images: np.ndarray
    """Indices into the split, (n,) int64; of several views, all images once, then all again."""
    labels: np.ndarray
    """The classes of the images, (n,) int64."""
    boxes: np.ndarray
    """Top, left, height and width of each, (n, 4) int32; they may reach over the edge, which is
    filled with black."""
    flips: np.ndarray
    """Whether an image is mirrored, (n,) bool."""


@dataclass(frozen=True)
class Sampling:
    """How often each class is seen in an epoch.

    targets: `once`, every stored target image once; or as many target images as are stored, but
    every class equally often (`class-balanced`) or in proportion to the square root of its images
    (`square-root`).
    """

    targets: str = "once"
    # images per auxiliary class and epoch, whatever it stores, or a number for each class
    budget: int | tuple[int, ...] = 50
    # times that an image comes in a row, each time cut anew (repeated augmentation); the counts
    # stay
    repeats: int = 1
    views: int = 1  # times that each image of a batch comes in it, each time cut anew
    # class of the split -> the class that its images train; those left out train their own
    trains: tuple[tuple[int, int], ...] = ()


def spread_budget(total: int, stored: np.ndarray) -> tuple[int, ...]:
    """A budget per auxiliary class that comes to `total` images, even over those that store any:
    stored (A,) int.
    """
    having = np.flatnonzero(stored)
    if not len(having):
        return (0,) * len(stored)
    budgets = np.zeros(len(stored), np.int64)
    budgets[having] = total // len(having)
    budgets[having[: total % len(having)]] += 1
    return tuple(budgets.tolist())


@dataclass(frozen=True)
class Plan:
    """The training order.

    `batch` is the global batch of different images; a rank gets every world-th of them, and each as
    often as there are views.

    window > 0 is for shards that are not all on this machine: that many bytes of them are shuffled
    together, then the next ones, and a rank gets neighbouring shards of a batch, so that it needs
    few.
    """

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
    window: int = 0

    def __post_init__(self) -> None:
        if self.batch % self.world:
            raise UserError(
                f"data.batch={self.batch} cannot be shared equally by {self.world} ranks: choose a "
                "multiple of that"
            )

    @cached_property
    def class_counts(self) -> np.ndarray:
        """The images that train each of the C classes in an epoch, (C,) int64: n_j of the prior."""
        return np.bincount(self._trained, self.drawn_counts, self.num_classes).astype(np.int64)

    @cached_property
    def _trained(self) -> np.ndarray:
        """The class that the images of each of the C classes train, (C,) int64."""
        trained = np.arange(self.num_classes)
        for drawn, instead in self.sampling.trains:
            trained[drawn] = instead
        return trained

    def labels_of(self, images: np.ndarray) -> np.ndarray:
        """Return the classes (n,) int64 that images (n,) train."""
        return self._trained[self.split.label[images]]

    @cached_property
    def drawn_counts(self) -> np.ndarray:
        """The images of each of the C classes of the split in every epoch, (C,) int64."""
        stored = np.rint(self._strata.sum(axis=1)).astype(np.int64)
        targets, auxiliaries = stored[: self.num_targets], stored[self.num_targets :]
        budget = np.broadcast_to(self.sampling.budget, auxiliaries.shape)
        counts = [
            target_counts(targets, self.sampling.targets),
            np.where(auxiliaries == 0, 0, budget),
        ]
        return np.concatenate(counts).astype(np.int64)

    @cached_property
    def _strata(self) -> np.ndarray:
        """What each class stores in each of the packs that are mixed, counted by its weight, (C,
        packs) float64.
        """
        split = self.split
        if not isinstance(split, MixedSplit):
            return np.bincount(split.label, minlength=self.num_classes)[:, None].astype(np.float64)
        packs = len(split.parts)
        stored = np.bincount(split.label * packs + split.part, minlength=self.num_classes * packs)
        return stored.reshape(-1, packs) * np.array(split.weights)

    def _draw(self, counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """counts[c] images of each class, from each pack its share."""
        split = self.split
        if not isinstance(split, MixedSplit):
            return draw_by_class(split.label, counts, rng)
        return draw_by_class(
            split.label * len(split.parts) + split.part,
            shared_out(counts, self._strata).reshape(-1),
            rng,
        )

    @cached_property
    def images_per_epoch(self) -> int:
        """The number of images that an epoch draws, over all ranks."""
        return int(self.drawn_counts.sum())

    @cached_property
    def steps_per_epoch(self) -> int:
        """The number of batches of an epoch."""
        whole, rest = divmod(self.images_per_epoch, self.batch)
        return whole + (1 if rest >= self.world and not self.drop_last else 0)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of this rank from `first_step` on."""
        order = self.order(epoch)
        for step in range(first_step, self.steps_per_epoch):
            places = self._own(self._places(step), order)
            yield self._batch(order[places], places, epoch)

    def whole_batches(self, epoch: int) -> Iterator[np.ndarray]:
        """The images (n,) of each batch over all ranks, each once however many views there are."""
        order = self.order(epoch)
        for step in range(self.steps_per_epoch):
            yield order[self._places(step)]

    def _places(self, step: int) -> np.ndarray:
        """Return the places of a step in the order, over all ranks."""
        start, stop = step * self.batch, min((step + 1) * self.batch, self.images_per_epoch)
        # every rank gets equally many
        return np.arange(start, start + (stop - start) // self.world * self.world)

    def _own(self, places: np.ndarray, order: np.ndarray) -> np.ndarray:
        """Return those places of a batch that belong to this rank."""
        if not self.window:
            return places[self.rank :: self.world]
        by_shard = places[np.argsort(self.split.shard[order[places]], kind="stable")]
        share = len(places) // self.world
        return by_shard[self.rank * share : (self.rank + 1) * share]

    def order(self, epoch: int) -> np.ndarray:
        """Image indices of the whole epoch over all ranks, (images_per_epoch,) int64."""
        rng = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        repeats = self.sampling.repeats
        images = rng.permutation(self._draw(-(-self.drawn_counts // repeats), rng))
        if self.window:
            images = images[np.argsort(self._windows(rng)[self.split.shard[images]], kind="stable")]
        return (
            images
            if repeats == 1
            else np.repeat(images, _times(self.split.label[images], self.drawn_counts, repeats))
        )

    def _windows(self, rng: np.random.Generator) -> np.ndarray:
        """The window of each shard, (shards,) int64."""
        order = rng.permutation(len(self.split.shards))
        sizes = np.bincount(self.split.shard, self.split.size, len(order))
        windows = np.empty(len(order), np.int64)
        windows[order] = (np.cumsum(sizes[order]) - sizes[order]) // self.window
        return windows

    def _batch(self, images: np.ndarray, places: np.ndarray, epoch: int) -> Batch:
        views = self.sampling.views
        images = np.tile(images, views)
        # places beyond the epoch's, so that each view is cut by numbers of its own
        first = np.arange(views)[:, None] * self.images_per_epoch
        places = (first + places).reshape(-1)
        boxes, flips = boxes_of(
            self.geometry,
            self.split.height[images],
            self.split.width[images],
            places,
            self.seed,
            epoch,
        )
        return Batch(images, self.labels_of(images), boxes, flips)


def target_counts(stored: np.ndarray, sampling: str) -> np.ndarray:
    """Return the images of each target class in an epoch, (T,) int.

    It is at least one of each that stores any.
    """
    if sampling == "once":
        return stored
    shares = np.sqrt(stored) if sampling == "square-root" else (stored > 0).astype(float)
    counts = np.rint(stored.sum() * shares / max(1.0, shares.sum())).astype(np.int64)
    return np.where(stored > 0, np.maximum(counts, 1), 0)


def _times(labels: np.ndarray, counts: np.ndarray, repeats: int) -> np.ndarray:
    """Return how often each of the drawn images comes.

    `repeats` times, but the last of a class as often as its count leaves.
    """
    times = np.full(len(labels), repeats)
    classes, reverse_first = np.unique(labels[::-1], return_index=True)
    last = len(labels) - 1 - reverse_first
    times[last] -= -counts[classes] % repeats
    return times


def shared_out(counts: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Return counts (C,) int split in proportion to shares (C, P), (C, P) int64.

    What rounding leaves goes to the largest remainders.
    """
    exact = counts[:, None] * shares / np.maximum(shares.sum(axis=1, keepdims=True), 1e-300)
    parts = np.floor(exact + 1e-9).astype(np.int64)
    order = np.argsort(parts - exact, axis=1, kind="stable").argsort(axis=1, kind="stable")
    return parts + (order < (counts - parts.sum(axis=1))[:, None])


def draw_by_class(labels: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """For each class c, counts[c] of its images: all of them as often as that goes, and a random
    part of them once more.

    labels (n,) int, counts (C,) int64; returns (counts.sum(),) int64 indices into labels, ordered
    by image.
    """
    stored = np.bincount(labels, minlength=len(counts))
    every, part = np.divmod(counts, np.maximum(stored, 1))
    shuffled = rng.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    rank_in_class = np.arange(len(labels)) - np.repeat(np.cumsum(stored) - stored, stored)
    repeats = np.empty(len(labels), dtype=np.int64)
    repeats[by_class] = every[labels[by_class]] + (rank_in_class < part[labels[by_class]])
    return np.repeat(np.arange(len(labels)), repeats)


def evaluation_batches(
    split: Split, geometry: Geometry, batch: int, rank: int = 0, world: int = 1
) -> Iterator[Batch]:
    """Every image once, in stored order, every world-th to this rank; the last batch may be
    smaller.
    """
    mine = np.arange(rank, len(split), world)
    for start in range(0, len(mine), batch):
        images = mine[start : start + batch]
        boxes, flips = boxes_of(
            geometry, split.height[images], split.width[images], images, seed=0, epoch=0
        )
        yield Batch(images, split.label[images].astype(np.int64), boxes, flips)
