"""The groups that figures are given for: targets with many, a medium number, or few images."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

GROUPS = ("many", "medium", "few")


@dataclass(frozen=True)
class Grouping:
    """The rule by which targets are many, medium or few.

    The defaults are those of Liu et al. 2019 (arXiv 1904.05160): more than 100 training images, 20
    to 100, fewer than 20.
    """

    rule: str = "count"  # or thirds: of the classes, by their training images
    many_images: int = 100
    few_images: int = 20

    def members(self, counts: Sequence[int]) -> dict[str, list[int]]:
        """Return the ids of the targets of each group; counts: the training images of each.

        Of thirds, the first may have a class more than the last, and equal classes come by id.
        """
        ids = range(len(counts))
        if self.rule == "thirds":
            order = sorted(ids, key=lambda target: -counts[target])
            ends = [-(-len(order) * part // len(GROUPS)) for part in range(len(GROUPS) + 1)]
            parts = [order[first:end] for first, end in itertools.pairwise(ends)]
            return {name: sorted(part) for name, part in zip(GROUPS, parts, strict=True)}
        groups: dict[str, list[int]] = {name: [] for name in GROUPS}
        for target in ids:
            groups[self._of(counts[target])].append(target)
        return groups

    def _of(self, count: int) -> str:
        if count > self.many_images:
            return "many"
        return "few" if count < self.few_images else "medium"

    def spans(self, counts: Sequence[int]) -> dict[str, str]:
        """Return the training images of each group in words, such as "20 to 100".

        It is "-" for a third without a class; counts: the training images of each target.
        """
        if self.rule == "thirds":
            found = self.members(counts).items()
            return {name: _span([counts[target] for target in ids]) for name, ids in found}
        return {
            "many": f"more than {self.many_images:,}",
            "medium": _span([self.few_images, self.many_images]),
            "few": f"fewer than {self.few_images:,}",
        }

    def anchored(self, counts: Sequence[int]) -> set[int]:
        """Return the targets whose number of images is the budget of their auxiliaries.

        That is the medium ones, but as the release counts them (arXiv 2410.15980): a target of just
        `few_images` is not among them.
        """
        if self.rule == "thirds":
            return set(self.members(counts)["medium"])
        within = range(self.few_images + 1, self.many_images + 1)
        return {target for target, count in enumerate(counts) if count in within}


def _span(counts: Sequence[int]) -> str:
    if not counts:
        return "-"
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def grouping_of(data: Mapping[str, Any]) -> Grouping:
    """Return the grouping of a table [data]; keys that it lacks have their defaults."""
    keys = {"rule": "groups", "many_images": "many_images", "few_images": "few_images"}
    return Grouping(**{name: data[key] for name, key in keys.items() if key in data})
