"""WordNet's tree of nouns, read from its tables or from data of the library `wn`.

A class is a synset with an id as ImageNet's, `n02124075`.
"""

import re
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from fastlt.errors import UserError
from fastlt.utils.names import normalised

WNID = re.compile(r"n\d{8}")
EDGES, LEMMAS, DEFINITIONS = "*wordnet*parent-child*", "*synset*lemma*", "*synset*definition*"


@dataclass(frozen=True)
class WordNet:
    """The synsets by their ids.

    Synsets without lemmas are part of the tree, but never proposed.
    """

    lemmas: Mapping[str, Sequence[str]]
    parents: Mapping[str, Sequence[str]]
    definitions: Mapping[str, str] = field(default_factory=dict)

    @cached_property
    def children(self) -> Mapping[str, list[str]]:
        """The direct hyponyms of each synset that has some."""
        children = defaultdict(list)
        for child, parents in self.parents.items():
            for parent in parents:
                children[parent].append(child)
        return children

    @cached_property
    def senses(self) -> Mapping[str, list[tuple[int, str]]]:
        """The meanings of a normalised name: (place among the lemmas, synset)."""
        senses = defaultdict(list)
        for synset, words in self.lemmas.items():
            for place, word in enumerate(words):
                senses[normalised(word)].append((place, synset))
        return senses

    def above(self, synset: str) -> dict[str, int]:
        """Return all hypernyms, and the synset itself, by their distance."""
        return _walk(synset, lambda of: self.parents.get(of, ()), None)

    def below(self, synset: str, depth: int | None = None) -> dict[str, int]:
        """Return all hyponyms, and the synset itself, by their distance."""
        return _walk(synset, lambda of: self.children.get(of, ()), depth)

    def find(self, name: str) -> str | None:
        """Return the synset of an id or a name, None where there is none.

        Of several, that where the name is the first lemma, then the one with most hyponyms.
        `maple tree` is found as `maple` too, which is a kind of `tree`.
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
        """Return the name, with that of a hypernym where it alone has several meanings.

        As in `crane wading bird`.
        """
        name = self.lemmas[synset][0]
        if len(self.senses[normalised(name)]) == 1:
            return name
        higher = next((of for of in list(self.above(synset))[1:] if of in self.lemmas), None)
        return f"{name} {self.lemmas[higher][0]}" if higher else name


def _walk(
    start: str, following: Callable[[str], Iterable[str]], depth: int | None
) -> dict[str, int]:
    """Return distances from `start`, breadth first, so that they are the shortest."""
    distances, waiting = {start: 0}, deque([start])
    while waiting:
        current = waiting.popleft()
        if depth is None or distances[current] < depth:
            for step in following(current):
                if step not in distances:
                    distances[step] = distances[current] + 1
                    waiting.append(step)
    return distances


def find_synsets(
    wordnet: WordNet, names: Sequence[str], mapping: Mapping[str, str] | None = None
) -> list[str | None]:
    """Return the synset of each name, None where WordNet does not know it.

    mapping: name -> synset, for names that say too little. Raises UserError where a mapping names a
    synset that is not there.
    """
    for name, synset in (mapping or {}).items():
        if synset not in wordnet.lemmas:
            raise UserError(f"WordNet's tables have no {synset}, to which '{name}' is mapped")
    return [(mapping or {}).get(name) or wordnet.find(name) for name in names]


# --- reading


def is_id(name: str) -> bool:
    """Return whether a name is the id of a synset, such as n02124075."""
    return WNID.fullmatch(name) is not None


def read_wordnet(place: str) -> WordNet:
    """Return the WordNet of a place: a folder with tables, or `wn:LEXICON`, data of `wn`.

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
    """Return the WordNet of a folder, searched to its depths, with three files of lines.

    They are `parent child`, `synset<tab>lemma, lemma`, and, if there is one,
    `synset<tab>definition`; the names are to be as `wordnet.parent-child.txt`,
    `imagenet_synset_to_lemma.txt`.
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
    """Return the nouns of a lexicon whose ids hold offsets of WordNet 3.0, as omw-en:1.4's do."""
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
