"""A run beside its baseline: differences in points of accuracy, by group and by class."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastlt.errors import UserError
from fastlt.reports.content import Run, read_run
from fastlt.utils.run_files import shortest_names

SHOWN_CHANGES = 5
# title -> key of result.json, and whether less is better
FIGURES = {
    "balanced accuracy": ("balanced_accuracy", False),
    "harmonic mean over classes": ("harmonic_mean", False),
    "calibration error (ECE)": ("ece", True),
}


def read_baseline(run: Run, path: Path) -> Run:
    """Return the run that another is held against.

    Raises UserError where it is no finished run, the run itself, or one of other target classes.
    """
    if path.resolve() == run.path.resolve():
        raise UserError(f"--baseline {path} is the run itself: name another run")
    baseline = read_run(path)
    if sorted(baseline.space.target_names) != sorted(run.space.target_names):
        raise UserError(
            f"the baseline {path} has other target classes than the run {run.path}: name a run of "
            "the same classes"
        )
    return baseline


def beside(run: Run, baseline: Run) -> dict[str, Any]:
    """Return what the page says of a run and its baseline, with the same target classes."""
    before = classes_in_order(run, baseline)
    rows = class_changes(run, before)
    known = [row for row in rows if row["change"] is not None]
    gained = [row for row in known if row["change"] > 0][:SHOWN_CHANGES]
    lost = [row for row in reversed(known) if row["change"] < 0][:SHOWN_CHANGES]
    name, baseline_name = shortest_names([run.path, baseline.path])
    return {
        "name": name,
        "baseline": baseline_name,
        "groups": group_changes(run, baseline, before),
        "figures": figure_changes(run, baseline),
        "classes": rows,
        "gained": gained,
        "lost": lost,
        "widest": max((abs(row["change"]) for row in known), default=0.0),
        "same_images": evaluated_alike(run, baseline),
    }


def classes_in_order(run: Run, baseline: Run) -> list[float | None]:
    """Return the baseline's accuracy of each target, in the order of the run's targets."""
    by_name = dict(zip(baseline.space.target_names, baseline.per_class, strict=True))
    return [by_name[name] for name in run.space.target_names]


def group_changes(run: Run, baseline: Run, before: Sequence[float | None]) -> list[dict[str, Any]]:
    """Return a row for all classes and one for each group of the run, whatever the baseline's."""
    rows = [_row("all", run.result["top1"], baseline.result["top1"])]
    for name, members in run.members.items():
        values = [before[target] for target in members]
        rows.append(_row(name, run.result.get(name) if members else None, mean(values)))
    return [
        row | {"classes": len(run.members.get(row["name"], run.space.target_names))} for row in rows
    ]


def figure_changes(run: Run, baseline: Run) -> list[dict[str, Any]]:
    """Return a row for each of the other figures."""
    return [
        _row(title, run.result.get(key), baseline.result.get(key)) | {"less_is_better": less}
        for title, (key, less) in FIGURES.items()
    ]


def class_changes(run: Run, before: Sequence[float | None]) -> list[dict[str, Any]]:
    """Return a row for each target, the largest gain first; those without a change come last."""
    rows = [
        _row(run.space.target_names[target], run.per_class[target], before[target])
        | {"group": run.groups[target], "train": run.space.train_counts[target]}
        for target in run.by_frequency
    ]
    return sorted(rows, key=lambda row: (row["change"] is None, -(row["change"] or 0.0)))


def _row(name: str, now: float | None, before: float | None) -> dict[str, Any]:
    change = None if now is None or before is None else now - before
    return {"name": name, "now": now, "before": before, "change": change}


def mean(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are known; None where none is."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def evaluated_alike(run: Run, baseline: Run) -> bool | None:
    """Return whether both were evaluated on the same images; None where that is not known."""
    ours, theirs = run.predictions, baseline.predictions
    if not ours or not theirs:
        return None
    names = [np.array(one.space.target_names)[one.predictions["label"]] for one in (run, baseline)]
    return np.array_equal(ours["image"], theirs["image"]) and np.array_equal(*names)
