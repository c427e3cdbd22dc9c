"""The analysis of a sweep: means over seeds, effects of axes, differences, and costs."""

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from fastlt.errors import UserError
from fastlt.evaluation.significance import holm, t_test
from fastlt.reports.sweep import Difference, Spread
from fastlt.sweep.results import plain
from fastlt.sweep.spec import Range, Sweep, axes_but_seeds, read_sweep
from fastlt.utils.run_files import FIGURES, METRICS

Row = dict[str, Any]
Level = tuple[str, ...]  # a value of each axis but the seed, as the table has them


@dataclass(frozen=True)
class Study:
    """The results of a sweep."""

    out: Path
    sweep: Sweep
    rows: Sequence[Row]  # as results.csv has them, figures as numbers

    @cached_property
    def axes(self) -> list[str]:
        """The axes that points differ in: all but the seed."""
        return axes_but_seeds(self.sweep)

    @cached_property
    def measured(self) -> list[Row]:
        """The rows of whole trainings: what was stopped early cannot be compared with them."""
        return [row for row in self.rows if row["status"] == "finished" and row["top1"] is not None]

    @cached_property
    def points(self) -> dict[Level, list[Row]]:
        """The trials of each point, those of all seeds."""
        order = sorted(self.measured, key=self.level)
        return {level: list(rows) for level, rows in groupby(order, self.level)}

    def level(self, row: Row) -> Level:
        """Return the point of a row."""
        return tuple(str(row[name]) for name in self.axes)

    @cached_property
    def ranked(self) -> list[Level]:
        """The points, best first by the metric of the sweep; those without a result last."""
        means = {
            level: self.spread(rows, self.sweep.search.metric).mean
            for level, rows in self.points.items()
        }
        return sorted(self.points, key=lambda level: (math.isnan(means[level]), -means[level]))

    @cached_property
    def baseline(self) -> Level | None:
        """The baseline; None where it was not measured, or a search names none.

        It is the point that the sweep names; axes that it does not name are at their first value.
        """
        if not self.sweep.baseline and self.sweep.search.kind != "grid":
            return None
        wanted = {
            name: str(plain(value))
            for name, value in self.sweep.baseline.items()
            if name in self.axes
        }
        fitting = [
            level
            for level in self.points
            if wanted.items() <= dict(zip(self.axes, level, strict=True)).items()
        ]
        places = {
            level: [self.values(name).index(v) for name, v in zip(self.axes, level, strict=True)]
            for level in fitting
        }
        return min(fitting, key=lambda level: places[level], default=None)

    def values(self, axis: str) -> list[str]:
        """Return the values of an axis that occur, in the sweep's order; of a range by size."""
        found = {str(row[axis]) for row in self.measured}
        listed = self.sweep.axes[axis]
        if isinstance(listed, list):
            return [str(plain(value)) for value in listed if str(plain(value)) in found]
        return sorted(found, key=float)

    @staticmethod
    def spread(rows: Sequence[Row], figure: str) -> Spread:
        """Return a figure over seeds: of several rows of a seed their mean counts."""
        by_seed: dict[Any, list[float]] = {}
        for row in rows:
            if row[figure] is not None:
                by_seed.setdefault(row["seed"], []).append(row[figure])
        means = [sum(values) / len(values) for values in by_seed.values()]
        if not means:
            return Spread(math.nan, None, 0)
        return Spread(
            float(np.mean(means)),
            float(np.std(means, ddof=1)) if len(means) > 1 else None,
            len(means),
        )

    def effect(self, axis: str) -> dict[str, dict[str, Spread]]:
        """Return each figure for each value of an axis, all other axes averaged."""
        return {
            value: {
                figure: self.spread([r for r in self.measured if str(r[axis]) == value], figure)
                for figure in METRICS
            }
            for value in self.values(axis)
        }

    def size(self, axis: str) -> float:
        """Return the metric's difference between the best and the worst value of an axis."""
        means = [of[self.sweep.search.metric].mean for of in self.effect(axis).values()]
        known = [mean for mean in means if not math.isnan(mean)]
        return max(known) - min(known) if known else 0.0

    @cached_property
    def by_size(self) -> list[str]:
        """The axes with several values, those of the largest effects first.

        Ranges come last: of each of their values there is one trial.
        """
        several = [axis for axis in self.axes if len(self.values(axis)) > 1]
        return sorted(several, key=lambda axis: (self.is_range(axis), -self.size(axis)))

    def is_range(self, axis: str) -> bool:
        """Return whether an axis is a range rather than a list."""
        return isinstance(self.sweep.axes[axis], Range)

    @cached_property
    def differences(self) -> dict[Level, Difference]:
        """The difference to the baseline of every point with other runs than it."""
        if self.baseline is None:
            return {}
        found: dict[Level, tuple[float, float | None]] = {}
        for level, rows in self.points.items():
            if self.is_baseline(level):
                continue
            pairs = paired(rows, self.points[self.baseline], self.sweep.search.metric)
            if len(pairs):
                found[level] = float(np.mean(pairs)), t_test(pairs)
        corrected = holm({level: p for level, (_, p) in found.items() if p is not None})
        return {level: Difference(mean, corrected.get(level)) for level, (mean, _) in found.items()}

    def is_baseline(self, level: Level) -> bool:
        """Return whether a point has the very runs of the baseline.

        So has one that differs from it in ways that do not matter.
        """
        runs, own = (
            {row["run"] for row in self.points[of]} if of is not None else set()
            for of in (self.baseline, level)
        )
        return runs == own

    def cost(self) -> dict[str, float]:
        """Return what all runs cost, each counted once."""
        runs = {row["run"]: row for row in self.rows if row["seconds"] is not None}
        resources = self.sweep.resources
        seconds = sum(row["seconds"] for row in runs.values())
        return {
            "runs": len(runs),
            "images": sum(row["images"] or 0 for row in runs.values()),
            "gpu_hours": seconds / 3600 * resources.gpus,
            "cpu_hours": seconds / 3600 * resources.cpus,
        }


def read_study(out: Path) -> Study:
    """Return the results of a sweep.

    Raises UserError where DIR is no sweep, or nothing of it is done yet.
    """
    sweep = read_sweep(out / "sweep.toml")
    try:
        with (out / "results.csv").open(encoding="utf-8", newline="") as file:
            rows = [numbered(row) for row in csv.DictReader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{out} has no results yet: go on with it by `fastlt sweep --resume`"
        ) from error
    if missing := [
        name for name in (*sweep.axes, *METRICS, "run", "status") if rows and name not in rows[0]
    ]:
        raise UserError(
            f"{out / 'results.csv'} has no column {missing[0]}: call `fastlt sweep --resume` again"
        )
    study = Study(out, sweep, rows)
    if not study.measured:
        raise UserError(
            f"no trial of {out} has a result: {out / 'results.csv'} says why; `fastlt sweep "
            "--resume` goes on with it"
        )
    return study


def numbered(row: dict[str, str]) -> Row:
    """Return a row of results.csv with its figures as numbers."""
    found: Row = dict(row)
    for name in (*FIGURES, "epochs", "images", "seconds"):
        found[name] = float(row[name]) if row.get(name) else None
    return found


def paired(rows: Sequence[Row], others: Sequence[Row], figure: str) -> np.ndarray:
    """Return the differences of the seeds that both have, (seeds,)."""
    of, to = (
        {row["seed"]: row[figure] for row in each if row[figure] is not None}
        for each in (rows, others)
    )
    return np.array([of[seed] - to[seed] for seed in of if seed in to])
