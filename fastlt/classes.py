"""The class space: which classes there are, how many images each has, and which auxiliaries
neighbour which targets.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fastlt.errors import UserError
from fastlt.utils.files import write_text
from fastlt.utils.groups import Grouping

if TYPE_CHECKING:  # it imports torch, and reading a pack needs none
    from fastlt_kernels import ClassGraph


class ClassSpace(BaseModel):
    """The target and auxiliary classes of a pack, and their pairs, as classes.json holds them.

    Targets have ids 0..T-1, auxiliaries T..C-1, so that masking at inference is a slice.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    target_names: list[str]
    auxiliary_names: list[str] = []
    train_counts: list[int] = Field(description="stored training images of each of the C classes")
    val_counts: list[int] = Field(description="validation images of each of the T targets")
    pairs: list[tuple[int, int]] = Field(
        default=[], description="(target id, auxiliary id); many-to-many"
    )
    origins: dict[str, str] = Field(
        default={}, description="where each auxiliary came from, by name"
    )
    display_names: dict[str, str] = Field(
        default={}, description="how a class is called in texts, by name"
    )
    descriptions: dict[str, str] = Field(
        default={}, description="what a class looks like, in words, by name"
    )
    curation: dict[str, Any] = Field(
        default={}, description="the summary card of `fastlt curate`, if it made the auxiliaries"
    )

    @property
    def num_targets(self) -> int:
        """The number of target classes, T."""
        return len(self.target_names)

    @property
    def num_auxiliaries(self) -> int:
        """The number of auxiliary classes."""
        return len(self.auxiliary_names)

    @property
    def num_classes(self) -> int:
        """The number of all classes, C."""
        return self.num_targets + self.num_auxiliaries

    @property
    def names(self) -> list[str]:
        """The names of all C classes, targets first."""
        return self.target_names + self.auxiliary_names

    @model_validator(mode="after")
    def _is_consistent(self) -> "ClassSpace":
        if not self.target_names:
            raise ValueError("there are no target classes")
        if repeated := [name for name, times in Counter(self.names).items() if times > 1]:
            raise ValueError(f"class names are not unique: {', '.join(repeated[:3])}")
        if len(self.train_counts) != self.num_classes:
            raise ValueError(
                f"train_counts has {len(self.train_counts)} entries for {self.num_classes} classes"
            )
        if len(self.val_counts) != self.num_targets:
            raise ValueError(
                f"val_counts has {len(self.val_counts)} entries for {self.num_targets} targets"
            )
        for target, auxiliary in self.pairs:
            if not (0 <= target < self.num_targets <= auxiliary < self.num_classes):
                raise ValueError(f"pair ({target}, {auxiliary}) is not (target id, auxiliary id)")
        return self

    def graph(self) -> "ClassGraph":
        """The sparse target-auxiliary relation over all C classes."""
        from fastlt_kernels import ClassGraph

        pairs = np.asarray(self.pairs, dtype=np.int64).reshape(-1, 2)
        return ClassGraph.from_pairs(self.num_targets, self.num_classes, pairs)

    def targets_only(self) -> "ClassSpace":
        """The same targets without any auxiliary class."""
        return ClassSpace(
            target_names=self.target_names,
            train_counts=self.train_counts[: self.num_targets],
            val_counts=self.val_counts,
            display_names=self.display_names,
            descriptions=self.descriptions,
        )

    def anchors(self) -> dict[int, int]:
        """Return for each auxiliary that has targets the one with the fewest training images.

        Of equals it is the first.
        """
        found: dict[int, int] = {}
        for target, auxiliary in sorted(self.pairs):
            known = found.setdefault(auxiliary, target)
            if self.train_counts[target] < self.train_counts[known]:
                found[auxiliary] = target
        return found

    def groups(self, grouping: Grouping | None = None) -> dict[str, list[int]]:
        """Return target ids by their number of training images: many, medium, few."""
        return (grouping or Grouping()).members(self.train_counts[: self.num_targets])

    def save(self, path: Path) -> None:
        """Write the class space to a JSON file."""
        write_text(path, self.model_dump_json(indent=1) + "\n")

    @staticmethod
    def load(path: Path) -> "ClassSpace":
        """Return the class space of a file.

        Raises UserError where the file is missing or does not hold one.
        """
        try:
            return ClassSpace.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise UserError(f"cannot read the class space {path}: {error.strerror}") from error
        except ValidationError as error:
            raise UserError(f"{path} is not a class space: {error.errors()[0]['msg']}") from error


def pair_ids(
    pairs: Sequence[tuple[str, str]],
    target_names: Sequence[str],
    auxiliary_names: Sequence[str],
    where: str,
) -> list[tuple[int, int]]:
    """Return pairs of names as pairs of ids.

    `where` names the file in errors; its rows are counted from line 2, after the header.
    """
    targets = {name: i for i, name in enumerate(target_names)}
    auxiliaries = {name: i + len(target_names) for i, name in enumerate(auxiliary_names)}
    ids = set()
    for line, (target, auxiliary) in enumerate(pairs, start=2):
        if target not in targets:
            raise UserError(
                f"{where}, line {line}: there is no target class '{target}'; the first column "
                "names targets"
            )
        if auxiliary not in auxiliaries:
            raise UserError(
                f"{where}, line {line}: there is no auxiliary class '{auxiliary}'; the second "
                "column names auxiliaries"
            )
        ids.add((targets[target], auxiliaries[auxiliary]))
    return sorted(ids)
