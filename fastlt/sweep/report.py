"""`fastlt report DIR` of a sweep: what its page says, gathered from the study."""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from fastlt.classes import ClassSpace
from fastlt.config import load_config
from fastlt.errors import UserError
from fastlt.reports.sweep import (
    SPOKEN,
    Effect,
    Heat,
    Point,
    Spread,
    SweepPage,
    Trials,
    write_effects,
    write_sweep_page,
)
from fastlt.sweep.analysis import Level, Study, read_study
from fastlt.sweep.spec import Range
from fastlt.utils.groups import Grouping
from fastlt.utils.run_files import METRICS

SHOWN_POINTS, SHOWN_EFFECTS = 40, 3


def write_sweep_report(out: Path, axes: Sequence[str] = ()) -> Path:
    """Write DIR/report.html and DIR/effects.png, and return the path of the page.

    axes: the two of the heat map; by default those of the largest effects. Raises UserError where
    there are no such axes, or nothing has been measured.
    """
    study = read_study(out)
    if unknown := [axis for axis in axes if axis not in study.axes]:
        raise UserError(
            f"--axes: there is no axis '{unknown[0]}' with values to compare; axes: "
            f"{', '.join(study.axes)}"
        )
    if ranges := [axis for axis in axes if study.is_range(axis)]:
        raise UserError(
            f"--axes: {ranges[0]} is a range, of whose values there is one trial each: name axes "
            "that are lists"
        )
    if axes and len(set(axes)) != 2:
        raise UserError("--axes names two axes, as --axes silence,neighbours")
    path = out / "report.html"
    lists = [axis for axis in study.by_size if not study.is_range(axis)]
    write_sweep_page(page_of(study, list(axes) or lists[:2]), path)
    if study.by_size:  # else one value of each axis: there is nothing to draw
        write_effects(
            [effect(study, axis) for axis in study.by_size[:SHOWN_EFFECTS]], out / "effects.png"
        )
    return path


def page_of(study: Study, pair: Sequence[str]) -> SweepPage:
    """Return what the page shows. pair: the two axes of the heat map, or fewer for none."""
    best = study.ranked[0]
    over = ("finished", "stopped early")
    return SweepPage(
        title=study.out.resolve().name,
        recipe=study.sweep.recipe,
        metric=study.sweep.search.metric,
        story=story(study),
        command=command(study, best),
        spans={axis: span(study, axis) for axis in study.axes},
        groups=group_spans(study, best),
        points=[point(study, level) for level in study.ranked[:SHOWN_POINTS]],
        effects=[effect(study, axis) for axis in study.by_size],
        heat=heat(study, pair) if len(pair) == 2 else None,
        cost=study.cost(),
        stopped=sum(row["status"] == "stopped early" for row in study.rows),
        not_done=[row for row in study.rows if row["status"] not in over],
        more=max(0, len(study.ranked) - SHOWN_POINTS),
    )


def story(study: Study) -> str:
    """Return the answer in a few sentences."""
    metric, best, base = study.sweep.search.metric, study.ranked[0], study.baseline
    sentences = [f"The best of {len(study.ranked)} points is {spoken(study, best)}."]
    if base is None:
        sentences += ["The baseline was not measured."] if study.sweep.baseline else []
    elif best in study.differences:
        gain = study.differences[best]
        sentences.append(
            f"That is {gain.mean:+.1f} points {SPOKEN[metric]} over "
            f"{spoken(study, base)}{chance(gain.p)}."
        )
    else:
        sentences.append("That is the baseline itself: nothing else was better.")
    if study.spread(study.points[best], metric).seeds < 2:
        sentences.append("It has one seed alone: differences may be chance.")
    for axis in [axis for axis in study.by_size if not study.is_range(axis)][:2]:
        means = {
            value: of[metric].mean for value, of in study.effect(axis).items() if of[metric].seeds
        }
        high, low = max(means, key=lambda v: means[v]), min(means, key=lambda v: means[v])
        sentences.append(
            f"On average {axis} = {high} is best, {means[high] - means[low]:.1f} points above "
            f"{axis} = {low}."
        )
    return " ".join(sentences)


