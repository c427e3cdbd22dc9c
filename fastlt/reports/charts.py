"""Charts as inline SVG: matplotlib draws the shapes, the page's style sheet gives the colours.

So light and dark both fit.

Every chart is drawn twice, for a wide and for a narrow page: letters of an SVG that is scaled down
to a telephone are too small.
"""

import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

# CSS variable -> a colour that nothing else uses; `_svg` puts `var(--name)` in its place.
COLOURS = {
    name: f"#fa57{i:02x}"
    for i, name in enumerate(("ink", "muted", "grid", "many", "medium", "few"), start=1)
}
LIGHT = dict(
    zip(
        COLOURS.values(),
        ("#191d22", "#59626d", "#dde1e6", "#0a5fae", "#0b7a5c", "#c03d0c"),
        strict=True,
    )
)
# with more classes there is no room for names, and dots with a running mean read better than bars
NAMED_UP_TO = 40
LONGEST_NAME = 26  # characters; the tables give names in full

STYLE = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "path.simplify": False,
    "font.size": 12,
    "figure.dpi": 72,
    "axes.edgecolor": COLOURS["grid"],
    "axes.labelcolor": COLOURS["muted"],
    "text.color": COLOURS["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titlecolor": COLOURS["muted"],
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "axes.xmargin": 0.02,
    "lines.linewidth": 2,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}

Names = Sequence[str]
Floats = np.ndarray
Draw = Callable[[Figure, bool], None]  # (figure, is it the narrow one)


def loss_curve(epochs: Sequence[int], losses: Sequence[float]) -> Markup:
    """Return the training loss over epochs (from 1)."""

    def draw(figure: Figure, narrow: bool) -> None:
        axes = figure.add_subplot(title="training loss")
        _line(axes, epochs, losses, "ink")
        _over_epochs(axes)

    return chart(
        f"Training loss over {len(epochs)} epochs, last {losses[-1]:.3f}",
        draw,
        (500, 290),
        (350, 250),
    )


def accuracy_curves(epochs: Sequence[int], curves: Mapping[str, Sequence[float | None]]) -> Markup:
    """Return top-1 and group accuracies over the evaluated epochs (from 1).

    They are in percent, None where not known.
    """
    shown = {
        name: values
        for name, values in curves.items()
        if any(value is not None for value in values)
    }

    def draw(figure: Figure, narrow: bool) -> None:
        axes = figure.add_subplot(title="accuracy on the validation images, %")
        for name, values in shown.items():
            _line(
                axes,
                epochs,
                [np.nan if value is None else value for value in values],
                "ink" if name == "top-1" else name,
            )
        _over_epochs(axes)
        axes.set_ylim(0, 100)
        ends = {
            name: [value for value in values if value is not None][-1]
            for name, values in shown.items()
        }
        for (name, _), y in zip(ends.items(), spread(list(ends.values()), 7.0), strict=True):
            colour = COLOURS["ink" if name == "top-1" else name]
            axes.annotate(
                name,
                (1.02, y),
                xycoords=("axes fraction", "data"),
                color=colour,
                va="center",
                weight="bold",
            )

    last = ", ".join(
        f"{name} {values[-1]:.1f}" for name, values in shown.items() if values[-1] is not None
    )
    return chart(f"Accuracy over epochs; at the end {last} percent", draw, (500, 290), (350, 250))


def class_accuracies(
    names: Names, counts: Sequence[int], values: Sequence[float | None], groups: Names
) -> Markup:
    """Return accuracy per class (percent) in the given order, training images below."""
    accuracy = np.array([np.nan if value is None else value for value in values], dtype=float)
    label = (
        f"Accuracy of {len(names)} classes sorted by their training images, {max(counts)} to "
        f"{min(counts)}"
    )
    if len(names) > NAMED_UP_TO:
        return chart(
            label,
            lambda figure, narrow: _class_dots(figure, counts, accuracy, groups),
            (1060, 430),
            (350, 380),
        )

    def draw(figure: Figure, narrow: bool) -> None:
        (_class_rows if narrow else _class_columns)(figure, names, counts, accuracy, groups)

    return chart(label, draw, (1060, 470), (350, 90 + 21 * len(names)))


