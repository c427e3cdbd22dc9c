"""Which synset of WordNet a target means: by an id in its name, by its words, and where these have
several senses by the user, never by a guess that nobody sees.
"""

import csv
import io
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.markup import escape
from rich.prompt import IntPrompt
from rich.table import Table

from fastlt.config import did_you_mean
from fastlt.curate.proposals import Target
from fastlt.errors import UserError
from fastlt.packing.tables import read_rows
from fastlt.utils.files import write_text
from fastlt.utils.names import normalised
from fastlt.utils.wordnet import WordNet, is_id

FIRST = "first"  # a value of --senses
FILE = "senses.csv"
COLUMNS = ("target", "synset", "name", "parent", "gloss", "by")
OPEN = "open"
# a WordNet id before a name, as class folders have it
WITH_NAME = re.compile(r"(n\d{8})[\s,._-]+(\S.*)")
NUMBERED = re.compile(r"\d+[\s._-]+(?=\D)")  # as in 001.Black_footed_Albatross


class Sense(NamedTuple):
    """What a target was taken for, and by what."""

    synset: str | None
    by: str


def look_up(
    wordnet: WordNet, targets: Sequence[Target], option: str, out: Path, console: Console
) -> list[str | None]:
    """Return the synset of each target, None where WordNet does not know it.

    option: a CSV with the columns target,synset, `first` for the first in WordNet's order (the
    most frequent), or where that is not known the likeliest by its words, or empty. What it leaves
    open is asked in a terminal. OUT/senses.csv says what was taken. Raises UserError where senses
    are open and nobody can be asked, or a table is wrong.
    """
    kept = out / FILE
    settled = {}
    if option and option != FIRST:
        settled = read_senses(Path(option), wordnet, targets)
    elif kept.is_file():
        settled = read_senses(kept, wordnet, targets, may_be_open=True)
    found = [sense_of(wordnet, target, settled, option == FIRST) for target in targets]
    wanted = [target for target, senses in zip(targets, found, strict=True) if len(senses) > 1]
    if wanted and is_interactive(console):
        for number, senses in enumerate(found):
            if len(senses) > 1:
                found[number] = [asked(wordnet, targets[number].name, senses, console)]
    write_senses(kept, wordnet, targets, found)
    if wanted and any(len(senses) > 1 for senses in found):
        raise UserError(
            f"{len(wanted)} targets have several senses, such as '{wanted[0].name}': {kept} lists "
            "them; keep one line of each and run this again, or take the first of each with "
            "--senses first"
        )
    say(wordnet, targets, [senses[0] for senses in found], console)
    return [senses[0].synset for senses in found]


def sense_of(
    wordnet: WordNet, target: Target, settled: Mapping[str, str | None], take_first: bool
) -> list[Sense]:
    """Return what a target may mean; one sense where that is clear or settled."""
    if target.name in settled:
        return [Sense(settled[target.name], "table")]
    synset, words = parts(target.name)
    if synset and wordnet.version == "3.0":
        return [by_id(wordnet, synset, words or target.word)]
    if synset and not (words := words or target.word):
        raise UserError(
            f"'{target.name}' is an id of WordNet 3.0, but this WordNet is "
            f"{wordnet.version or 'of an unknown version'}, whose ids are others: name the class, "
            "or take WordNet 3.0"
        )
    for name, by in spellings(words):
        if meanings := wordnet.meanings(name):
            if len(meanings) > 1 and take_first:
                return [Sense(meanings[0], f"first of {len(meanings)} senses")]
            return [Sense(one, by if len(meanings) == 1 else OPEN) for one in meanings]
    return [Sense(None, "unknown")]


def parts(name: str) -> tuple[str, str]:
    """Return the id in a name, and its words; either may be empty."""
    if is_id(name):
        return name, ""
    match = WITH_NAME.fullmatch(name)
    return (match[1], match[2].replace("_", " ")) if match else ("", name)


def by_id(wordnet: WordNet, synset: str, words: str) -> Sense:
    """Return the sense of an id of WordNet 3.0; what else it is called there is told."""
    if synset not in wordnet.lemmas:
        return Sense(None, "unknown")
    names = {normalised(lemma) for lemma in wordnet.lemmas[synset]}
    differs = bool(words) and normalised(words) not in names
    return Sense(synset, f"id, which WordNet does not call '{words}'" if differs else "id")


