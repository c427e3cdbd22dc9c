"""`fastlt granularity train`: whether a long tail hurts less where classes are finer.

It is the quantitative study of the paper, on any pack with a hierarchy over its classes.

Each level is trained on a balanced and on a long-tailed set, all of as many images. With the number
of classes fixed, they are drawn from all parents, one each, up to all children of a few; and the
parents themselves, each with the images of its children. With the parents fixed, the same few are
distinguished as parents, or by their children.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.table import Table

from fastlt.errors import UserError
from fastlt.packing.reader import Pack, Split, open_pack
from fastlt.packing.relabel import Selection, derive_pack
from fastlt.studies.hierarchy import most_families, read_hierarchy
from fastlt.studies.repeated import Control, spread, train_all
from fastlt.studies.two_stage import NOTE, TITLE, of_second_stage, with_second_stage
from fastlt.utils.files import write_text
from fastlt.utils.results_file import append_rows, check_file
from fastlt.utils.run_files import METRICS

KINDS = ("balanced", "long-tailed")
SPOKEN = {
    "study": "another question",
    "pack": "another pack",
    "families": "another hierarchy",
    "imbalance": "another imbalance",
    "images": "other draws",
}
LARGEST = 500  # training images that are used of a class at most


class Level(NamedTuple):
    """A set of classes, each the union of some of the pack's; finer ones come last."""

    name: str
    classes: dict[str, list[int]]  # name -> target ids of the pack


class StudyOptions(NamedTuple):
    """The options of the command."""

    pack: str
    hierarchy: str
    out: Path
    draws: int  # of classes, of the images, and of the training
    parallel: int
    imbalance: float
    settings: list[str]
    two_stage: bool = False


def run_granularity_study(options: StudyOptions, csv: Path | None, console: Console) -> None:
    """Run the study. Runs that have finished in --out are not run again. Raises UserError."""
    if csv is not None:
        check_file(csv)
    controls = controls_of(open_pack(options.pack), options)
    rows = train_all("cifar100-siblings", controls, options.out, 1, options.parallel, console)
    if options.two_stage:
        rows = with_second_stage(rows, options.out)
    rows = [study_row(row) for row in rows]
    print_tables(rows, "", console)
    if options.two_stage:
        print_tables(of_second_stage(rows), f"; {TITLE}", console)
        console.print(NOTE, highlight=False)
    if csv is not None:
        append_rows(csv, rows)
        console.print(f"added to {csv}")


def print_tables(rows: list[dict[str, Any]], more: str, console: Console) -> None:
    """Print the table of each kind of levels. more: how the title ends."""
    for fixed in ("classes", "parents"):
        own = [row for row in rows if row["level"].startswith(f"fixed {fixed}")]
        console.print(table(own, fixed, more))


def controls_of(pack: Pack, options: StudyOptions) -> dict[str, Control]:
    """Return the trainings of the study; their packs are made where they are not there yet."""
    families = most_families(read_hierarchy(options.hierarchy, pack.space.target_names))
    drawn = [
        levels(pack, families, np.random.default_rng([draw, 2])) for draw in range(options.draws)
    ]
    total = min(most_images(pack, level, options.imbalance) for found in drawn for level in found)
    if total < 2 * (most := max(len(level.classes) for level in drawn[0])):
        raise UserError(
            f"{options.pack} has too few images: a long tail of {most} classes would have "
            f"{total:,} training images"
        )
    check_study(
        options.out,
        {"pack": pack.id, "families": families, "imbalance": options.imbalance, "images": total},
    )
    controls = {}
    for draw, found in enumerate(drawn):
        for level in found:
            for kind, place in packs_of(pack, level, draw, total, options).items():
                settings = [
                    "loss.name=ce",
                    "data.auxiliary=false",
                    f"train.seed={draw}",
                    *options.settings,
                ]
                controls[f"{level.name} | {kind} | {draw}"] = Control(place, settings)
    return controls


