"""`fastlt report` of a run: one self-contained HTML page: how good, for whom, what is confused.

The page is `templates/report.html`; here is what it shows: figures, tables and images, ready to
print.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fastlt.classes import ClassSpace
from fastlt.errors import UserError
from fastlt.packing.reader import Pack, Split, open_pack
from fastlt.reports import charts
from fastlt.utils.files import write_text
from fastlt.utils.run_files import read_run_files
from fastlt.utils.thumbnail import thumbnail

# By its path, for `python -m fastlt` may find a folder of the same name where it was called.
TEMPLATES = Path(__file__).parent / "templates"
GROUPS = {"many": "more than 100", "medium": "20 to 100", "few": "fewer than 20"}
SHOWN_CONFUSIONS, SHOWN_ERRORS, SHOWN_IMAGES, SHOWN_NEIGHBOURS = 12, 18, 6, 4
MATRIX_UP_TO = 32  # targets; a larger matrix fits no screen


@dataclass(frozen=True)
class Run:
    """A finished run; an absent file is an empty value."""

    path: Path
    config: dict[str, Any]
    result: dict[str, Any]
    epochs: list[dict[str, Any]]
    space: ClassSpace
    predictions: dict[str, np.ndarray]

    @cached_property
    def groups(self) -> list[str]:
        """The group of each target."""
        of = {target: name for name, members in self.space.groups().items() for target in members}
        return [of[target] for target in range(self.space.num_targets)]

    @cached_property
    def by_frequency(self) -> list[int]:
        """The target ids, most training images first."""
        return sorted(
            range(self.space.num_targets), key=lambda target: -self.space.train_counts[target]
        )

    @cached_property
    def per_class(self) -> list[float | None]:
        """The accuracy of each target, None where not known.

        Raises UserError where it is damaged.
        """
        known = self.result.get("per_class") or [None] * self.space.num_targets
        if len(known) != self.space.num_targets:
            found = f"result.json has {len(known)} classes, classes.json {self.space.num_targets}"
            raise UserError(f"{self.path} is damaged: {found}; train again")
        return known

    @cached_property
    def confusion(self) -> list[tuple[int, int, int]]:
        """The confusions (true, predicted, count), off the diagonal, most frequent first."""
        return sorted(
            (tuple(entry) for entry in self.result.get("confusion", [])),
            key=lambda entry: -entry[2],
        )


class Relation:
    """The class graph: who neighbours whom, and which targets share an auxiliary."""

    def __init__(self, space: ClassSpace):
        self.space = space
        self.neighbours: dict[int, list[int]] = {target: [] for target in range(space.num_targets)}
        self.owners: dict[int, list[int]] = {}
        for target, auxiliary in space.pairs:
            self.neighbours[target].append(auxiliary)
            self.owners.setdefault(auxiliary, []).append(target)

    def shared(self, first: int, second: int) -> list[str]:
        """Return the names of the auxiliaries that neighbour both targets."""
        return [
            self.space.names[auxiliary]
            for auxiliary in self.neighbours[first]
            if auxiliary in self.neighbours[second]
        ]

    @cached_property
    def siblings(self) -> set[tuple[int, int]]:
        """The pairs (target, target), both ways, of targets that share an auxiliary."""
        return {(a, b) for owners in self.owners.values() for a in owners for b in owners if a != b}

    def grouped(self, order: Sequence[int]) -> list[int]:
        """Return the targets of `order`, those that share auxiliaries next to each other."""
        beside: dict[int, list[int]] = {}
        for a, b in sorted(self.siblings):
            beside.setdefault(a, []).append(b)
        arranged: dict[int, None] = {}
        for start in order:
            waiting = [start]
            while waiting:
                target = waiting.pop()
                if target not in arranged:
                    arranged[target] = None
                    waiting += beside.get(target, [])
        return list(arranged)


def write_report(run: Path, *, pack: Path | None = None) -> Path:
    """Write RUN/report.html, one page that needs no other file and no network; return its path.

    `pack` is where the sample images are; without it the pack that the run was trained on, and no
    images where that is gone.

    Raises:
        UserError: `run` is not a finished run, one of its files is damaged, or `pack` has other
            targets.

    """
    content = read_run(Path(run))
    opened, absent = find_pack(content, pack)
    path = Path(run) / "report.html"
    write_text(path, render(content, opened, absent))
    return path


def read_run(path: Path) -> Run:
    """Return what the page shows of a run. Raise UserError where it is no finished one."""
    files = read_run_files(path)
    space = ClassSpace.load(path / "classes.json")
    return Run(path, files.config, files.result, files.epochs, space, files.predictions)


def find_pack(run: Run, path: Path | None) -> tuple[Pack | None, str]:
    """Return the pack with the sample images, or None and a sentence that says why not.

    A pack that was named must be right.
    """
    where = path or run.config.get("data", {}).get("pack")
    if not where:
        return None, "The configuration names no pack, so there are no sample images."
    try:
        pack = open_pack(where)
        if pack.space.target_names != run.space.target_names:
            raise UserError(
                f"the pack {where} has other target classes than the run {run.path}: name the pack "
                "it was trained on"
            )
    except UserError as error:
        if path is not None:
            raise
        return None, f"There are no sample images: {error}."
    return pack, ""


def render(run: Run, pack: Pack | None, absent: str = "") -> str:
    """Return the page as text."""
    space = run.space if run.space.pairs or pack is None else pack.space
    relation = Relation(space)
    return (
        environment()
        .get_template("report.html")
        .render(
            run=run,
            title=run.path.resolve().name,
            space=run.space,
            result=run.result,
            group_names=GROUPS,
            group_rows=group_rows(run),
            story=story(run),
            curves=curves(run),
            class_chart=class_chart(run),
            class_rows=class_rows(run, relation),
            extremes=extremes(run),
            graph=graph_summary(run, relation),
            errors=error_summary(run, relation),
            matrix=matrix(run, relation),
            group_flow=group_flow(run),
            absent=absent,
            samples=samples(run, relation, pack),
            mistakes=mistakes(run, relation, pack),
        )
    )


def environment() -> Environment:
    """Return the templates, with the filters that all of them use."""
    templates = FileSystemLoader(TEMPLATES)
    found = Environment(
        loader=templates,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {
        "percent": percent,
        "number": number,
        "duration": duration,
        "value": config_value,
    }
    return found


# --- how good, for whom


def group_rows(run: Run) -> list[dict[str, Any]]:
    """Return a row for all targets, then many, medium and few.

    Each has classes, training images, last and best accuracy; None where there is no class.
    """
    counts, best = run.space.train_counts, run.result.get("best") or {}
    rows = [
        _group_row(
            "all",
            "every class",
            range(run.space.num_targets),
            counts,
            run.result["top1"],
            best.get("top1"),
        )
    ]
    for name, members in run.space.groups().items():
        rows.append(
            _group_row(
                name,
                f"{GROUPS[name]} images",
                members,
                counts,
                run.result.get(name),
                best.get(name),
            )
        )
    return rows


def _group_row(
    name: str,
    what: str,
    members: Sequence[int],
    counts: list[int],
    accuracy: float | None,
    best: float | None,
) -> dict[str, Any]:
    if not members:
        accuracy = best = None
    images = sum(counts[target] for target in members)
    return {
        "name": name,
        "what": what,
        "classes": len(members),
        "images": images,
        "accuracy": accuracy,
        "best": best,
    }


def story(run: Run) -> str:
    """Return the first screen's answer, in a sentence."""
    shares = {name: run.result.get(name) for name, members in run.space.groups().items() if members}
    known = [(name, share) for name, share in shares.items() if share is not None]
    if len(known) < 2:
        return (
            "All classes are of one frequency group, so there is no gap between common and rare "
            "ones."
        )
    (common, high), (rare, low) = known[0], known[-1]
    words = {"many": "common", "medium": "middling", "few": "rare"}
    gap = abs(high - low)
    order = "fewer" if high >= low else "more"
    return (
        f"Of 100 images of {words[rare]} classes ({GROUPS[rare]} training images) {low:.0f} are "
        "recognised, "
        f"{gap:.0f} {order} than of {words[common]} ones ({GROUPS[common]})."
    )


