"""What the page of a run is made of: the files of the run, and the relation of its classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fastlt.classes import ClassSpace
from fastlt.errors import UserError
from fastlt.utils.groups import Grouping, grouping_of
from fastlt.utils.run_files import read_run_files


@dataclass(frozen=True)
class Run:
    """A finished run; an absent file is an empty value."""

    path: Path
    config: dict[str, Any]
    result: dict[str, Any]
    epochs: list[dict[str, Any]]
    space: ClassSpace
    predictions: dict[str, np.ndarray]

    @property
    def grouping(self) -> Grouping:
        """The rule by which the run's targets are many, medium or few."""
        return grouping_of(self.config.get("data", {}))

    @cached_property
    def members(self) -> dict[str, list[int]]:
        """The targets of each group."""
        return self.space.groups(self.grouping)

    @cached_property
    def spans(self) -> dict[str, str]:
        """The training images of each group, in words."""
        return self.grouping.spans(self.space.train_counts[: self.space.num_targets])

    @cached_property
    def groups(self) -> list[str]:
        """The group of each target."""
        of = {target: name for name, members in self.members.items() for target in members}
        return [of[target] for target in range(self.space.num_targets)]

    @cached_property
    def by_frequency(self) -> list[int]:
        """The target ids, most training images first."""
        return sorted(
            range(self.space.num_targets), key=lambda target: -self.space.train_counts[target]
        )

    @cached_property
    def per_class(self) -> list[float | None]:
        """The accuracy of each target, None where not known.

        Raises UserError where it is damaged.
        """
        known = self.result.get("per_class") or [None] * self.space.num_targets
        if len(known) != self.space.num_targets:
            found = f"result.json has {len(known)} classes, classes.json {self.space.num_targets}"
            raise UserError(f"{self.path} is damaged: {found}; train again")
        return known

    @cached_property
    def confusion(self) -> list[tuple[int, int, int]]:
        """The confusions (true, predicted, count), off the diagonal, most frequent first."""
        return sorted(
            (tuple(entry) for entry in self.result.get("confusion", [])),
            key=lambda entry: -entry[2],
        )


class Relation:
    """The class graph: who neighbours whom, and which targets share an auxiliary."""

    def __init__(self, space: ClassSpace):
        self.space = space
        self.neighbours: dict[int, list[int]] = {target: [] for target in range(space.num_targets)}
        self.owners: dict[int, list[int]] = {}
        for target, auxiliary in space.pairs:
            self.neighbours[target].append(auxiliary)
            self.owners.setdefault(auxiliary, []).append(target)

    def shared(self, first: int, second: int) -> list[str]:
        """Return the names of the auxiliaries that neighbour both targets."""
        return [
            self.space.names[auxiliary]
            for auxiliary in self.neighbours[first]
            if auxiliary in self.neighbours[second]
        ]

    @cached_property
    def siblings(self) -> set[tuple[int, int]]:
        """The pairs (target, target), both ways, of targets that share an auxiliary."""
        return {(a, b) for owners in self.owners.values() for a in owners for b in owners if a != b}

    def grouped(self, order: Sequence[int]) -> list[int]:
        """Return the targets of `order`, those that share auxiliaries next to each other."""
        beside: dict[int, list[int]] = {}
        for a, b in sorted(self.siblings):
            beside.setdefault(a, []).append(b)
        arranged: dict[int, None] = {}
        for start in order:
            waiting = [start]
            while waiting:
                target = waiting.pop()
                if target not in arranged:
                    arranged[target] = None
                    waiting += beside.get(target, [])
        return list(arranged)


def read_run(path: Path) -> Run:
    """Return what the page shows of a run. Raise UserError where it is no finished one."""
    files = read_run_files(path)
    space = ClassSpace.load(path / "classes.json")
    return Run(path, files.config, files.result, files.epochs, space, files.predictions)