def check_study(out: Path, wanted: dict[str, Any]) -> None:
    """Raise UserError where --out holds another study, or something else.

    What is trained there is kept in study.json.
    """
    if out.is_dir() and any(out.iterdir()) and not (out / "study.json").is_file():
        raise UserError(f"{out} holds other things than a study: choose another --out")
    try:
        kept = json.loads((out / "study.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        write_text(out / "study.json", json.dumps(wanted, ensure_ascii=False, indent=1) + "\n")
        return
    if changed := [name for name in wanted if kept.get(name) != wanted[name]]:
        raise UserError(
            f"{out} holds a study with {SPOKEN[changed[0]]}: choose another --out, or remove it"
        )


def levels(pack: Pack, families: Mapping[str, list[str]], rng: np.random.Generator) -> list[Level]:
    """Return the study's levels, drawn anew each time. families: parent -> its classes."""
    ids = {name: target for target, name in enumerate(pack.space.target_names)}
    children = {name: [ids[member] for member in members] for name, members in families.items()}
    if (count := len(children)) < 4:
        raise UserError(
            f"the hierarchy has {count} parents of two classes or more: the study needs 4"
        )
    names, each = list(children), min(map(len, children.values()))
    order = rng.permutation(count).tolist()
    found = [Level("fixed classes: parents", {name: children[name] for name in names})]
    for part in sorted({1, *divisors(count, each)}):
        chosen = [names[i] for i in order[: count // part]]
        drawn = {name: rng.permutation(children[name])[:part].tolist() for name in chosen}
        single = {pack.space.target_names[t]: [t] for targets in drawn.values() for t in targets}
        found.append(Level(f"fixed classes: {part} of a parent", single))
    few = [names[i] for i in order[: max(2, count // each)]]
    found.append(Level("fixed parents: parents", {name: children[name] for name in few}))
    found.append(
        Level(
            "fixed parents: children",
            {pack.space.target_names[t]: [t] for name in few for t in children[name]},
        )
    )
    return found


def divisors(count: int, most: int) -> list[int]:
    """Return the divisors of a number up to a limit."""
    return [part for part in range(2, most + 1) if count % part == 0]


def most_images(pack: Pack, level: Level, imbalance: float) -> int:
    """Return the most images of a long tail over the level's classes, whichever is the largest."""
    counts = pack.space.train_counts
    fewest = min(
        sum(min(LARGEST, counts[target]) for target in targets)
        for targets in level.classes.values()
    )
    return math.floor(fewest * tail_shares(imbalance, len(level.classes)).sum())


def packs_of(
    pack: Pack, level: Level, draw: int, total: int, options: StudyOptions
) -> dict[str, Path]:
    """Return the balanced and the long-tailed pack of a level, of `total` training images each."""
    names, found = list(level.classes), {}
    rng = np.random.default_rng([draw, 3])
    rank = rng.permutation(len(names))
    tail = tail_counts(total, options.imbalance, len(names))
    val = take(pack.val, level, [10**9] * len(names), rng)
    for kind, counts in zip(
        KINDS, (spread_evenly(total, len(names)), [tail[i] for i in rank]), strict=True
    ):
        place = (
            options.out / "packs" / f"{level.name.replace(':', '').replace(' ', '-')}-{kind}-{draw}"
        )
        if not place.is_dir():
            place.parent.mkdir(parents=True, exist_ok=True)
            derive_pack(pack, place, names, take(pack.train, level, counts, rng), val)
        found[kind] = place
    return found


def tail_shares(imbalance: float, classes: int) -> np.ndarray:
    """Return the images of each class (classes,) over those of the most frequent.

    They fall as in CIFAR-100-LT.
    """
    return imbalance ** (-np.arange(classes) / (classes - 1))


def tail_counts(total: int, imbalance: float, classes: int) -> list[int]:
    """Return the counts of a long tail of `total` images, each class one at least.

    The most frequent class makes up for what was rounded.
    """
    shares = tail_shares(imbalance, classes)
    counts = np.maximum(1, np.rint(total * shares / shares.sum())).astype(int)
    counts[0] += total - counts.sum()
    return counts.tolist()


def spread_evenly(total: int, classes: int) -> list[int]:
    """Return counts as equal as they can be."""
    return [total // classes + (i < total % classes) for i in range(classes)]


def take(split: Split, level: Level, counts: Sequence[int], rng: np.random.Generator) -> Selection:
    """Return a draw of `counts` images of each class, evenly from the classes that it unites."""
    images, labels = [], []
    for label, (targets, count) in enumerate(zip(level.classes.values(), counts, strict=True)):
        own = np.flatnonzero(np.isin(split.label, targets))
        chosen = np.sort(rng.permutation(own)[:count])
        images.append(chosen)
        labels.append(np.full(len(chosen), label))
    return Selection(np.concatenate(images), np.concatenate(labels))


def study_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a run's figures with level, kind and draw in columns of their own."""
    level, kind, draw = row["control"].split(" | ")
    return {
        "level": level,
        "kind": kind,
        "draw": int(draw),
        **{key: value for key, value in row.items() if key != "control"},
    }


def table(rows: Sequence[dict[str, Any]], fixed: str, more: str = "") -> Table:
    """Return the gaps of each level, mean and standard deviation over draws."""
    title = f"the number of {fixed} fixed: accuracy in percent, coarse levels first{more}"
    result = Table(
        "level", *KINDS, "balanced - long-tailed", "many - few", title=title, title_justify="left"
    )
    for level in dict.fromkeys(row["level"] for row in rows):
        of = {
            kind: {row["draw"]: row for row in rows if (row["level"], row["kind"]) == (level, kind)}
            for kind in KINDS
        }
        draws = sorted(of["balanced"].keys() & of["long-tailed"].keys())
        gaps = [of["balanced"][d]["top1"] - of["long-tailed"][d]["top1"] for d in draws]
        tails = [
            row["many"] - row["few"] if None not in (row["many"], row["few"]) else math.nan
            for row in of["long-tailed"].values()
        ]
        known: list[float | None] = [gap for gap in tails if not math.isnan(gap)]
        tops = [spread([of[kind][d][METRICS[0]] for d in draws]) for kind in KINDS]
        result.add_row(level.partition(": ")[2], *tops, spread(list(gaps)), spread(known))
    return result