def curves(run: Run) -> list[Markup]:
    """Return loss and accuracy over epochs, as far as metrics.jsonl has them."""
    drawn = []
    if losses := [
        (line["epoch"] + 1, line["loss"]) for line in run.epochs if line.get("loss") is not None
    ]:
        drawn.append(charts.loss_curve(*zip(*losses, strict=True)))
    if evaluated := [line for line in run.epochs if line.get("top1") is not None]:
        names = {"top-1": "top1", "many": "many", "medium": "medium", "few": "few"}
        by_name = {name: [line.get(key) for line in evaluated] for name, key in names.items()}
        drawn.append(charts.accuracy_curves([line["epoch"] + 1 for line in evaluated], by_name))
    return drawn


def class_chart(run: Run) -> Markup | None:
    """Return the accuracies of all classes; None where none is known."""
    if all(value is None for value in run.per_class):
        return None
    pick = run.by_frequency
    return charts.class_accuracies(
        [run.space.target_names[target] for target in pick],
        [run.space.train_counts[target] for target in pick],
        [run.per_class[target] for target in pick],
        [run.groups[target] for target in pick],
    )


def class_rows(run: Run, relation: Relation) -> list[dict[str, Any]]:
    """Return a row for every target, most frequent first."""
    return [
        {
            "name": run.space.target_names[target],
            "group": run.groups[target],
            "train": run.space.train_counts[target],
            "val": run.space.val_counts[target],
            "accuracy": run.per_class[target],
            "neighbours": len(relation.neighbours[target]),
        }
        for target in run.by_frequency
    ]


