"""The tables of figures that commands print."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from rich.markup import escape

from fastlt.cli.app import console
from fastlt.errors import UserError
from fastlt.utils.run_files import COLUMNS, FIGURES
from fastlt.utils.tables import figure_table

SHOWN_PAIRS = 5


def print_result(result: dict[str, Any], name: str) -> None:
    """Print the last epoch; the best one, chosen by the test images, is named beside it."""
    table = figure_table("", *COLUMNS, title=escape(name))
    columns = FIGURES
    table.add_row("last epoch", *(figure(result[column]) for column in columns))
    if best := result.get("best"):
        table.add_row(
            f"best, epoch {best['epoch']}",
            *(figure(best[column]) for column in columns[:4]),
            style="dim",
        )
    console.print(table)
    if damaged := result.get("damaged_images"):
        console.print(
            f"[yellow]note:[/] {damaged:,} training images could not be decoded; others of their "
            "classes took their place"
        )
    print_details(result)


def print_details(result: dict[str, Any]) -> None:
    """Print the worst class, calibration, and where known how predictions are spread."""
    worst = result["worst_class"]
    console.print(
        f"worst class: {worst['name']}, {figure(worst['accuracy'])} %",
        markup=False,
        highlight=False,
    )
    ece, mce, pdc = (result.get(name) for name in ("ece", "mce", "pdc"))
    console.print(
        f"calibration: ECE {figure(ece)} %, MCE {figure(mce)} %, the worst of 15 bins",
        highlight=False,
    )
    if pdc is not None:
        console.print(
            f"predictive distribution: PDC {pdc:.2f} (0: as classes come, 1: as trained on)",
            highlight=False,
        )


def print_confusions(result: dict[str, Any], run: Path) -> None:
    """Print the pairs of targets that are most often taken for each other, either way."""
    from fastlt.classes import ClassSpace

    names = ClassSpace.load(run / "classes.json").target_names
    times: Counter[tuple[int, int]] = Counter()
    for true, predicted, count in result["confusion"]:
        times[min(true, predicted), max(true, predicted)] += count
    pairs = [f"{names[a]} / {names[b]} ({n} x)" for (a, b), n in times.most_common(SHOWN_PAIRS)]
    if pairs:
        console.print(f"most confused: {', '.join(pairs)}", markup=False, highlight=False)


def print_thresholds(known: dict[str, Any]) -> None:
    """Print the threshold that was chosen for a wanted precision."""
    console.print(
        f"unsure below {known['threshold']:.3f}: {100 * known['coverage']:.1f} % of the images are "
        f"above, {100 * known['precision']:g} % of them right; {len(known['by_class'])} classes "
        "have thresholds of their own (--by-class-threshold)",
        highlight=False,
        soft_wrap=True,
    )


def write_figures(file: Path | None, figures: dict[str, Any]) -> None:
    """Write the figures as JSON. Raises UserError where that fails."""
    from fastlt.utils.files import write_text

    if file is None:
        return
    try:
        write_text(file, json.dumps(figures, indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"cannot write to {file} ({error.strerror}): name another file with --json"
        ) from error
    console.print(f"written to {file}", highlight=False, soft_wrap=True)


def print_post_hoc(results: dict[str, dict[str, Any]], name: str, validation: str | None) -> None:
    """Print the figures of post-hoc methods."""
    # 80 characters hold no more
    columns = {title: column for title, column in COLUMNS.items() if title != "harmonic"}
    table = figure_table("", "strength", *columns, title=escape(name))
    for method, result in results.items():
        strength = f"{result['strength']:.3g}" if "strength" in result else ""
        table.add_row(method, strength, *(figure(result[column]) for column in columns.values()))
    console.print(table)
    first = results["as trained"]
    chosen = (
        f"strengths chosen on {first['chosen_on']:,} images "
        f"{f'of {validation}' if validation else 'set aside'}, and "
    )
    console.print(
        f"{chosen if first['chosen_on'] else ''}all scored on the same {first['images']:,}",
        highlight=False,
    )


def print_blends(results: dict[float, dict[str, Any]], run: Path) -> None:
    """Print the figures of models between the start and the end of a run, by their weight."""
    columns = {title: column for title, column in COLUMNS.items() if title != "harmonic"}
    table = figure_table("weight of the end", *columns, title=escape(f"{run}, validation images"))
    best = max(results.values(), key=lambda result: result["balanced_accuracy"])
    for weight, result in results.items():
        style = "bold" if result is best else ""
        cells = (figure(result[column]) for column in columns.values())
        table.add_row(f"{weight:.1f}", *cells, style=style)
    console.print(table)


def print_classes(result: dict[str, Any], run: Path) -> None:
    """Print the accuracy of every class."""
    from fastlt.classes import ClassSpace

    space = ClassSpace.load(run / "classes.json")
    table = figure_table("class", "training images", "accuracy")
    table.add_column("most often taken for", overflow="fold")
    mistaken: dict[int, str] = {}
    for true, predicted, count in result["confusion"]:  # most frequent first
        mistaken.setdefault(true, escape(f"{space.target_names[predicted]} ({count} x)"))
    for target in sorted(range(space.num_targets), key=lambda t: -space.train_counts[t]):
        accuracy = figure(result["per_class"][target])
        table.add_row(
            escape(space.target_names[target]),
            f"{space.train_counts[target]:,}",
            accuracy,
            mistaken.get(target, ""),
        )
    console.print(table)


def figure(value: float | None) -> str:
    """Return a figure with one decimal, - where not known."""
    return "-" if value is None else f"{value:.1f}"