def histogram(values: Sequence[int], what: str, of: str) -> Markup:
    """Return how many `of` (targets) have how many `what` (auxiliaries)."""

    def draw(figure: Figure, narrow: bool) -> None:
        axes = figure.add_subplot(title=f"{of} by their number of {what}")
        step = max(1, (max(values) + 1) // 20)
        edges = np.arange(0, max(values) + 2 * step, step) - 0.5
        bars = axes.hist(values, bins=list(edges), color=COLOURS["muted"], rwidth=0.86)
        if len(edges) <= 13:
            axes.bar_label(bars[2], fmt=lambda n: f"{n:g}" if n else "", color=COLOURS["muted"])  # type: ignore[arg-type]
        axes.margins(y=0.15)
        axes.set_xlabel(what)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))

    return chart(
        f"Histogram: {of} by their number of {what}, {min(values)} to {max(values)}",
        draw,
        (420, 250),
        (350, 230),
    )


def chart(label: str, draw: Draw, wide: tuple[int, int], narrow: tuple[int, int]) -> Markup:
    """Return both drawings of one chart; sizes in CSS pixels.

    `label` is the text for those who cannot see it.
    """
    drawn = [
        Markup('<div class="{}">{}</div>').format(name, _svg(label, draw, size, name == "narrow"))
        for name, size in (("wide", wide), ("narrow", narrow))
    ]
    return Markup("").join(drawn)


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Return values moved apart so that neighbours are at least `gap` from each other, in order."""
    order = np.argsort(values, kind="stable")
    moved = np.asarray(values, dtype=float)[order]
    for i in range(1, len(moved)):
        short = gap - (moved[i] - moved[i - 1])
        if short > 0:
            moved[:i] -= short / 2
            moved[i:] += short / 2
    result = np.empty_like(moved)
    result[order] = moved
    return [float(value) for value in result]


def _class_columns(
    figure: Figure,
    names: Sequence[str],
    counts: Sequence[int],
    accuracy: np.ndarray,
    groups: Sequence[str],
) -> None:
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.1))
    place, colours = np.arange(len(names)), [COLOURS[group] for group in groups]
    bars = top.bar(place, np.nan_to_num(accuracy), color=colours, width=0.78)
    top.bar_label(
        bars,
        ["-" if np.isnan(value) else f"{value:.0f}" for value in accuracy],
        color=COLOURS["muted"],
        padding=2,
    )
    _percent_axis(top)
    bottom.bar(place, counts, color=colours, width=0.78, alpha=0.55)
    _counts_axis(bottom, counts)
    bottom.set_xticks(
        place,
        [shortened(name) for name in names],
        rotation=45,
        ha="right",
        rotation_mode="anchor",
        parse_math=False,
    )


def _class_rows(
    figure: Figure, names: Names, counts: Sequence[int], accuracy: Floats, groups: Names
) -> None:
    axes = figure.add_subplot(title="accuracy, % (training images)")
    bars = axes.barh(
        np.arange(len(names)),
        np.nan_to_num(accuracy),
        color=[COLOURS[group] for group in groups],
        height=0.7,
    )
    shown = ["-" if np.isnan(value) else f"{value:.0f}" for value in accuracy]
    axes.bar_label(
        bars,
        [f"{value} ({count})" for value, count in zip(shown, counts, strict=True)],
        color=COLOURS["muted"],
        padding=3,
    )
    axes.set_yticks(np.arange(len(names)), [shortened(name) for name in names], parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, 135)  # room for the figures
    axes.set_xticks([0, 50, 100])
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")


def _class_dots(figure: Figure, counts: Sequence[int], accuracy: Floats, groups: Names) -> None:
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.1))
    rank = np.arange(1, len(counts) + 1)
    for group in ("many", "medium", "few"):
        mine = np.array([name == group for name in groups])
        # One path of zero-length strokes with round ends: a tenth of the bytes of one marker
        # element per class.
        x, y = (
            np.stack([v[mine], v[mine], np.full(mine.sum(), np.nan)], axis=1).ravel()
            for v in (rank.astype(float), accuracy)
        )
        top.plot(x, y, color=COLOURS[group], linewidth=4, alpha=0.6)
        bottom.fill_between(
            rank,
            np.where(mine, counts, np.nan),
            0.5,
            color=COLOURS[group],
            step="mid",
            alpha=0.5,
            linewidth=0,
        )
    width = max(5, len(counts) // 20)
    top.plot(*running_mean(rank, accuracy, width), color=COLOURS["ink"], linewidth=2.5)
    _percent_axis(top)
    top.set_title(f"accuracy, %; the line is the mean over {width} classes")
    _counts_axis(bottom, counts)
    bottom.set_xlabel("classes, most frequent first")


def running_mean(x: np.ndarray, y: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Return means over `width` consecutive known values, at the mean of their x.

    Values that are not known are NaN.
    """
    known = ~np.isnan(y)
    if known.sum() < width:
        return x[:0], y[:0]
    kernel = np.full(width, 1 / width)
    return np.convolve(x[known], kernel, "valid"), np.convolve(y[known], kernel, "valid")