def extremes(run: Run) -> dict[str, list[tuple[str, int, float]]]:
    """Return the five worst and the five best classes: (name, training images, accuracy)."""
    every = zip(run.per_class, run.space.train_counts, run.space.target_names, strict=False)
    known = [(value, count, name) for value, count, name in every if value is not None]
    ranked = [(name, count, value) for value, count, name in sorted(known)]
    return {"worst": ranked[:5], "best": ranked[::-1][:5]} if len(ranked) >= 10 else {}


# --- the class graph and the confusions


def graph_summary(run: Run, relation: Relation) -> dict[str, Any] | None:
    """Return what is known of the graph; None where there are no pairs at all."""
    space = relation.space
    if not space.pairs:
        return None
    sizes = [len(found) for found in relation.neighbours.values()]
    lonely = [
        space.target_names[target] for target, found in relation.neighbours.items() if not found
    ]
    loss = run.config.get("loss", {})
    return {
        "trained": bool(run.space.pairs),
        "pairs": len(space.pairs),
        "targets": space.num_targets,
        "auxiliaries": space.num_auxiliaries,
        "minimum": min(sizes),
        "median": float(np.median(sizes)),
        "maximum": max(sizes),
        "lonely": lonely,
        "several": sum(len(owners) > 1 for owners in relation.owners.values()),
        "siblings": len(relation.siblings) // 2,
        "images": sum(space.train_counts[space.num_targets :]),
        "budget": run.config.get("data", {}).get("budget"),
        "loss": loss.get("name"),
        "silence": loss.get("silence"),
        "mask": loss.get("mask", loss.get("directions")),
        "chart": charts.histogram(sizes, "auxiliaries", "targets"),
        "curation": space.curation,
        "rows": [
            (
                space.target_names[target],
                [space.names[auxiliary] for auxiliary in relation.neighbours[target]],
            )
            for target in run.by_frequency
        ],
    }


def error_summary(run: Run, relation: Relation) -> dict[str, Any]:
    """Return the most frequent confusions, and the share of errors between related targets.

    Targets are related that share an auxiliary.
    """
    total = sum(count for _, _, count in run.confusion)
    between = sum(
        count for true, predicted, count in run.confusion if (true, predicted) in relation.siblings
    )
    ordered_pairs = run.space.num_targets * (run.space.num_targets - 1)
    return {
        "total": total,
        "between": between,
        "share": 100 * between / total if total else None,
        "chance": 100 * len(relation.siblings) / ordered_pairs if ordered_pairs else None,
        "rows": [
            _confusion_row(run, relation, *entry) for entry in run.confusion[:SHOWN_CONFUSIONS]
        ],
        "kinds": len(run.confusion),
    }


def _confusion_row(
    run: Run, relation: Relation, true: int, predicted: int, count: int
) -> dict[str, Any]:
    images, names = run.space.val_counts[true], run.space.target_names
    return {
        "true": names[true],
        "predicted": names[predicted],
        "count": count,
        "share": 100 * count / images if images else None,
        "shared": relation.shared(true, predicted),
        "true_group": run.groups[true],
        "predicted_group": run.groups[predicted],
    }


def matrix(run: Run, relation: Relation) -> list[dict[str, Any]]:
    """Return the confusion matrix in percent of each true class, related classes together.

    It is empty where there are too many targets for it.
    """
    if run.space.num_targets > MATRIX_UP_TO or not run.confusion:
        return []
    order = relation.grouped(run.by_frequency)
    shares = {
        (true, predicted): 100 * count / max(1, run.space.val_counts[true])
        for true, predicted, count in run.confusion
    }
    shares |= {
        (target, target): value for target, value in enumerate(run.per_class) if value is not None
    }
    return [
        {
            "name": run.space.target_names[true],
            "cells": [
                {
                    "share": shares.get((true, p), 0.0),
                    "same": true == p,
                    "sibling": (true, p) in relation.siblings,
                }
                for p in order
            ],
        }
        for true in order
    ]


