"""WordNet's tree of nouns, read from its tables or from data of the library `wn`.

A class is a synset with an id as ImageNet's, `n02124075`.
"""

import re
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from fastlt.errors import UserError
from fastlt.utils.names import normalised
from fastlt.utils.wordnet_files import NOUNS, XML, Synsets, read_lmf, read_princeton

WNID = re.compile(r"n\d{8}")
OF_PRINCETON = ("omw-en:", "pwn:3.0")  # what lexicons are called whose ids are of WordNet 3.0
EDGES, LEMMAS, DEFINITIONS = "*wordnet*parent-child*", "*synset*lemma*", "*synset*definition*"


@dataclass(frozen=True)
class WordNet:
    """The synsets by their ids.

    Synsets without lemmas are part of the tree, but never proposed.
    """

    lemmas: Mapping[str, Sequence[str]]
    parents: Mapping[str, Sequence[str]]
    definitions: Mapping[str, str] = field(default_factory=dict)
    version: str = "3.0"  # of Princeton's, whose 3.0 has ImageNet's ids
    # persons, places and such: no classes
    individuals: Collection[str] = frozenset()
    # of a word in lower case, its senses, the most frequent first
    order: Mapping[str, Sequence[str]] = field(default_factory=dict)

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
        """Return the first of the meanings of a name, None where there is none."""
        return next(iter(self.meanings(name)), None)

    def meanings(self, name: str) -> list[str]:
        """Return the synsets that an id or a name may mean, the likeliest first.

        That is the most frequent, where that is known, or that where the name is the first lemma,
        then the one with most hyponyms. `maple tree` is found as `maple` too, which is a kind of
        `tree`. Individuals are no classes.
        """
        if WNID.fullmatch(name):
            return [name] if name in self.lemmas else []
        word = normalised(name)
        found = self.senses.get(word, ())
        if not found:
            rest, _, kind = word.rpartition(" ")
            kinds = {synset for _, synset in self.senses.get(kind, ())}
            found = [
                sense
                for sense in self.senses.get(rest, ())
                if kinds.intersection(self.above(sense[1]))
            ]
        ranks = {synset: rank for rank, synset in enumerate(self.order.get(word, ()))}
        places: dict[str, int] = {}
        for place, synset in found:
            if synset not in self.individuals:
                places[synset] = min(place, places.get(synset, place))
        return sorted(
            places,
            key=lambda of: (ranks.get(of, len(ranks)), places[of], -len(self.below(of)), of),
        )

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


def find_synsets(wordnet: WordNet, names: Sequence[str]) -> list[str | None]:
    """Return the first meaning of each name, None where WordNet does not know it."""
    return [wordnet.find(name) for name in names]


# --- reading


def is_id(name: str) -> bool:
    """Return whether a name is the id of a synset, such as n02124075."""
    return WNID.fullmatch(name) is not None


def read_wordnet(place: str) -> WordNet:
    """Return the WordNet of a place: a folder with Princeton's `data.noun` or with tables, a file
    in XML such as Open English WordNet's, or `wn:LEXICON`, data of the library `wn`.

    Raises UserError where there is none.
    """
    if place.startswith("wn:"):
        return read_wn(place.removeprefix("wn:"))
    if not place:
        raise UserError(
            "WordNet is needed: set propose.wordnet to a folder with its data.noun, such as "
            "/usr/share/wordnet of Debian's wordnet-base, to Open English WordNet's XML, or to "
            "wn:omw-en:1.4, data of the library wn (`python -m wn download omw-en:1.4`)"
        )
    path = Path(place)
    if path.name == NOUNS:
        path = path.parent
    if (path / NOUNS).is_file():
        return of_synsets(read_princeton(path))
    if path.is_file() and path.name.endswith(XML):
        return of_synsets(read_lmf(path))
    return read_tables(path)


def of_synsets(found: Synsets) -> WordNet:
    """Return what a file holds as a WordNet."""
    return WordNet(
        found.lemmas,
        found.parents,
        found.definitions,
        found.version,
        frozenset(found.individuals),
        found.order,
    )


def read_tables(folder: Path) -> WordNet:
    """Return the WordNet of a folder, searched to its depths, with three files of lines.

    They are `parent child`, `synset<tab>lemma, lemma`, and, if there is one,
    `synset<tab>definition`; the names are to be as `wordnet.parent-child.txt`,
    `imagenet_synset_to_lemma.txt`.
    """
    if not folder.is_dir():
        raise UserError(
            f"there is no WordNet at {folder}: name a folder with data.noun or with tables, or a "
            "file in XML"
        )
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
    """Return the nouns of a lexicon of the library `wn`.

    Those of omw-en hold the ids of WordNet 3.0; others keep their own.
    """
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
    version = "3.0" if f"{lexicon}:".startswith(OF_PRINCETON) else lexicon
    ids = {synset.id: own_id(synset.id, version) for synset in synsets}
    return WordNet(
        {ids[synset.id]: synset.lemmas() for synset in synsets},
        {
            ids[synset.id]: [ids[up.id] for up in synset.hypernyms() if up.id in ids]
            for synset in synsets
        },
        {ids[synset.id]: synset.definition() or "" for synset in synsets},
        version,
        frozenset(ids[synset.id] for synset in synsets if synset.get_related("instance_hypernym")),
    )


def own_id(synset: str, version: str) -> str:
    """Return ImageNet's id of a synset of WordNet 3.0, and others as they are."""
    offset = re.search(r"\d{8}", synset) if version == "3.0" else None
    return f"n{offset[0]}" if offset else synset
