"""Published figures under their own protocol, and the controls of our own claim.

Both are the user's own commands, over seeds.

Runs stay in --out: one that stopped goes on when this is called again, and one that has finished is
not run again.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from fastlt.config import did_you_mean, load_config
from fastlt.errors import UserError
from fastlt.studies.finetune import finetune
from fastlt.studies.protocol import ReproduceOptions, packed, repeated, shortened
from fastlt.studies.related import related_methods, related_on_siblings
from fastlt.studies.repeated import Control, spread, table
from fastlt.utils.results_file import append_rows, check_file
from fastlt.utils.run_files import METRICS


class Published(NamedTuple):
    """The top-1 in percent of several papers and re-runs; theirs is the best test epoch."""

    method: str
    low: float
    high: float


CIFAR100_LT = {  # worst first; CIFAR-100-LT at imbalance 100, ResNet-32, 200 epochs
    "cross entropy": Published("ce", 38.0, 40.5),
    "LDAM-DRW": Published("ldam-drw", 41.5, 43.5),
    "Balanced Softmax": Published("balanced-softmax", 43.0, 47.0),
}
SIBLINGS: dict[str, tuple[str, list[str]]] = {  # name -> auxiliary set of the pack, settings
    "no auxiliaries": ("none", ["loss.name=balanced-ce"]),
    # 40 * 3,795 / 2,295
    "no auxiliaries, as many images": (
        "none",
        ["loss.name=balanced-ce", "train.epochs=66"],
    ),
    "auxiliaries merged into their targets": (
        "siblings",
        ["loss.name=balanced-ce", "data.auxiliary=merged"],
    ),
    "random auxiliaries": ("random", []),
    "neighbours, unsilenced (1)": ("siblings", ["loss.silence=1"]),
    "neighbours, silenced (0.1)": ("siblings", ["loss.silence=0.1"]),
    "neighbours, hard mask (0)": ("siblings", ["loss.silence=0"]),
}


def run_reproduce(task: str, options: ReproduceOptions, csv: Path | None, console: Console) -> None:
    """Run `fastlt reproduce`. Raises UserError for an unknown task."""
    if task not in TASKS:
        raise UserError(
            f"there is nothing to reproduce by the name '{task}'{did_you_mean(task, list(TASKS))}: "
            f"{', '.join(TASKS)}"
        )
    if options.only and task != "finetune":
        raise UserError("--only is for finetune, whose rows and columns it picks: leave it out")
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


def siblings(options: ReproduceOptions, console: Console) -> list[dict[str, Any]]:
    """Return the rows of the controls on CIFAR-100 with sibling auxiliaries, and print them."""
    packs = {
        kind: packed("cifar100-siblings", kind, options)
        for kind in dict.fromkeys(kind for kind, _ in SIBLINGS.values())
    }
    last = [f"train.epochs={options.epochs}"] if options.epochs else []
    controls = {
        name: Control(packs[kind], [*extra, *last, *options.settings])
        for name, (kind, extra) in SIBLINGS.items()
    }
    rows = repeated("cifar100-siblings", controls, options, console)
    console.print(table(rows))
    return rows


TASKS: dict[str, Callable[[ReproduceOptions, Console], list[dict[str, Any]]]] = {
    "cifar100-lt": cifar100_lt,
    "cifar100-siblings": siblings,
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
