"""The picture of a run of `fastlt bench-loss`: time and memory over the number of classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from rich.filesize import decimal

# Okabe and Ito's palette, which the colour-blind can tell apart. By who solves the problem;
# compiled: the same, dotted.
COLOURS = {
    "ours": "#d55e00",
    "mask": "#0072b2",
    "release": "#56b4e9",
    "plain": "#009e73",
    "torch": "#e69f00",
    "liger": "#cc79a7",
    "cce": "#8c6d1f",
}
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.7,
    "axes.axisbelow": True,
}

Row = dict[str, Any]


def draw(rows: list[Row], path: Path) -> None:
    """Draw a PNG: for each family, time and memory side by side, at the first N and D."""
    families = [shown for family in ("logits", "linear") if (shown := first_size(rows, family))]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(13, 4.6 * len(families)), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(len(families), 2, squeeze=False)
        for (times, memory), shown in zip(panels, families, strict=True):
            draw_times(times, shown)
            draw_memory(memory, shown)
            memory.legend(
                *times.get_legend_handles_labels(),
                loc="upper left",
                bbox_to_anchor=(1.01, 1.02),
                frameon=False,
            )
        figure.savefig(path, dpi=120)


def first_size(rows: list[Row], family: str) -> list[Row]:
    """Return the rows of the family that share the first row's N and D."""
    of_family = [row for row in rows if row["family"] == family]
    return [
        row
        for row in of_family
        if all(row[name] == of_family[0][name] for name in ("rows", "width"))
    ]


def draw_times(axes: Axes, rows: list[Row]) -> None:
    """Draw the times."""
    for contender in dict.fromkeys(row["contender"] for row in rows):
        measured = [
            row for row in rows if row["contender"] == contender and row["both_ms"] is not None
        ]
        if measured:
            plot_line(axes, contender, [(row["classes"], row["both_ms"]) for row in measured])
    floor = sorted(
        {(row["classes"], row["floor_ms"]) for row in rows if row["floor_ms"] is not None}
    )
    axes.plot(
        *zip(*floor, strict=True), "--", color="black", linewidth=1.5, label="floor"
    ) if floor else None
    finish(axes, rows, "time of forward and backward, ms", lambda value, _: f"{value:g}")


def draw_memory(axes: Axes, rows: list[Row]) -> None:
    """Draw the memory. A cross marks what did not run and would need so much.

    Nothing at all has no place on a logarithmic axis.
    """
    for contender in dict.fromkeys(row["contender"] for row in rows):
        known = [row for row in rows if row["contender"] == contender and row["extra_bytes"]]
        if known:
            plot_line(axes, contender, [(row["classes"], row["extra_bytes"]) for row in known])
        not_run = [(row["classes"], row["extra_bytes"]) for row in known if row["reason"]]
        if not_run:
            axes.plot(
                *zip(*not_run, strict=True),
                "x",
                color=colour(contender),
                markersize=11,
                markeredgewidth=2,
            )
    finish(
        axes, rows, "extra memory beyond inputs and gradients", lambda value, _: decimal(int(value))
    )


def plot_line(axes: Axes, contender: str, points: list[tuple[int, float]]) -> None:
    """Draw the line of a contender."""
    ours = contender.startswith("ours")
    style = ":" if "compiled" in contender else "--" if "weighted" in contender else "-"
    axes.plot(
        *zip(*sorted(points), strict=True),
        style,
        color=colour(contender),
        linewidth=4 if ours else 1.7,
        marker="o",
        markersize=7 if ours else 4,
        zorder=3 if ours else 2,
        label=contender,
    )


def colour(contender: str) -> str:
    """Return the colour of a contender."""
    return COLOURS[contender.partition("-")[0]]


def finish(axes: Axes, rows: list[Row], what: str, tick: Callable[[float, int], str]) -> None:
    """Label the axes."""
    size = (
        f"N = {rows[0]['rows']:,}"
        + (f", D = {rows[0]['width']:,}" if rows[0]["width"] else "")
        + f", {rows[0]['dtype']}"
    )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="classes",
        ylabel=what,
        title=f"{rows[0]['family']} ({size})",
    )
    axes.set_xticks(sorted({row["classes"] for row in rows}))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1e3 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(tick))
    axes.yaxis.set_minor_formatter(NullFormatter())
