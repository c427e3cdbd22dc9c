"""Several packs as one: classes go by their names, and each pack's images count by its weight."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastlt.classes import ClassSpace
from fastlt.errors import UserError
from fastlt.packing.reader import COLUMNS, Pack, Split


@dataclass(frozen=True)
class MixedSplit(Split):
    """The images of several splits, one after the other. `weights` has one entry for each."""

    parts: tuple[Split, ...] = ()
    weights: tuple[float, ...] = ()

    @cached_property
    def part(self) -> np.ndarray:
        """The number of the part that each image is of, (n,) int64."""
        return np.repeat(np.arange(len(self.parts)), [len(part) for part in self.parts])

    def where(self, image: int) -> str:
        """Return the shard and key of an image, for messages."""
        number = int(self.part[image])
        return self.parts[number].where(image - sum(len(part) for part in self.parts[:number]))


def concat_packs(main: Pack, others: Mapping[str, Pack], weights: Mapping[str, float]) -> Pack:
    """Return `main` with the training images of the others; val and test are those of `main`.

    Others may bring auxiliary classes and pairs, but no target class that main lacks. Raises
    UserError where classes clash.
    """
    space = main.space
    for name, other in others.items():
        space = _merged(space, other.space, name)
    splits = [main.train, *(_relabelled(other, space) for other in others.values())]
    if any(split.remote is not None for split in splits):
        raise UserError("packs at an address cannot be mixed: copy them to this machine first")
    train = _concatenated(splits, (1.0, *(weights[name] for name in others)))
    counts = np.bincount(train.label, minlength=space.num_classes).tolist()
    manifest = main.manifest | {"mixed": {name: other.id for name, other in others.items()}}
    space = space.model_copy(update={"train_counts": counts})
    trained_on = (main, *others.values())
    return MixedPack(main.path, manifest, space, train, main.val, main.test, trained_on=trained_on)


@dataclass(frozen=True)
class MixedPack(Pack):
    """Several packs as one; `trained_on` lists them, the main one first."""

    trained_on: tuple[Pack, ...] = ()

    @property
    def id(self) -> str:
        """A string that changes with any of the packs."""
        return "-".join([super().id, *self.manifest["mixed"].values()])

    def betons(self, split: str) -> tuple[Path, ...]:
        """Return the FFCV files of a split, one of each pack; none where a pack has none."""
        if split != "train":
            return super().betons(split)
        found = tuple(path for pack in self.trained_on for path in pack.betons("train"))
        return found if len(found) == len(self.trained_on) else ()


def _merged(space: ClassSpace, other: ClassSpace, name: str) -> ClassSpace:
    """Return both class spaces in one, without the counts, which come at the end."""
    if unknown := [target for target in other.target_names if target not in space.target_names]:
        raise UserError(
            f"the pack {name} has a target class '{unknown[0]}' that the first lacks: mix packs of "
            "the same targets"
        )
    for target in space.target_names:
        if target in other.auxiliary_names:
            raise UserError(
                f"'{target}' is a target class, and an auxiliary one in the pack {name}: rename "
                "one of them"
            )
    added = [
        auxiliary for auxiliary in other.auxiliary_names if auxiliary not in space.auxiliary_names
    ]
    names = space.auxiliary_names + added
    places = {name: i for i, name in enumerate(space.target_names + names)}
    pairs = {
        *space.pairs,
        *(
            (places[other.names[target]], places[other.names[auxiliary]])
            for target, auxiliary in other.pairs
        ),
    }
    return ClassSpace(
        target_names=space.target_names,
        auxiliary_names=names,
        train_counts=[*space.train_counts, *([0] * len(added))],
        val_counts=space.val_counts,
        pairs=sorted(pairs),
        origins={**other.origins, **space.origins},
        display_names={**other.display_names, **space.display_names},
        descriptions={**other.descriptions, **space.descriptions},
    )


def _relabelled(other: Pack, space: ClassSpace) -> Split:
    places = {name: i for i, name in enumerate(space.names)}
    table = np.array([places[name] for name in other.space.names], np.int32)
    return replace(other.train, label=table[other.train.label])


def _concatenated(splits: list[Split], weights: tuple[float, ...]) -> MixedSplit:
    columns: dict[str, Any] = {
        name: np.concatenate([getattr(split, name) for split in splits]) for name in COLUMNS
    }
    first = np.cumsum([0, *(len(split.shards) for split in splits[:-1])])
    columns["shard"] = np.concatenate(
        [split.shard + start for split, start in zip(splits, first, strict=True)]
    ).astype(np.int32)
    shards = tuple(
        str((split.folder / shard).resolve()) for split in splits for shard in split.shards
    )
    return MixedSplit(
        splits[0].name, splits[0].folder, shards, parts=tuple(splits), weights=weights, **columns
    )
