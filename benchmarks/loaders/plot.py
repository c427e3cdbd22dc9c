"""The picture of a run of `fastlt bench-data`: a bar for each contender, the limits as lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from fastlt_benchmarks.loss.plot import STYLE

COLOURS = {"ours": "#d55e00", "peer": "#0072b2"}
LABELS = {"ours": "fastlt", "peer": "others"}
LINES = {"decoding": "-", "decoding-scaled": ":"}

Row = dict[str, Any]


def draw(rows: list[Row], path: Path) -> None:
    """Draw a PNG of images/s: median, with a line from minimum to maximum.

    Who did not run has no bar, but the word for it.
    """
    bars = [row for row in rows if row["kind"] != "limit"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 1.8 + 0.42 * len(bars)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for place, row in enumerate(bars):
            draw_bar(axes, place, row)
        for row in rows:
            if row["kind"] == "limit" and row["images_per_s"] is not None:
                label = "libjpeg-turbo alone" + (
                    ", scaled" if row["contender"] == "decoding-scaled" else ""
                )
                axes.axvline(
                    row["images_per_s"],
                    linestyle=LINES[row["contender"]],
                    color="black",
                    linewidth=1.5,
                    label=label,
                )
        finish(axes, bars)
        figure.savefig(path, dpi=120)


def draw_bar(axes: Axes, place: int, row: Row) -> None:
    """Draw the bar of a contender."""
    rate = row["images_per_s"]
    if rate is None:
        axes.text(0, place, " did not run", va="center", color="#777777", fontsize=10)
        return
    axes.barh(place, rate, color=COLOURS[row["kind"]], height=0.7)
    axes.plot(
        [row["images_per_s_min"], row["images_per_s_max"]],
        [place, place],
        color="black",
        linewidth=2,
    )
    ratio = "" if row["ratio_to_pillow"] is None else f"  {row['ratio_to_pillow']:.2f} x pillow"
    axes.annotate(
        f"{rate:,.0f}{ratio}",
        (max(rate, row["images_per_s_max"]), place),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        fontsize=10,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
    )


def finish(axes: Axes, bars: list[Row]) -> None:
    """Label the axes."""
    first = bars[0]
    axes.set_yticks(range(len(bars)), [row["contender"] for row in bars])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlim(0, 1.25 * axes.get_xlim()[1])  # room for the figures behind the bars
    what = (
        f"{first['images']:,} JPEGs of about {first['median_width']} x {first['median_height']} "
        f"pixels, {first['mean_kb']:.0f} KB"
    )
    axes.set(
        xlabel="images/s",
        title=f"{what}, to {first['size']} x {first['size']} uint8, {first['workers']} workers",
    )
    for kind in dict.fromkeys(row["kind"] for row in bars):
        axes.barh(0, 0, color=COLOURS[kind], label=LABELS[kind])
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False)
