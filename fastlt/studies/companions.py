"""`fastlt granularity related`: what is gained from classes that are trained beside a long tail.

A target of each of half of the families makes the long tail. Beside it are trained its siblings,
as many classes of the other families, half of either, or none for as many images: the subsets of
the paper's motivation (arXiv 2410.15980), on any pack with a hierarchy over its classes. All are
trained with plain cross entropy; predictions are over the targets alone.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from fastlt.config import load_config
from fastlt.errors import UserError
from fastlt.packing.reader import Pack, Split, open_pack
from fastlt.packing.relabel import Selection, derive_pack
from fastlt.studies.granularity_training import LARGEST, StudyOptions, check_study, tail_shares
from fastlt.studies.hierarchy import most_families, read_hierarchy
from fastlt.studies.repeated import Control, table, train_all
from fastlt.studies.two_stage import NOTE, TITLE, of_second_stage, with_second_stage
from fastlt.utils.results_file import append_rows, check_file

RECIPE = "cifar100-siblings"


class Companions(NamedTuple):
    """A long tail of targets, and the classes that are trained beside it; ids of the pack."""

    targets: list[int]  # most frequent first
    beside: dict[str, list[tuple[int, int]]]  # level -> (place of a sibling target or -1, class)


def run_related_study(options: StudyOptions, csv: Path | None, console: Console) -> None:
    """Run the study. Runs that have finished in --out are not run again. Raises UserError."""
    if csv is not None:
        check_file(csv)
    controls = controls_of(open_pack(options.pack), options)
    rows = train_all(RECIPE, controls, options.out, 1, options.parallel, console)
    rows = [study_row(row) for row in with_second_stage(rows, options.out)]
    console.print(table(rows))
    console.print(table(of_second_stage(rows), TITLE))
    console.print(NOTE, highlight=False)
    if csv is not None:
        append_rows(csv, rows)
        console.print(f"added to {csv}")


def controls_of(pack: Pack, options: StudyOptions) -> dict[str, Control]:
    """Return the trainings of the study; their packs are made where they are not there yet."""
    families = most_families(read_hierarchy(options.hierarchy, pack.space.target_names))
    study = {"study": "related", "pack": pack.id, "families": families}
    check_study(options.out, study | {"imbalance": options.imbalance})
    base = ["loss.name=ce", *options.settings]
    config = load_config(RECIPE, base)
    controls = {}
    for draw in range(options.draws):
        drawn = draw_companions(pack, families, np.random.default_rng([draw, 4]))
        counts = target_counts(pack, drawn.targets, options.imbalance)
        for level, beside in drawn.beside.items():
            place = options.out / "packs" / f"{level.replace(' ', '-')}-{draw}"
            if not place.is_dir():
                place.parent.mkdir(parents=True, exist_ok=True)
                write_level(pack, place, drawn.targets, counts, beside, draw)
            settings = [*base, f"train.seed={draw}"]
            if not beside:  # as many images as with companions
                more = len(drawn.beside["related"]) * config.data.budget / sum(counts)
                settings += [f"train.epochs={round(config.train.epochs * (1 + more))}"]
            controls[f"{level} | {draw}"] = Control(place, settings)
    return controls


def draw_companions(
    pack: Pack, families: dict[str, list[str]], rng: np.random.Generator
) -> Companions:
    """Return a draw of targets and their companions. families: parent -> its classes."""
    ids = {name: number for number, name in enumerate(pack.space.target_names)}
    if len(families) < 4:
        raise UserError(
            f"the hierarchy has {len(families)} parents of two classes or more: the study needs 4"
        )
    order = [list(families)[i] for i in rng.permutation(len(families))]
    own, others = order[: len(order) // 2], order[len(order) // 2 :]
    members = [rng.permutation([ids[name] for name in families[parent]]).tolist() for parent in own]
    strangers = [ids[name] for parent in others for name in families[parent]]
    strangers = rng.permutation(strangers).tolist()
    each = min(min(map(len, members)) - 1, len(strangers) // len(own))
    siblings = [
        (place, one) for place, family in enumerate(members) for one in family[1 : each + 1]
    ]
    beside: dict[str, list[tuple[int, int]]] = {"alone, as many images": [], "related": siblings}
    if half := each // 2:
        near = [
            (place, one) for place, family in enumerate(members) for one in family[1 : half + 1]
        ]
        far = strangers[: len(siblings) - len(near)]
        beside["half related"] = near + [(-1, one) for one in far]
    beside["unrelated"] = [(-1, one) for one in strangers[: len(siblings)]]
    return Companions([family[0] for family in members], beside)


def target_counts(pack: Pack, targets: list[int], imbalance: float) -> list[int]:
    """Return the training images of each target: a long tail from what the least of them has."""
    most = min(LARGEST, *(pack.space.train_counts[target] for target in targets))
    return np.maximum(1, np.rint(most * tail_shares(imbalance, len(targets)))).astype(int).tolist()


def write_level(
    pack: Pack,
    place: Path,
    targets: list[int],
    counts: list[int],
    beside: list[tuple[int, int]],
    draw: int,
) -> None:
    """Write the pack of a level: the targets, and the classes beside them as auxiliaries."""
    names = pack.space.target_names
    rng = np.random.default_rng([draw, 5])
    classes = [*targets, *(one for _, one in beside)]
    limits = [*counts, *[LARGEST] * len(beside)]
    derive_pack(
        pack,
        place,
        [names[target] for target in targets],
        chosen(pack.train, classes, limits, rng),
        chosen(pack.val, targets, [10**9] * len(targets), rng),
        [names[one] for _, one in beside],
        [(own, len(targets) + i) for i, (own, _) in enumerate(beside) if own >= 0],
    )


def chosen(
    split: Split, classes: list[int], limits: list[int], rng: np.random.Generator
) -> Selection:
    """Return up to so many images of each class, labelled by its place."""
    images = [
        np.sort(rng.permutation(np.flatnonzero(split.label == one))[:limit])
        for one, limit in zip(classes, limits, strict=True)
    ]
    labels = np.repeat(np.arange(len(images)), [len(some) for some in images])
    return Selection(np.concatenate(images), labels)


def study_row(row: dict[str, Any]) -> dict[str, Any]:
    """Return a run's figures by its level, with the draw in a column of its own."""
    level, draw = row["control"].split(" | ")
    return row | {"control": level, "draw": int(draw)}
