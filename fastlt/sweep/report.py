"""`fastlt report DIR` of a sweep: one page that answers what the sweep asked, and effects.png, its
main figure.
"""

import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from fastlt.config import load_config
from fastlt.errors import UserError
from fastlt.reports import charts
from fastlt.reports.run import environment
from fastlt.sweep.analysis import Level, Spread, Study, read_study
from fastlt.sweep.spec import METRICS
from fastlt.utils.files import whole_file, write_text

SHOWN_POINTS = 40
NAMES = {"top1": "all", "many": "many", "medium": "medium", "few": "few"}
SPOKEN = {"top1": "top-1", "many": "many-shot", "medium": "medium-shot", "few": "few-shot"}


def write_sweep_report(out: Path, axes: Sequence[str] = ()) -> Path:
    """axes: the two of the heat map; by default those of the largest effects."""
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
    write_text(
        path,
        render(
            study, list(axes) or [axis for axis in study.by_size if not study.is_range(axis)][:2]
        ),
    )
    if not study.by_size:  # one value of each axis: there is nothing to draw
        return path
    with whole_file(out / "effects.png") as temporary:
        charts.write_png(
            temporary,
            lambda figure, narrow: draw_effects(figure, study, study.by_size[:3], narrow),
            (1060, 380),
        )
    return path


def render(study: Study, pair: Sequence[str]) -> str:
    best = study.ranked[0]
    return (
        environment()
        .get_template("sweep.html")
        .render(
            title=study.out.resolve().name,
            study=study,
            best=best,
            best_spread=figures(study, best),
            story=story(study),
            command=command(study, best),
            points=[point(study, level) for level in study.ranked[:SHOWN_POINTS]],
            more=max(0, len(study.ranked) - SHOWN_POINTS),
            effects=[effect(study, axis) for axis in study.by_size],
            heat=heat(study, pair) if len(pair) == 2 else None,
            cost=study.cost(),
            metric=study.sweep.search.metric,
            stopped=sum(row["status"] == "stopped early" for row in study.rows),
            spans={axis: span(study, axis) for axis in study.axes},
            not_done=[
                row for row in study.rows if row["status"] not in ("finished", "stopped early")
            ],
            names=NAMES,
            spoken=SPOKEN,
        )
    )


# --- in words


def story(study: Study) -> str:
    """The answer, in a few sentences."""
    metric, best, base = study.sweep.search.metric, study.ranked[0], study.baseline
    told = [f"The best of {len(study.ranked)} points is {spoken(study, best)}."]
    if base is None:
        told += ["The baseline was not measured."] if study.sweep.baseline else []
    elif best in study.differences:
        gain = study.differences[best]
        told.append(
            f"That is {gain.mean:+.1f} points {SPOKEN[metric]} over "
            f"{spoken(study, base)}{surety(gain.p)}."
        )
    else:
        told.append("That is the baseline itself: nothing else was better.")
    if study.spread(study.points[best], metric).seeds < 2:
        told.append("It has one seed alone: differences may be chance.")
    for axis in [axis for axis in study.by_size if not study.is_range(axis)][:2]:
        means = {
            value: of[metric].mean for value, of in study.effect(axis).items() if of[metric].seeds
        }
        high, low = max(means, key=lambda v: means[v]), min(means, key=lambda v: means[v])
        told.append(
            f"On average {axis} = {high} is best, {means[high] - means[low]:.1f} points above "
            f"{axis} = {low}."
        )
    return " ".join(told)


def surety(p: float | None) -> str:
    if p is None:
        return ""
    return f", p = {p:.2g}" if p < 0.05 else f"; over these seeds that may be chance, p = {p:.2f}"


def spoken(study: Study, level: Level) -> str:
    return ", ".join(
        f"{axis} = {brief(value)}" for axis, value in zip(study.axes, level, strict=True)
    )


def brief(value: str) -> str:
    """A number that was drawn, to four digits."""
    try:
        return f"{float(value):.4g}" if len(value) > 6 else value
    except ValueError:
        return value


def span(study: Study, axis: str) -> str:
    values = study.values(axis)
    return (
        f"{brief(values[0])} to {brief(values[-1])}" if study.is_range(axis) else ", ".join(values)
    )


def command(study: Study, level: Level) -> str:
    """That trains the point again, with the first of its seeds."""
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