def spellings(words: str) -> list[tuple[str, str]]:
    """Return what a name may be found as: as it stands, without a number before it, and of a
    subspecies the species.
    """
    found = [(words, "name")]
    bare = NUMBERED.sub("", words, count=1)
    if bare != words:
        found.append((bare, "name without its number"))
    scientific = re.split(r"[\s_]+", bare)
    if len(scientific) == 3 and bare[0].isupper() and bare[1:] == bare[1:].lower():
        genus, species, subspecies = scientific
        found += [(f"{genus} {species}", "species"), (f"{genus} {subspecies}", "species")]
    return found


# --- asking


def is_interactive(console: Console) -> bool:
    """Return whether somebody can answer."""
    return console.is_terminal and sys.stdin is not None and sys.stdin.isatty()


def asked(wordnet: WordNet, name: str, senses: Sequence[Sense], console: Console) -> Sense:
    """Show the senses of a target and return the one that is chosen."""
    table = Table(title=f"{escape(name)} has {len(senses)} senses", title_justify="left")
    for column in ("", "words", "a kind of", "gloss"):
        table.add_column(column)
    for number, sense in enumerate(senses, start=1):
        _, words, parent, gloss, _ = described(wordnet, sense)
        table.add_row(str(number), *map(escape, (words, parent, gloss)))
    console.print(table)
    choices = [str(number) for number in range(len(senses) + 1)]
    chosen = IntPrompt.ask("which one? 0: none of these", console=console, choices=choices)
    return senses[chosen - 1]._replace(by="asked") if chosen else Sense(None, "asked")


def say(
    wordnet: WordNet, targets: Sequence[Target], senses: Sequence[Sense], console: Console
) -> None:
    """Print what was taken by anything but an id or a name that has one sense."""
    told = [
        (target.name, *described(wordnet, sense))
        for target, sense in zip(targets, senses, strict=True)
        if sense.by not in ("id", "name", "table", "asked", "unknown")
    ]
    if not told:
        return
    table = Table(title="what targets were taken for", title_justify="left")
    for column in ("target", "is", "a kind of", "gloss", "by"):
        table.add_column(column)
    for name, _, words, parent, gloss, by in told[:SHOWN]:
        table.add_row(*map(escape, (name, words, parent, gloss, by)))
    console.print(table)
    if len(told) > SHOWN:
        console.print(f"and {len(told) - SHOWN:,} more: see {FILE}", highlight=False)


SHOWN = 12  # rows on the screen


def described(wordnet: WordNet, sense: Sense) -> tuple[str, str, str, str, str]:
    """Return synset, words, what it is a kind of, gloss, and by what it was found."""
    if sense.synset is None:
        return "", "", "", "", sense.by
    above = [
        lemma
        for of in wordnet.parents.get(sense.synset, ())
        for lemma in wordnet.lemmas.get(of, [])[:1]
    ]
    words = ", ".join(wordnet.lemmas[sense.synset][:3])
    gloss = wordnet.definitions.get(sense.synset, "")
    return sense.synset, words, ", ".join(above), gloss, sense.by


# --- tables


def write_senses(
    file: Path, wordnet: WordNet, targets: Sequence[Target], found: Sequence[Sequence[Sense]]
) -> None:
    """Write what each target was taken for; where that is open, a line for each sense."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for target, senses in zip(targets, found, strict=True):
        for sense in senses:
            table.writerow([target.name, *described(wordnet, sense)])
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, text.getvalue())


def read_senses(
    file: Path, wordnet: WordNet, targets: Sequence[Target], may_be_open: bool = False
) -> dict[str, str | None]:
    """Return the synset of targets that a CSV with the columns target and synset names; an empty
    one is none.

    may_be_open: several lines of a target leave it open, which else is a UserError, as is a target
    or a synset that is not known.
    """
    names = {target.name for target in targets}
    found: dict[str, str | None] = {}
    repeated: set[str] = set()
    for line, row in read_rows(file, ("target", "synset")):
        target, synset = row["target"].strip(), row["synset"].strip()
        place = f"{file}, line {line}"
        if target not in names:
            if may_be_open:  # of other targets, which the folder had before
                continue
            near = did_you_mean(target, sorted(names))
            raise UserError(f"{place}: there is no target '{target}'{near}")
        if synset and synset not in wordnet.lemmas:
            raise UserError(f"{place}: this WordNet has no synset '{synset}'")
        if target in found:
            repeated.add(target)
            if not may_be_open:
                raise UserError(f"{place}: '{target}' has several lines: keep one of them")
        found[target] = synset or None
    return {target: synset for target, synset in found.items() if target not in repeated}
