"""`fastlt compare`: runs side by side, where their configurations differ, and whether the differences are more than chance."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy import stats

from fastlt.config import MAY_CHANGE
from fastlt.errors import UserError
from fastlt.report import Run, read_run

FIGURES = {
    "top-1": "top1", "many": "many", "medium": "medium", "few": "few", "balanced": "balanced_accuracy",
    "harmonic": "harmonic_mean", "ECE": "ece",
}  # fmt: skip


def compare(places: Sequence[Path], console: Console) -> None:
    """The first run is what the others are held against. Raises UserError where one is no finished run."""
    if len(places) < 2:
        raise UserError("compare needs two runs at least: fastlt compare RUN RUN ...")
    runs = [read_run(Path(place)) for place in places]
    names = shortest(places)
    console.print(figures(runs, names))
    changed = settings(runs)
    if changed:
        table = Table("setting", *names, title="where their settings differ", title_justify="left")
        for key, values in changed.items():
            table.add_row(key, *(escape(value) for value in values))
        console.print(table)
    for run, name in zip(runs[1:], names[1:], strict=True):
        console.print(verdict(runs[0], run, names[0], name), highlight=False, markup=False, soft_wrap=True)


def shortest(places: Sequence[Path]) -> list[str]:
    """As few of the last folders as tell them apart."""
    parts = [Path(place).resolve().parts for place in places]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return names


def figures(runs: Sequence[Run], names: Sequence[str]) -> Table:
    table = Table("run", *FIGURES, "epochs", title="last epoch, %; in brackets the difference to the first", title_justify="left")
    for run, name in zip(runs, names, strict=True):
        cells = []
        for key in FIGURES.values():
            value, first = run.result.get(key), runs[0].result.get(key)
            change = "" if run is runs[0] or value is None or first is None else f" ({value - first:+.1f})"
            cells.append("-" if value is None else f"{value:.1f}{change}")
        table.add_row(escape(name), *cells, str(run.result.get("epochs", "-")))
    return table


def settings(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Of those keys that are not the same everywhere."""
    flat = [{f"{s}.{key}": str(v) for s, values in run.config.items() for key, v in values.items()} for run in runs]
    keys = dict.fromkeys(key for of in flat for key in of)
    return {
        key: values
        for key in keys
        if key not in MAY_CHANGE and len(set(values := [of.get(key, "-") for of in flat])) > 1
    }  # fmt: skip


def verdict(one: Run, other: Run, name: str, other_name: str) -> str:
    """McNemar's exact test on the images that both were evaluated on."""
    a, b = one.predictions, other.predictions
    same_images = a and b and np.array_equal(a["image"], b["image"]) and np.array_equal(a["label"], b["label"])
    if not same_images or one.space.target_names != other.space.target_names:
        return f"{name} and {other_name} were evaluated on other images or classes: no test of their difference"
    right, also = a["predicted"] == a["label"], b["predicted"] == b["label"]
    gained, lost = int((~right & also).sum()), int((right & ~also).sum())
    p = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
    sure = "more than chance" if p < 0.05 else "within chance"
    return (
        f"{other_name} has {gained:,} images right that {name} has wrong, and {lost:,} the other way round: {sure} on these images "
        f"(McNemar, p = {p:.2g}); other seeds may differ by more"
    )
