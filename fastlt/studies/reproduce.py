"""Published figures under their own protocol, and our own studies.

Both are the user's own commands, over seeds.

Runs stay in --out: one that stopped goes on when this is called again, and one that has finished is
not run again.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from fastlt.config import did_you_mean, load_config
from fastlt.errors import UserError
from fastlt.studies.auxiliaries import TASKS as AUXILIARY_TASKS
from fastlt.studies.auxiliaries import run_task
from fastlt.studies.finetune import finetune
from fastlt.studies.protocol import ReproduceOptions, packed, repeated, shortened
from fastlt.studies.related import related_methods, related_on_siblings
from fastlt.studies.repeated import Control, spread
from fastlt.utils.results_file import append_rows, check_file
from fastlt.utils.run_files import METRICS


class Published(NamedTuple):
    """The top-1 in percent of several papers and re-runs; theirs is the best test epoch."""

    method: str
    low: float
    high: float


WITHOUT_ROWS = ("cifar100-lt", "methods", "methods-siblings")
CIFAR100_LT = {  # worst first; CIFAR-100-LT at imbalance 100, ResNet-32, 200 epochs
    "cross entropy": Published("ce", 38.0, 40.5),
    "LDAM-DRW": Published("ldam-drw", 41.5, 43.5),
    "Balanced Softmax": Published("balanced-softmax", 43.0, 47.0),
}


def run_reproduce(task: str, options: ReproduceOptions, csv: Path | None, console: Console) -> None:
    """Run `fastlt reproduce`. Raises UserError for an unknown task."""
    if task not in TASKS:
        raise UserError(
            f"there is nothing to reproduce by the name '{task}'{did_you_mean(task, list(TASKS))}: "
            f"{', '.join(TASKS)}"
        )
    if options.only and task in WITHOUT_ROWS:
        raise UserError(f"--only picks rows of other studies than {task}: leave it out")
    if csv is not None:
        check_file(csv)
    rows = TASKS[task](options, console)
    if csv is not None:
        append_rows(csv, rows)
        console.print(f"added to {csv}")


def cifar100_lt(options: ReproduceOptions, console: Console) -> list[dict[str, Any]]:
    """Return the rows of published methods on CIFAR-100-LT, and print them beside theirs."""
    pack = packed("cifar100-lt", "none", options)
    protocol = load_config("cifar100-lt")
    epochs = options.epochs or protocol.train.epochs
    settings = [*shortened(epochs, protocol.train.epochs), *options.settings]
    controls = {
        name: Control(pack, settings, published.method) for name, published in CIFAR100_LT.items()
    }
    rows = repeated("cifar100-lt", controls, options, console)
    changed = epochs != protocol.train.epochs or bool(options.settings)
    console.print(
        beside_published(
            rows, changed, f"CIFAR-100-LT, imbalance 100: top-1 in percent, {epochs} epochs"
        )
    )
    console.print(
        "published: the best test epoch; ours: the last, and the best one beside it",
        highlight=False,
    )
    if changed:
        console.print(
            "the protocol was changed, so the bounds do not apply; the order may", highlight=False
        )
    console.print(order(rows), highlight=False)
    return rows


TASKS: dict[str, Callable[[ReproduceOptions, Console], list[dict[str, Any]]]] = {
    "cifar100-lt": cifar100_lt,
    **{name: partial(run_task, name) for name in AUXILIARY_TASKS},
    "methods": related_methods,
    "methods-siblings": related_on_siblings,
    "finetune": finetune,
}


def beside_published(rows: list[dict[str, Any]], changed: bool, title: str) -> Table:
    """Return a table of our figures beside the published ones."""
    result = Table("", "published", "ours", "best epoch", *METRICS[1:], "", title=title)
    result.columns[0].no_wrap = True
    for name, published in CIFAR100_LT.items():
        runs = [row for row in rows if row["control"] == name]
        best = spread([row["best_top1"] for row in runs])
        verdict = "" if changed else place_of(mean_top1(rows, name), published)
        groups = [spread([row[group] for row in runs]) for group in METRICS]
        result.add_row(
            name, f"{published.low:g}..{published.high:g}", groups[0], best, *groups[1:], verdict
        )
    return result


def place_of(value: float, published: Published) -> str:
    """Return whether a figure is below, in or above the published range."""
    return "below" if value < published.low else "above" if value > published.high else "in range"


def order(rows: list[dict[str, Any]]) -> str:
    """Return whether the methods come in the published order, in words."""
    found = sorted(CIFAR100_LT, key=lambda name: mean_top1(rows, name))
    if found == list(CIFAR100_LT):
        return f"the published order holds: {' < '.join(found)}"
    return f"the published order ({' < '.join(CIFAR100_LT)}) does not hold: {' < '.join(found)}"


def mean_top1(rows: list[dict[str, Any]], name: str) -> float:
    """Return the mean top-1 of a control."""
    values = [row["top1"] for row in rows if row["control"] == name]
    return sum(values) / len(values)