def group_flow(run: Run) -> list[dict[str, Any]]:
    """Return where the images of each group end up, in percent of the group's images.

    That is right, or wrongly in many, medium or few.
    """
    rows = []
    for name in GROUPS:
        images = sum(
            run.space.val_counts[target] for target, group in enumerate(run.groups) if group == name
        )
        wrong: Counter[str] = Counter()
        for true, predicted, count in run.confusion:
            if run.groups[true] == name:
                wrong[run.groups[predicted]] += count
        if images:
            shares = {group: 100 * wrong[group] / images for group in GROUPS}
            rows.append({"name": name, "right": 100 - sum(shares.values()), "wrong": shares})
    return rows if run.confusion else []


# --- sample images


def samples(run: Run, relation: Relation, pack: Pack | None) -> list[dict[str, Any]]:
    """Return the worst, the rarest and the most common classes with images.

    They are some of their training images and of their neighbours'.
    """
    if pack is None:
        return []
    ranked = sorted(
        (value, target) for target, value in enumerate(run.per_class) if value is not None
    )
    picks = {target: "worst" for _, target in ranked[:3]}
    for target in run.by_frequency[:-4:-1]:
        picks.setdefault(target, "rarest")
    for target in run.by_frequency[:2]:
        picks.setdefault(target, "most common")
    return [_sample(run, relation, pack, target, why) for target, why in picks.items()]


def _sample(run: Run, relation: Relation, pack: Pack, target: int, why: str) -> dict[str, Any]:
    # The run's graph and the pack's may differ (another subset of auxiliaries): names are what they
    # have in common.
    ids = {name: i for i, name in enumerate(pack.space.names)}
    trained_on = relation.neighbours[target][:SHOWN_NEIGHBOURS] if run.space.pairs else []
    neighbours = [relation.space.names[auxiliary] for auxiliary in trained_on]
    return {
        "name": run.space.target_names[target],
        "why": why,
        "group": run.groups[target],
        "count": run.space.train_counts[target],
        "accuracy": run.per_class[target],
        "images": thumbnails(
            pack.train, _spread_over(np.flatnonzero(pack.train.label == target), SHOWN_IMAGES)
        ),
        "neighbours": [
            (name, uri)
            for name in neighbours
            if name in ids
            for uri in thumbnails(pack.train, np.flatnonzero(pack.train.label == ids[name])[:1])
        ],
    }


def _spread_over(values: np.ndarray, most: int) -> np.ndarray:
    return (
        values[np.unique(np.linspace(0, len(values) - 1, min(most, len(values))).astype(int))]
        if len(values)
        else values
    )


def mistakes(run: Run, relation: Relation, pack: Pack | None) -> list[dict[str, Any]]:
    """Return the most confident errors, one for each kind of confusion."""
    found = run.predictions
    if pack is None or not found or not _same_images(found, pack.val):
        return []
    wrong = np.flatnonzero(found["label"] != found["predicted"])
    chosen: dict[tuple[int, int], int] = {}
    for i in wrong[np.argsort(-found["confidence"][wrong], kind="stable")]:
        chosen.setdefault((int(found["label"][i]), int(found["predicted"][i])), int(i))
        if len(chosen) == SHOWN_ERRORS:
            break
    names = run.space.target_names
    return [
        {
            "true": names[true],
            "predicted": names[predicted],
            "confidence": 100 * float(found["confidence"][i]),
            "sibling": (true, predicted) in relation.siblings,
            "image": uri,
        }
        for (true, predicted), i in chosen.items()
        for uri in thumbnails(pack.val, [int(found["image"][i])])
    ]


def _same_images(predictions: dict[str, np.ndarray], split: Split) -> bool:
    """Return whether the predictions were made on this split: its labels are those of them."""
    image = predictions["image"]
    return (
        len(image) > 0
        and int(image.max()) < len(split)
        and bool((split.label[image] == predictions["label"]).all())
    )


def thumbnails(split: Split, images: Iterable[int]) -> list[str]:
    """Return data URIs of small JPEGs; an image that cannot be decoded is left out."""
    return [uri for image in images if (uri := thumbnail(bytes(split.read(int(image)))))]


# --- figures as text


def percent(value: float | None) -> str:
    """Return a percentage with one decimal, - where not known."""
    return "-" if value is None else f"{value:.1f}"


def number(value: float | None) -> str:
    """Return a number with separators, - where not known."""
    return "-" if value is None else f"{value:,.0f}"


def duration(seconds: float | None) -> str:
    """Return seconds as a duration in words."""
    if seconds is None:
        return "-"
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return (
        f"{hours} h {minutes} min"
        if hours
        else f"{minutes} min {seconds} s"
        if minutes
        else f"{seconds} s"
    )


def config_value(value: Any) -> str:
    """Return a value of the configuration as text."""
    return value if isinstance(value, str) else json.dumps(value)