def pack_of(run: Path) -> str:
    try:
        return load_config(str(run / "config.toml")).data.pack
    except UserError:  # it was removed
        return "PACK"


# --- in figures


def figures(study: Study, level: Level) -> dict[str, Spread]:
    return {name: study.spread(study.points[level], name) for name in METRICS}


def point(study: Study, level: Level) -> dict[str, Any]:
    return {
        "values": [brief(value) for value in level],
        "figures": figures(study, level),
        "difference": study.differences.get(level),
        "is_baseline": level == study.baseline,
        "is_same": study.is_baseline(level),
    }


def effect(study: Study, axis: str) -> dict[str, Any]:
    found = {brief(value): of for value, of in study.effect(axis).items()}
    told = "; ".join(f"{axis} {value}: {of['top1'].mean:.1f}" for value, of in found.items())

    def draw(figure: Figure, narrow: bool) -> None:
        draw_effect(figure.add_subplot(), study, axis)

    return {
        "axis": axis,
        "values": found,
        "chart": charts.chart(f"Accuracy over {axis}. {told}", draw, (500, 300), (350, 280)),
    }


def draw_effects(figure: Figure, study: Study, axes: Sequence[str], narrow: bool) -> None:
    for place, axis in zip(
        figure.subplots(1, len(axes), sharey=True, squeeze=False)[0], axes, strict=True
    ):
        draw_effect(place, study, axis)


def draw_effect(axes: Any, study: Study, axis: str) -> None:
    axes.set_title(f"accuracy over {axis}, %")
    if study.is_range(axis):
        draw_trials(axes, study, axis)
    else:
        draw_means(axes, study, axis)


def draw_trials(axes: Any, study: Study, axis: str) -> None:
    """Each as a dot, at its own place of the range."""
    if study.sweep.axes[axis].log:  # type: ignore[union-attr]
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    for name in METRICS:
        dots = [(float(row[axis]), row[name]) for row in study.measured if row[name] is not None]
        if dots:
            colour = charts.COLOURS["ink" if name == "top1" else name]
            axes.plot(
                *zip(*dots, strict=True),
                color=colour,
                marker="o",
                markersize=5,
                linestyle="",
                label=NAMES[name],
            )
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, handletextpad=0.1)


def draw_means(axes: Any, study: Study, axis: str) -> None:
    found = study.effect(axis)
    ends = {}
    for name in METRICS:
        spreads = [of[name] for of in found.values()]
        if all(math.isnan(spread.mean) for spread in spreads):
            continue
        colour = charts.COLOURS["ink" if name == "top1" else name]
        axes.errorbar(
            range(len(spreads)),
            [s.mean for s in spreads],
            [s.deviation or 0.0 for s in spreads],
            color=colour,
            marker="o",
            markersize=5,
            capsize=3,
            elinewidth=1.2,
        )
        ends[name] = spreads[-1].mean
    axes.set_xticks(range(len(found)), list(found), parse_math=False)
    low, high = axes.get_ylim()
    for (name, _), y in zip(
        ends.items(), charts.spread(list(ends.values()), (high - low) * 0.06), strict=True
    ):
        colour = charts.COLOURS["ink" if name == "top1" else name]
        axes.annotate(
            NAMES[name],
            (1.02, y),
            xycoords=("axes fraction", "data"),
            color=colour,
            va="center",
            weight="bold",
        )


def heat(study: Study, pair: Sequence[str]) -> dict[str, Any]:
    """Of the sweep's metric over two axes, others averaged; strengths from 0 to 100 for the
    colours.
    """
    metric, (down, across) = study.sweep.search.metric, pair
    rows: list[dict[str, Any]] = []
    for v in study.values(down):
        own = [row for row in study.measured if str(row[down]) == v]
        cells = [
            study.spread([row for row in own if str(row[across]) == w], metric)
            for w in study.values(across)
        ]
        rows.append({"value": v, "cells": cells})
    known = [cell.mean for row in rows for cell in row["cells"] if cell.seeds]
    low, width = min(known), max(max(known) - min(known), 1e-9)
    strengths = [[shade(cell, low, width) for cell in row["cells"]] for row in rows]
    return {
        "down": down,
        "across": across,
        "columns": study.values(across),
        "rows": rows,
        "strengths": strengths,
    }


def shade(cell: Spread, low: float, width: float) -> int:
    return 0 if not cell.seeds else round(5 + 65 * (cell.mean - low) / width)
