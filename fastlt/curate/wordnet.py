"""The `wordnet` provider: neighbours in WordNet's tree of nouns, offline.

A class is a synset with an id as ImageNet's, `n02124075`. Neighbours of a target are its hyponyms
and, over its parents, siblings and their hyponyms, nearest first. What contains a target (a
hypernym) is no neighbour: its images would be the target's.
"""

import csv
import re
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from fastlt.config import did_you_mean
from fastlt.curate.proposals import Category, Proposal, Target
from fastlt.errors import UserError
from fastlt.utils.embeddings import Embeddings
from fastlt.utils.names import normalised

WNID = re.compile(r"n\d{8}")
EDGES, LEMMAS, DEFINITIONS = "*wordnet*parent-child*", "*synset*lemma*", "*synset*definition*"


@dataclass(frozen=True)
class WordNet:
    """Synsets without lemmas are part of the tree, but never proposed."""

    lemmas: Mapping[str, Sequence[str]]
    parents: Mapping[str, Sequence[str]]
    definitions: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def children(self) -> Mapping[str, list[str]]:
        children = defaultdict(list)
        for child, parents in self.parents.items():
            for parent in parents:
                children[parent].append(child)
        return children

    @cached_property
    def senses(self) -> Mapping[str, list[tuple[int, str]]]:
        """Normalised name -> (place among the lemmas, synset)."""
        senses = defaultdict(list)
        for synset, words in self.lemmas.items():
            for place, word in enumerate(words):
                senses[normalised(word)].append((place, synset))
        return senses

    def above(self, synset: str) -> dict[str, int]:
        """All hypernyms, and the synset itself, by their distance."""
        return _walk(synset, lambda at: self.parents.get(at, ()), None)

    def below(self, synset: str, depth: int | None = None) -> dict[str, int]:
        """All hyponyms, and the synset itself, by their distance."""
        return _walk(synset, lambda at: self.children.get(at, ()), depth)

    def find(self, name: str) -> str | None:
        """The synset of an id or a name: where it is the first lemma, then the one with most
        hyponyms. `maple tree` is found as `maple` too, which is a kind of `tree`.
        """
        if WNID.fullmatch(name):
            return name if name in self.lemmas else None
        word = normalised(name)
        if found := self.senses.get(word):
            return min(found, key=lambda sense: (sense[0], -len(self.below(sense[1])), sense[1]))[1]
        rest, _, kind = word.rpartition(" ")
        kinds = {synset for _, synset in self.senses.get(kind, ())}
        found = [
            sense for sense in self.senses.get(rest, ()) if kinds.intersection(self.above(sense[1]))
        ]
        return min(found, key=lambda sense: (sense[0], sense[1]))[1] if found else None

    def query(self, synset: str) -> str:
        """The name, with that of a hypernym where the name alone has several meanings:

        `crane wading bird`.
        """
        name = self.lemmas[synset][0]
        if len(self.senses[normalised(name)]) == 1:
            return name
        higher = next((at for at in list(self.above(synset))[1:] if at in self.lemmas), None)
        return f"{name} {self.lemmas[higher][0]}" if higher else name


def _walk(
    start: str, following: Callable[[str], Iterable[str]], depth: int | None
) -> dict[str, int]:
    """Breadth first, so that distances are the shortest."""
    distances, waiting = {start: 0}, deque([start])
    while waiting:
        at = waiting.popleft()
        if depth is None or distances[at] < depth:
            for step in following(at):
                if step not in distances:
                    distances[step] = distances[at] + 1
                    waiting.append(step)
    return distances


# --- reading


def is_id(name: str) -> bool:
    return WNID.fullmatch(name) is not None


def read_wordnet(place: str) -> WordNet:
    """place: a folder with tables, or `wn:LEXICON`, data of the library `wn`.

    Raises UserError where there is none.
    """
    if place.startswith("wn:"):
        return read_wn(place.removeprefix("wn:"))
    if not place:
        raise UserError(
            "WordNet is needed: set propose.wordnet to a folder with its tables, or to "
            "wn:omw-en:1.4, "
            "the data of the library wn (`pip install wn` and `python -m wn download omw-en:1.4`)"
        )
    return read_tables(Path(place))