def _percent_axis(axes: Axes) -> None:
    axes.set_title("accuracy, %")
    axes.set_ylim(0, 108)
    axes.set_yticks([0, 25, 50, 75, 100])


def _counts_axis(axes: Axes, counts: Sequence[int]) -> None:
    axes.set_title("training images (log)")
    axes.set_yscale("log")
    axes.set_ylim(0.7, max(counts) * 1.5)
    axes.yaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else "")
    )


def _over_epochs(axes: Axes) -> None:
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))


def _line(axes: Axes, x: Sequence[int], y: Sequence[float], colour: str) -> None:
    axes.plot(x, y, color=COLOURS[colour], marker="o" if len(x) <= 20 else "", markersize=4)


def shortened(name: str) -> str:
    """Return a name that fits an axis."""
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def _svg(label: str, draw: Draw, size: tuple[int, int], narrow: bool) -> Markup:
    # Paths are named by a hash with this salt: equal charts get equal names, different ones do not
    # clash in one page.
    style: Any = {**STYLE, "svg.hashsalt": f"{label} {size}"}
    out = io.StringIO()
    with mpl.rc_context(style), warnings.catch_warnings():
        # the browser has the letters that this font lacks
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure, narrow)
        figure.savefig(
            out,
            format="svg",
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    return Markup(_themed(out.getvalue(), label, size))


def write_png(path: Path, draw: Draw, size: tuple[int, int]) -> None:
    """Write a drawing for places without a style sheet.

    It has the colours of the light page, and is twice as sharp as a screen needs.
    """
    style: Any = {
        name: LIGHT.get(value, value) if isinstance(value, str) else value
        for name, value in STYLE.items()
    }
    page = dict(COLOURS)
    COLOURS.update({name: LIGHT[colour] for name, colour in page.items()})
    try:
        with mpl.rc_context(style):
            figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained")
            draw(figure, False)
            figure.savefig(path, format="png", dpi=144, facecolor="white")
    finally:
        COLOURS.update(page)


def _themed(svg: str, label: str, size: tuple[int, int]) -> str:
    """Return inline SVG without prologue, fonts and fixed size, coloured by the page."""
    svg = svg[svg.index("<svg") :]
    opening = (
        f'<svg viewBox="0 0 {size[0]} {size[1]}" role="img" aria-label="{escape(label)}" '
        f'style="max-width:{size[0]}px">'
    )
    svg = re.sub(r"<svg[^>]*>", lambda _: opening, svg, count=1)
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    # figure_1, axes_1 ...: named anew in every chart, referred to by none
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--font)", svg)
    svg = re.sub(
        r' d="[^"]*"', lambda path: re.sub(r"(\.\d)\d+", r"\1", path[0]).replace("\n", ""), svg
    )
    for name, colour in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    return re.sub(r">\s+<", "><", svg.replace("xlink:href", "href"))
