"""The page of a sweep, `templates/sweep.html`, and effects.png, its main figure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from fastlt.reports import charts
from fastlt.reports.run import environment
from fastlt.utils.files import whole_file, write_text
from fastlt.utils.run_files import METRICS

NAMES = {"top1": "all", "many": "many", "medium": "medium", "few": "few"}
SPOKEN = {"top1": "top-1", "many": "many-shot", "medium": "medium-shot", "few": "few-shot"}


class Spread(NamedTuple):
    """A figure over seeds."""

    mean: float
    deviation: float | None  # None of one seed
    seeds: int


class Difference(NamedTuple):
    """The difference of a point to the baseline, seed by seed."""

    mean: float
    # two-sided paired t-test, corrected for the number of points (Holm); None of fewer than two
    # seeds
    p: float | None


class Trials(NamedTuple):
    """The single trials along an axis that is a range."""

    is_log: bool
    dots: Mapping[str, Sequence[tuple[float, float]]]  # metric -> (value of the axis, accuracy)


class Effect(NamedTuple):
    """The accuracy over an axis, all other axes averaged."""

    axis: str
    values: Mapping[str, Mapping[str, Spread]]  # value of the axis -> metric -> accuracy
    trials: Trials | None  # for a range, of each of whose values there is one trial


class Point(NamedTuple):
    """A point of the sweep: a value of each axis."""

    values: Sequence[str]
    figures: Mapping[str, Spread]  # by metric
    difference: Difference | None
    is_baseline: bool
    is_same: bool  # the very runs of the baseline


class Heat(NamedTuple):
    """The metric over two axes, others averaged."""

    down: str
    across: str
    columns: Sequence[str]  # values of `across`
    rows: Sequence[tuple[str, Sequence[Spread]]]  # (value of `down`, a cell for each column)


@dataclass(frozen=True)
class SweepPage:
    """The content of the page of a sweep."""

    title: str
    recipe: str
    metric: str
    story: str
    command: str  # that trains the best point again
    spans: Mapping[str, str]  # axis -> its values in words
    groups: Mapping[str, str]  # group -> its training images in words
    points: Sequence[Point]  # best first
    effects: Sequence[Effect]  # largest first
    heat: Heat | None
    cost: Mapping[str, float]
    stopped: int  # trials that were ended early
    not_done: Sequence[Mapping[str, Any]]  # rows of trials without a result
    more: int  # points that are not shown


def write_sweep_page(page: SweepPage, path: Path) -> None:
    """Write the page, one file that needs nothing else."""
    write_text(path, render(page))


def write_effects(effects: Sequence[Effect], path: Path) -> None:
    """Write a picture of the effects, side by side."""
    with whole_file(path) as temporary:
        charts.write_png(
            temporary,
            lambda figure, narrow: draw_effects(figure, effects),
            (1060, 380),
        )


def render(page: SweepPage) -> str:
    """Return the page as text."""
    return (
        environment()
        .get_template("sweep.html")
        .render(
            page=page,
            best=page.points[0].figures,
            charts=[effect_chart(effect) for effect in page.effects],
            strengths=strengths(page.heat) if page.heat else [],
            names=NAMES,
            spoken=SPOKEN,
        )
    )


def effect_chart(effect: Effect) -> Any:
    """Return the figure of one axis, with its accuracies as alternative text."""
    alternative = "; ".join(
        f"{effect.axis} {value}: {of['top1'].mean:.1f}" for value, of in effect.values.items()
    )

    def draw(figure: Figure, narrow: bool) -> None:
        draw_effect(figure.add_subplot(), effect)

    return charts.chart(f"Accuracy over {effect.axis}. {alternative}", draw, (500, 300), (350, 280))


def draw_effects(figure: Figure, effects: Sequence[Effect]) -> None:
    """Draw the effects side by side, on one scale."""
    places = figure.subplots(1, len(effects), sharey=True, squeeze=False)[0]
    for place, effect in zip(places, effects, strict=True):
        draw_effect(place, effect)


def draw_effect(axes: Any, effect: Effect) -> None:
    """Draw the accuracy over an axis."""
    axes.set_title(f"accuracy over {effect.axis}, %")
    if effect.trials is None:
        draw_means(axes, effect.values)
    else:
        draw_trials(axes, effect.trials)


def draw_trials(axes: Any, trials: Trials) -> None:
    """Draw each trial as a dot, at its own place of the range."""
    if trials.is_log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    for name, dots in trials.dots.items():
        if dots:
            axes.plot(
                *zip(*dots, strict=True),
                color=colour_of(name),
                marker="o",
                markersize=5,
                linestyle="",
                label=NAMES[name],
            )
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, handletextpad=0.1)


def draw_means(axes: Any, values: Mapping[str, Mapping[str, Spread]]) -> None:
    """Draw the means of each value, with bars of one standard deviation."""
    ends = {}
    for name in METRICS:
        spreads = [of[name] for of in values.values()]
        if all(math.isnan(spread.mean) for spread in spreads):
            continue
        axes.errorbar(
            range(len(spreads)),
            [s.mean for s in spreads],
            [s.deviation or 0.0 for s in spreads],
            color=colour_of(name),
            marker="o",
            markersize=5,
            capsize=3,
            elinewidth=1.2,
        )
        ends[name] = spreads[-1].mean
    axes.set_xticks(range(len(values)), list(values), parse_math=False)
    low, high = axes.get_ylim()
    for name, y in zip(ends, charts.spread(list(ends.values()), (high - low) * 0.06), strict=True):
        axes.annotate(
            NAMES[name],
            (1.02, y),
            xycoords=("axes fraction", "data"),
            color=colour_of(name),
            va="center",
            weight="bold",
        )


def colour_of(metric: str) -> str:
    """Return the colour of a metric's curve."""
    return charts.COLOURS["ink" if metric == "top1" else metric]


def strengths(heat: Heat) -> list[list[int]]:
    """Return the strength of each cell's colour, from 0 to 100."""
    known = [cell.mean for _, cells in heat.rows for cell in cells if cell.seeds]
    low, width = min(known), max(max(known) - min(known), 1e-9)
    return [[shade(cell, low, width) for cell in cells] for _, cells in heat.rows]


def shade(cell: Spread, low: float, width: float) -> int:
    """Return the strength of a cell's colour, 0 where nothing is known."""
    return 0 if not cell.seeds else round(5 + 95 * (cell.mean - low) / width)
