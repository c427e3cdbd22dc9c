"""The `wordnet` provider: neighbours in WordNet's tree of nouns, offline.

Neighbours of a target are its hyponyms and, over its parents, siblings and their hyponyms, nearest
first. What contains a target (a hypernym) is no neighbour: its images would be the target's.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

from fastlt.config import did_you_mean
from fastlt.curate.proposals import Category, Proposal, Target
from fastlt.errors import UserError
from fastlt.utils.embeddings import Embeddings
from fastlt.utils.names import normalised
from fastlt.utils.wordnet import WordNet


def check_known(wordnet: WordNet, targets: Sequence[Target], synsets: Sequence[str | None]) -> None:
    """Raise UserError where none of the targets has a synset."""
    if any(synsets):
        return
    first = targets[0].name
    near = did_you_mean(normalised(first), list(wordnet.senses))
    raise UserError(
        f"WordNet knows none of the targets, not even '{first}'{near}: map them with --senses"
    )


def propose(
    wordnet: WordNet,
    synsets: Sequence[str | None],
    reach: int,
    rise: int,
    embeddings: Embeddings | None,
) -> Iterator[list[Proposal]]:
    """Yield the neighbours of each target, best first: nearest, then most alike.

    They are within `reach` edges, of which at most `rise` go up.
    """
    target_of = {synset: target for target, synset in enumerate(synsets) if synset}
    containing = {
        above: synset for synset in target_of for above in wordnet.above(synset) if above != synset
    }
    for target, synset in enumerate(synsets):
        yield (
            _neighbours(wordnet, target, synset, target_of, containing, reach, rise, embeddings)
            if synset
            else []
        )


def _neighbours(
    wordnet: WordNet,
    target: int,
    synset: str,
    target_of: Mapping[str, int],
    containing: Mapping[str, str],
    reach: int,
    rise: int,
    embeddings: Embeddings | None,
) -> list[Proposal]:
    ranked = []
    for candidate, (distance, up) in within(wordnet, synset, reach, rise).items():
        if candidate not in wordnet.lemmas or candidate in target_of:
            continue
        name, *others = wordnet.lemmas[candidate]
        alike = (
            embeddings.similarity(wordnet.lemmas[synset], [name, *others]) if embeddings else None
        )
        inside = tuple(
            sorted(
                {target_of[above] for above in wordnet.above(candidate) if above in target_of}
                - {target}
            )
        )
        inner = containing.get(candidate)
        refused = f"it contains the target '{wordnet.lemmas[inner][0]}'" if inner else ""
        proposal = Proposal(
            target,
            name,
            "wordnet",
            candidate,
            wordnet.query(candidate),
            tuple(others),
            wordnet.definitions.get(candidate, ""),
            distance,
            alike,
            inside,
            refused,
        )
        ranked.append(
            ((distance, up, -(alike or 0.0), candidate in wordnet.children, candidate), proposal)
        )
    return [proposal for _, proposal in sorted(ranked, key=lambda pair: pair[0])]


def within(wordnet: WordNet, synset: str, reach: int, rise: int) -> dict[str, tuple[int, int]]:
    """Return synsets with (edges to them, of which upwards), the nearest way."""
    found: dict[str, tuple[int, int]] = {}
    for above, up in wordnet.above(synset).items():
        if up <= min(rise, reach):
            for candidate, down in wordnet.below(above, reach - up).items():
                found[candidate] = min(found.get(candidate, (reach + 1, 0)), (up + down, up))
    return found


def pool(wordnet: WordNet, synsets: Iterable[str | None], taken: set[str]) -> list[Category]:
    """Return what a random control may draw from, by name and once each.

    They are named leaves that neither are nor belong to a target.
    """
    targets = {synset for synset in synsets if synset}
    found: dict[str, Category] = {}
    for synset in sorted(wordnet.lemmas):
        word = normalised(wordnet.lemmas[synset][0])
        if (
            word not in taken
            and synset not in wordnet.children
            and not targets.intersection(wordnet.above(synset))
        ):
            name, definition = wordnet.lemmas[synset][0], wordnet.definitions.get(synset, "")
            found.setdefault(
                word, Category(name, wordnet.query(synset), synset, definition, "random")
            )
    return list(found.values())
