"""The way from proposals to auxiliary classes.

Names are compared, targets dropped, and the same categories merged.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from fastlt.utils.names import normalised


@dataclass(frozen=True)
class Target:
    """A target class: its name, and what is known of it."""

    name: str
    count: int = 0  # training images; 0: not known
    word: str = ""  # what it is called, where its name is an id


@dataclass(frozen=True)
class Proposal:
    """A category that is proposed as a neighbour of one target."""

    target: int
    name: str
    provider: str
    key: str = ""  # of the provider, where names are ambiguous: a WordNet id
    query: str = ""  # what to search images by; empty: the name
    synonyms: tuple[str, ...] = ()
    description: str = ""
    distance: int | None = None  # edges of the hierarchy
    similarity: float | None = None  # cosine of embeddings
    also: tuple[int, ...] = ()  # further targets that it belongs to, whichever it was proposed for
    refused: str = ""  # by the provider, and why


class Decision(NamedTuple):
    """A proposal, whether it is kept, and why not."""

    proposal: Proposal
    kept: bool
    reason: str


@dataclass
class Category:
    """An auxiliary class to be."""

    name: str
    query: str
    key: str = ""
    description: str = ""
    provider: str = ""
    owners: set[int] = field(default_factory=set)


def merge(
    targets: Sequence[Target],
    synonyms: Sequence[Sequence[str]],
    proposals: Sequence[Sequence[Proposal]],
    limits: Sequence[int],
) -> tuple[list[Decision], list[Category]]:
    """Return the decisions, and the categories that are kept.

    synonyms, proposals (best first) and limits, the most to keep, are those of each target.

    A category that several targets are proposed is one auxiliary class with several owners. A name
    that is a target's, or a synonym of one, is dropped, as is a second category of the same name.
    """
    target_of = {
        normalised(word): target.name
        for target, words in zip(targets, synonyms, strict=True)
        for word in words
    }
    target_of |= {
        normalised(word): target.name
        for target in targets
        for word in (target.word, target.name)
        if word
    }
    names = {normalised(word) for target in targets for word in (target.name, target.word) if word}
    categories: dict[str, Category] = {}
    decisions: list[Decision] = []
    for proposed, limit in zip(proposals, limits, strict=True):
        owned: set[str] = set()
        for proposal in (replace(proposal, name=printable(proposal.name)) for proposal in proposed):
            word = normalised(proposal.name)
            reason = proposal.refused or _objection(
                proposal, word, target_of, names, categories, owned, len(owned) < limit
            )
            decisions.append(Decision(proposal, not reason, reason))
            if not reason:
                owned.add(word)
                add_to(categories, word, proposal)
    return decisions, list(categories.values())


def _objection(
    proposal: Proposal,
    word: str,
    target_of: dict[str, str],
    names: set[str],
    categories: dict[str, Category],
    owned: set[str],
    has_room: bool,
) -> str:
    if not word:
        return "it has no name"
    if word in target_of:
        return f"it is the target '{target_of[word]}' or a synonym of it"
    if called := names.intersection(map(normalised, proposal.synonyms)):
        return f"it is also called '{target_of[called.pop()]}', which is a target"
    if word in owned:
        return "it was proposed for this target before"
    for synonym in map(normalised, proposal.synonyms):
        if synonym != word and synonym in categories and categories[synonym].key != proposal.key:
            return f"it is also called '{categories[synonym].name}', which is another category"
    known = categories.get(word)
    if known and known.key and proposal.key and known.key != proposal.key:
        return f"another category has this name ({known.key})"
    return "" if has_room else "enough were better"


def printable(name: str) -> str:
    """Return a name on one line, without what no file name or label may have."""
    return " ".join("".join(c if c.isprintable() else " " for c in name).split())


def add_to(categories: dict[str, Category], word: str, proposal: Proposal) -> None:
    """Add a proposal to the category of its word."""
    category = categories.setdefault(
        word,
        Category(
            proposal.name,
            proposal.query or proposal.name,
            proposal.key,
            proposal.description,
            proposal.provider,
        ),
    )
    category.owners |= {proposal.target, *proposal.also}


def even_limits(targets: Sequence[Target], per_target: int) -> list[int]:
    """Return the same limit for each target."""
    return [per_target] * len(targets)


def tail_weighted_limits(targets: Sequence[Target], per_target: int) -> list[int]:
    """Return as many in all, but more for targets with fewer images.

    They go by 1 / sqrt(images), from 1 to twice `per_target`.
    """
    weights = np.array([max(1, target.count) for target in targets]) ** -0.5
    low, high = 0.0, 2 * per_target / weights.min()
    for _ in range(100):  # the sum grows with the scale
        scale = (low + high) / 2
        low, high = (
            (scale, high)
            if _clipped(scale * weights, per_target).sum() < per_target * len(targets)
            else (low, scale)
        )
    return np.round(_clipped(high * weights, per_target)).astype(int).tolist()


def _clipped(shares: np.ndarray, per_target: int) -> np.ndarray:
    return np.clip(shares, 1, max(1, 2 * per_target))


def with_random_names(
    categories: Sequence[Category], pool: Sequence[Category], seed: int
) -> list[Category]:
    """Return as many categories with the same owners, but drawn at random from `pool`.

    This is the control of the paper.
    """
    drawn = np.random.default_rng(seed).choice(len(pool), len(categories), replace=False)
    return [
        replace(pool[i], owners=set(category.owners))
        for i, category in zip(drawn, categories, strict=True)
    ]
