"""WordNet as it is distributed: Princeton's `data.noun`, and XML in the Global WordNet format, such
as Open English WordNet's.
"""

import gzip
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from fastlt.errors import UserError

NOUNS, INDEX = "data.noun", "index.noun"
COPYRIGHT = re.compile(r"WordNet (\d\.\d) Copyright")
PARENT, INSTANCE_OF = "@", "@i"  # pointers of data.noun
NOUN = "n"
XML = (".xml", ".xml.gz")


class Synsets(NamedTuple):
    """The nouns of a file; synsets by their ids."""

    version: str  # 3.0 where ids are ImageNet's; empty where the file does not say
    lemmas: dict[str, list[str]]
    parents: dict[str, list[str]]
    definitions: dict[str, str]
    individuals: set[str]  # persons, places and such, which are no classes
    order: dict[str, list[str]]  # of a word in lower case, its senses, the most frequent first


# --- Princeton's files


def read_princeton(folder: Path) -> Synsets:
    """Return the nouns of a folder with `data.noun`. Raises UserError where it cannot be read."""
    found = Synsets("", {}, {}, {}, set(), {})
    for number, line in enumerate(_lines(folder / NOUNS), start=1):
        if line.startswith("  "):  # the licence
            if match := COPYRIGHT.search(line):
                found = found._replace(version=match[1])
            continue
        try:
            _add_noun(found, line)
        except (ValueError, IndexError) as error:
            raise UserError(
                f"{folder / NOUNS}, line {number}: it is no synset of WordNet: '{line[:40]}'"
            ) from error
    if not found.lemmas:
        raise UserError(f"{folder / NOUNS} holds no synsets")
    if (folder / INDEX).is_file():
        _add_order(found, folder / INDEX)
    return found


def _add_order(found: Synsets, index: Path) -> None:
    """The senses of words, the most frequent first, of `index.noun`."""
    for number, line in enumerate(_lines(index), start=1):
        word, *fields = line.split()
        if line.startswith("  ") or not fields:
            continue
        count = int(fields[1]) if fields[1:2] and fields[1].isdigit() else 0
        senses = [_id(found.version, offset) for offset in fields[-count:]] if count else []
        if not senses or not all(sense in found.lemmas for sense in senses):
            raise UserError(
                f"{index}, line {number}: it names synsets that {NOUNS} beside it does not have: "
                "both must be of one WordNet"
            )
        found.order[word.replace("_", " ")] = senses


def _id(version: str, offset: str) -> str:
    """A synset's id: ImageNet's of WordNet 3.0; of others, whose numbers mean other synsets, one
    that cannot be taken for it.
    """
    return f"n{offset}" if version == "3.0" else f"wn{version.replace('.', '')}-n{offset}"


def _add_noun(found: Synsets, line: str) -> None:
    """`offset file type words word id ... pointers symbol offset type ... | gloss`."""
    data, _, gloss = line.partition(" | ")
    fields = data.split()
    synset, count = _id(found.version, fields[0]), int(fields[3], 16)
    if len(fields[0]) != 8 or count < 1:
        raise ValueError(fields[0])
    words = fields[4 : 4 + 2 * count : 2]
    pointers = fields[4 + 2 * count :]
    found.lemmas[synset] = [word.replace("_", " ") for word in words]
    found.definitions[synset] = gloss.strip()
    parents = []
    for place in range(1, 4 * int(pointers[0]), 4):
        symbol, offset, kind, _ = pointers[place : place + 4]
        if symbol in (PARENT, INSTANCE_OF) and kind == NOUN:
            parents.append(_id(found.version, offset))
        if symbol == INSTANCE_OF:
            found.individuals.add(synset)
    found.parents[synset] = parents


def _lines(file: Path) -> Iterator[str]:
    try:
        with file.open(encoding="utf-8", errors="replace") as opened:
            yield from opened
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error


# --- Global WordNet format


def read_lmf(file: Path) -> Synsets:
    """Return the nouns of an XML file, compressed with gzip or not. UserError where it is none."""
    found = Synsets("", {}, {}, {}, set(), {})
    words: dict[str, list[str]] = {}  # synset -> words, as entries name them
    members: dict[str, str] = {}  # entry or sense -> word
    ordered: dict[str, list[str]] = {}
    try:
        with _opened(file) as source:
            for event, element in ElementTree.iterparse(source, events=("start", "end")):
                if event == "start":
                    if element.tag == "Lexicon":
                        name = f"{element.get('id')} {element.get('version')}"
                        found = found._replace(version=name)
                elif element.tag == "LexicalEntry":
                    _add_entry(element, words, members)
                    element.clear()
                elif element.tag == "Synset":
                    if element.get("partOfSpeech") == NOUN:
                        _add_synset(found, element, ordered)
                    element.clear()
    except (OSError, EOFError, ElementTree.ParseError, gzip.BadGzipFile) as error:
        raise UserError(f"cannot read {file} as a WordNet in XML: {error}") from error
    for synset in found.parents:
        listed = [members[one] for one in ordered.get(synset, ()) if one in members]
        found.lemmas[synset] = list(dict.fromkeys([*listed, *words.get(synset, [])]))
    if not found.lemmas:
        raise UserError(f"{file} holds no synsets of nouns in the Global WordNet format")
    return found


def _add_entry(entry: Any, words: dict[str, list[str]], members: dict[str, str]) -> None:
    lemma = entry.find("Lemma")
    if lemma is None or lemma.get("partOfSpeech") != NOUN:
        return
    word = lemma.get("writtenForm", "")
    members[entry.get("id", "")] = word
    for sense in entry.iter("Sense"):
        members[sense.get("id", "")] = word
        words.setdefault(sense.get("synset", ""), []).append(word)


def _add_synset(found: Synsets, element: Any, ordered: dict[str, list[str]]) -> None:
    synset = element.get("id", "")
    relations = [
        (one.get("relType"), one.get("target", "")) for one in element.iter("SynsetRelation")
    ]
    found.parents[synset] = [
        target for kind, target in relations if kind in ("hypernym", "instance_hypernym")
    ]
    if any(kind == "instance_hypernym" for kind, _ in relations):
        found.individuals.add(synset)
    definition = element.find("Definition")
    found.definitions[synset] = (definition.text or "").strip() if definition is not None else ""
    ordered[synset] = element.get("members", "").split()


def _opened(file: Path) -> Any:
    return gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb")
