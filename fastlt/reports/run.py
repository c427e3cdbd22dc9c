"""`fastlt report` of a run: one self-contained HTML page: how good, for whom, what is confused.

The page is `templates/report.html`; here is what it shows: figures, tables and images, ready to
print.
"""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fastlt.errors import UserError
from fastlt.packing.reader import Pack, open_pack
from fastlt.reports import charts
from fastlt.reports.baseline import beside, read_baseline
from fastlt.reports.content import Relation, Run, read_run
from fastlt.reports.images import confused, mistakes, samples
from fastlt.utils.files import write_text
from fastlt.utils.groups import GROUPS

# By its path, for `python -m fastlt` may find a folder of the same name where it was called.
TEMPLATES = Path(__file__).parent / "templates"
SHOWN_CONFUSIONS = 12
MATRIX_UP_TO = 32  # targets; a larger matrix fits no screen


def write_report(run: Path, *, pack: Path | None = None, baseline: Path | None = None) -> Path:
    """Write RUN/report.html, one page that needs no other file and no network; return its path.

    `pack` is where the sample images are; without it the pack that the run was trained on, and no
    images where that is gone. `baseline` is a run that this one is held against.

    Raises:
        UserError: `run` or `baseline` is not a finished run, one of their files is damaged, or
            `pack` or `baseline` has other targets.

    """
    content = read_run(Path(run))
    held_against = None if baseline is None else read_baseline(content, Path(baseline))
    opened, absent = find_pack(content, pack)
    path = Path(run) / "report.html"
    write_text(path, render(content, opened, absent, held_against))
    return path


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


def render(run: Run, pack: Pack | None, absent: str = "", baseline: Run | None = None) -> str:
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
            group_names=run.spans,
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
            confused=confused(run, pack),
            mistakes=mistakes(run, relation, pack),
            beside=None if baseline is None else beside(run, baseline),
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
        "points": points,
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
    for name, members in run.members.items():
        rows.append(
            _group_row(
                name,
                f"{run.spans[name]} images" if members or run.spans[name] != "-" else "no class",
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
    shares = {name: run.result.get(name) for name, members in run.members.items() if members}
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
        f"Of 100 images of {words[rare]} classes ({run.spans[rare]} training images) {low:.0f} are "
        "recognised, "
        f"{gap:.0f} {order} than of {words[common]} ones ({run.spans[common]})."
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


# --- figures as text


def percent(value: float | None) -> str:
    """Return a percentage with one decimal, - where not known (None or NaN)."""
    return "-" if value is None or math.isnan(value) else f"{value:.1f}"


def points(value: float | None) -> str:
    """Return a difference in points with its sign, - where not known."""
    if value is None:
        return "-"
    rounded = round(value, 1) + 0.0  # no -0.0
    return f"{rounded:+.1f}" if rounded else "0.0"


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