def read_tables(folder: Path) -> WordNet:
    """A folder, searched to its depths, with three files of lines:

    `parent child`, `synset<tab>lemma, lemma`, and, if there is one, `synset<tab>definition`; the
    names are to be as `wordnet.parent-child.txt`, `imagenet_synset_to_lemma.txt`.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder} with the tables of WordNet")
    lemmas = {synset: text.split(", ") for synset, text in _pairs(_file(folder, LEMMAS), "\t")}
    parents: dict[str, list[str]] = defaultdict(list)
    for parent, child in _pairs(_file(folder, EDGES), " "):
        parents[child].append(parent)
    definitions = next(iter(sorted(folder.rglob(DEFINITIONS))), None)
    return WordNet(lemmas, parents, dict(_pairs(definitions, "\t")) if definitions else {})


def _file(folder: Path, pattern: str) -> Path:
    found = sorted(folder.rglob(pattern))
    if not found:
        raise UserError(f"{folder} has no file named like {pattern}: it holds no tables of WordNet")
    return found[0]


def _pairs(file: Path, separator: str) -> Iterator[tuple[str, str]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    for number, line in enumerate(lines, start=1):
        first, found, second = line.strip().partition(separator)
        if not found or not WNID.fullmatch(first):
            raise UserError(
                f"{file}, line {number}: '{line[:60]}' does not begin with a WordNet id such as "
                "n02124075"
            )
        yield first, second


def read_wn(lexicon: str) -> WordNet:
    """Nouns of a lexicon whose ids hold the offsets of WordNet 3.0, as those of omw-en:1.4 do."""
    try:
        import wn
    except ImportError as error:
        raise UserError(f"wn:{lexicon} needs the library wn: pip install fastlt[curate]") from error
    try:
        synsets = wn.Wordnet(lexicon, expand="").synsets(pos="n")
    except wn.Error as error:
        raise UserError(
            f"wn has no lexicon {lexicon} ({error}): `python -m wn download {lexicon}` fetches it"
        ) from error
    ids = {
        synset.id: f"n{number[0]}"
        for synset in synsets
        if (number := re.findall(r"\d{8}", synset.id))
    }
    named = [synset for synset in synsets if synset.id in ids]
    if not named:
        raise UserError(f"the synsets of {lexicon} have no WordNet 3.0 offsets: use omw-en:1.4")
    return WordNet(
        {ids[synset.id]: synset.lemmas() for synset in named},
        {
            ids[synset.id]: [ids[up.id] for up in synset.hypernyms() if up.id in ids]
            for synset in named
        },
        {ids[synset.id]: synset.definition() or "" for synset in named},
    )


def read_mapping(file: Path, targets: Sequence[Target]) -> dict[str, str]:
    """Target -> synset, from a CSV with the header `target,synset`."""
    try:
        rows = list(csv.DictReader(file.read_text(encoding="utf-8-sig").splitlines()))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {file}: {error}") from error
    names = {target.name for target in targets}
    mapping = {}
    for number, row in enumerate(rows, start=2):
        target, synset = row.get("target") or "", row.get("synset") or ""
        if not WNID.fullmatch(synset) or target not in names:
            wrong = (
                f"'{synset}' is no WordNet id"
                if target in names
                else f"there is no target '{target}'"
            )
            raise UserError(f"{file}, line {number}: {wrong}; the header must be target,synset")
        mapping[target] = synset
    return mapping


# --- proposing


def find_targets(
    wordnet: WordNet, targets: Sequence[Target], mapping: Mapping[str, str]
) -> list[str | None]:
    """The synset of each target.

    Raises UserError where none has one, or a mapping names one that is not there.
    """
    for target, synset in mapping.items():
        if synset not in wordnet.lemmas:
            raise UserError(f"WordNet's tables have no {synset}, to which '{target}' is mapped")
    found = [mapping.get(target.name) or wordnet.find(target.name) for target in targets]
    if not any(found):
        first = targets[0].name
        near = did_you_mean(normalised(first), list(wordnet.senses))
        raise UserError(
            f"WordNet knows none of the targets, not even '{first}'{near}: map them with "
            "propose.synsets"
        )
    return found


def propose(
    wordnet: WordNet,
    synsets: Sequence[str | None],
    reach: int,
    rise: int,
    embeddings: Embeddings | None,
) -> Iterator[list[Proposal]]:
    """For each target its neighbours within `reach` edges, of which at most `rise` go up, best
    first: nearest, then most alike.
    """
    target_at = {synset: target for target, synset in enumerate(synsets) if synset}
    containing = {
        above: synset for synset in target_at for above in wordnet.above(synset) if above != synset
    }
    for target, synset in enumerate(synsets):
        yield (
            _neighbours(wordnet, target, synset, target_at, containing, reach, rise, embeddings)
            if synset
            else []
        )


def _neighbours(
    wordnet: WordNet,
    target: int,
    synset: str,
    target_at: Mapping[str, int],
    containing: Mapping[str, str],
    reach: int,
    rise: int,
    embeddings: Embeddings | None,
) -> list[Proposal]:
    ranked = []
    for candidate, (distance, up) in within(wordnet, synset, reach, rise).items():
        if candidate not in wordnet.lemmas or candidate in target_at:
            continue
        name, *others = wordnet.lemmas[candidate]
        alike = (
            embeddings.similarity(wordnet.lemmas[synset], [name, *others]) if embeddings else None
        )
        inside = tuple(
            sorted(
                {target_at[above] for above in wordnet.above(candidate) if above in target_at}
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
    """Synsets by (edges to them, of which upwards), the nearest way."""
    found: dict[str, tuple[int, int]] = {}
    for above, up in wordnet.above(synset).items():
        if up <= min(rise, reach):
            for candidate, down in wordnet.below(above, reach - up).items():
                found[candidate] = min(found.get(candidate, (reach + 1, 0)), (up + down, up))
    return found


def pool(wordnet: WordNet, synsets: Iterable[str | None], taken: set[str]) -> list[Category]:
    """What a random control may draw from: named leaves that neither are nor belong to a target, by
    name and once each.
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
