"""The hierarchy over classes: from a CSV, CIFAR-100's own superclasses, or WordNet.

A level gives each class its group. Levels are named, and go from fine to coarse.
"""

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from fastlt.errors import UserError
from fastlt.packing.cifar import open_cifar
from fastlt.utils.wordnet import WordNet, find_synsets, read_wordnet

Level = dict[str, str]  # class -> group


def read_hierarchy(place: str, names: Sequence[str]) -> dict[str, Level]:
    """Return the levels of a hierarchy, fine to coarse.

    place: a CSV with the columns class,parent, cifar100:DIR, wordnet:FOLDER or wn:LEXICON.

    Raises UserError where a class has no group, or nothing is grouped.
    """
    kind, _, rest = place.partition(":")
    if kind == "cifar100" and rest:
        return {"superclasses": of_cifar(Path(rest), names)}
    if kind in ("wordnet", "wn") and rest:
        return of_wordnet(read_wordnet(rest if kind == "wordnet" else place), names)
    return of_csv(Path(place), names)


def of_csv(file: Path, names: Sequence[str]) -> dict[str, Level]:
    """Return the levels of a CSV: the parents, and a level for each further column."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            rows = list(csv.DictReader(lines))
    except UnicodeDecodeError as error:
        raise UserError(f"the hierarchy {file} is not UTF-8: save it as such") from error
    except (OSError, csv.Error) as error:
        raise UserError(f"cannot read the hierarchy {file}: {error}") from error
    if not rows:
        raise UserError(
            f"the hierarchy {file} has no rows; the header is class,parent, and each row names a "
            "class"
        )
    if not {"class", "parent"} <= rows[0].keys():
        raise UserError(
            f"{file}, line 1: the header must be class,parent; further columns are coarser levels"
        )
    if twice := [
        name for name, times in Counter(row.get("class") for row in rows).items() if times > 1
    ]:
        raise UserError(f"{file} has '{twice[0]}' more than once: a class has one parent")
    found = {}
    for level in [name for name in rows[0] if name not in ("class", None)]:
        groups = {row["class"]: row[level] for row in rows}
        if missing := [name for name in names if not groups.get(name)]:
            more = f", and of {len(missing) - 1} more classes" if len(missing) > 1 else ""
            raise UserError(f"{file} has no {level} of '{missing[0]}'{more}")
        found["parents" if level == "parent" else level] = {name: groups[name] for name in names}
    return found


def of_cifar(folder: Path, names: Sequence[str]) -> Level:
    """Return CIFAR-100's superclasses."""
    cifar = open_cifar(folder)
    groups = {
        fine: cifar.coarse_names[coarse]
        for fine, coarse in zip(cifar.fine_names, cifar.coarse, strict=True)
    }
    if missing := [name for name in names if name not in groups]:
        raise UserError(
            f"'{missing[0]}' is no class of CIFAR-100: use a CSV with the columns class,parent"
        )
    return {name: groups[name] for name in names}


def of_wordnet(wordnet: WordNet, names: Sequence[str]) -> dict[str, Level]:
    """Return the levels of WordNet's tree, cut at each depth.

    What is less deep, or unknown to WordNet, stands for itself.

    Cuts that join nothing, join all, or are like the one before are left out.
    """
    synsets = dict(zip(names, find_synsets(wordnet, names), strict=True))
    if not any(synsets.values()):
        raise UserError(
            f"WordNet knows none of the classes, not even '{names[0]}': use a CSV with the columns "
            "class,parent"
        )
    paths = {name: way_down(wordnet, synset) if synset else [] for name, synset in synsets.items()}
    levels: dict[str, Level] = {}
    for depth in range(max(map(len, paths.values())) - 1, -1, -1):
        groups = {
            name: path[depth] if depth < len(path) else path[-1] if path else name
            for name, path in paths.items()
        }
        distinct = len(set(groups.values()))
        if 1 < distinct < len(names) and all(
            distinct != len(set(level.values())) for level in levels.values()
        ):
            levels[f"WordNet to depth {depth}"] = in_words(wordnet, groups)
    if not levels:
        raise UserError(
            "WordNet groups none of the classes: use a CSV with the columns class,parent"
        )
    return levels


def way_down(wordnet: WordNet, synset: str) -> list[str]:
    """Return the way from the root to a synset; of several hypernyms the first."""
    path = [synset]
    while (above := wordnet.parents.get(path[-1])) and above[0] not in path:
        path.append(above[0])
    return path[::-1]


def in_words(wordnet: WordNet, groups: Mapping[str, str]) -> Level:
    """Return groups by name, and by id too where two have the same name."""
    words = {
        group: wordnet.lemmas[group][0] if group in wordnet.lemmas else group
        for group in groups.values()
    }
    times = Counter(words.values())
    return {
        name: words[group] if times[words[group]] == 1 else f"{words[group]} ({group})"
        for name, group in groups.items()
    }


def most_families(levels: Mapping[str, Level]) -> dict[str, list[str]]:
    """Return the groups of several classes, and their classes, both sorted.

    They are of the level with most such groups, the finest of those.
    """
    found: dict[str, list[str]] = {}
    for level in levels.values():
        groups: dict[str, list[str]] = {}
        for name, group in level.items():
            groups.setdefault(group, []).append(name)
        families = {
            group: sorted(members) for group, members in sorted(groups.items()) if len(members) > 1
        }
        if len(families) > len(found):
            found = families
    return found