def chance(p: float | None) -> str:
    """Return how likely a difference is chance, in words."""
    if p is None:
        return ""
    return f", p = {p:.2g}" if p < 0.05 else f"; over these seeds that may be chance, p = {p:.2f}"


def spoken(study: Study, level: Level) -> str:
    """Return a point in words."""
    return ", ".join(
        f"{axis} = {brief(value)}" for axis, value in zip(study.axes, level, strict=True)
    )


def brief(value: str) -> str:
    """Return a value of an axis, long numbers to four digits."""
    try:
        return f"{float(value):.4g}" if len(value) > 6 else value
    except ValueError:
        return value


def span(study: Study, axis: str) -> str:
    """Return the values of an axis in words."""
    values = study.values(axis)
    return (
        f"{brief(values[0])} to {brief(values[-1])}" if study.is_range(axis) else ", ".join(values)
    )


def command(study: Study, level: Level) -> str:
    """Return the command that trains a point again, with the first of its seeds."""
    row = study.points[level][0]
    pack = pack_of(study.out / "runs" / row["run"])
    recipe = study.sweep.recipe
    method = f" --method {study.sweep.method}" if study.sweep.method else ""
    settings = [
        setting for setting in json.loads(row["settings"]) if not setting.startswith("data.pack=")
    ]
    return (
        f"fastlt train {recipe} --data {shlex.quote(pack)} --out RUN{method} "
        f"{' '.join(map(shlex.quote, settings))}"
    )


def group_spans(study: Study, level: Level) -> dict[str, str]:
    """Return the training images of each group of a point, in words; of a run that was removed, as
    they are by default.
    """
    run = study.out / "runs" / study.points[level][0]["run"]
    try:
        grouping = load_config(str(run / "config.toml")).data.grouping
        space = ClassSpace.load(run / "classes.json")
    except UserError:
        return Grouping().spans([])
    return grouping.spans(space.train_counts[: space.num_targets])


def pack_of(run: Path) -> str:
    """Return the pack of a run, or PACK where the run was removed."""
    try:
        return load_config(str(run / "config.toml")).data.pack
    except UserError:
        return "PACK"


# --- in figures


def figures(study: Study, level: Level) -> dict[str, Spread]:
    """Return the figures of a point, by metric."""
    return {name: study.spread(study.points[level], name) for name in METRICS}


def point(study: Study, level: Level) -> Point:
    """Return a point as the page shows it."""
    return Point(
        values=[brief(value) for value in level],
        figures=figures(study, level),
        difference=study.differences.get(level),
        is_baseline=level == study.baseline,
        is_same=study.is_baseline(level),
    )


def effect(study: Study, axis: str) -> Effect:
    """Return the effect of an axis: means of each value, and for a range the single trials."""
    values = {brief(value): of for value, of in study.effect(axis).items()}
    listed = study.sweep.axes[axis]
    if not isinstance(listed, Range):
        return Effect(axis, values, None)
    dots = {
        name: [(float(row[axis]), row[name]) for row in study.measured if row[name] is not None]
        for name in METRICS
    }
    return Effect(axis, values, Trials(listed.log, dots))


def heat(study: Study, pair: Sequence[str]) -> Heat:
    """Return the sweep's metric over two axes, others averaged."""
    metric, (down, across) = study.sweep.search.metric, pair
    columns = study.values(across)
    rows = []
    for value in study.values(down):
        own = [row for row in study.measured if str(row[down]) == value]
        cells = [
            study.spread([row for row in own if str(row[across]) == column], metric)
            for column in columns
        ]
        rows.append((value, cells))
    return Heat(down, across, columns, rows)
