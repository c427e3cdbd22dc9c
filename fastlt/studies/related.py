"""The related systems beside their baselines, under one protocol, with what they cost."""

import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from safetensors import safe_open

from fastlt.config import load_config
from fastlt.studies.protocol import ReproduceOptions, packed, repeated, shortened
from fastlt.studies.repeated import Control, folder_name, spread
from fastlt.utils.run_files import METRICS, read_result

BALANCED = ["loss.name=balanced-ce"]
# name -> settings; each has the loss of its paper, and all else the method's defaults
RELATED: dict[str, list[str]] = {
    "ce": [],
    "balanced-softmax": [],
    "ldam-drw": [],
    "lcreg": BALANCED,
    "come": BALANCED,
    "propheter": BALANCED,
    "angular": [],
    "dlsa": BALANCED,
    "dropclass": BALANCED,
    "fate": BALANCED,
    "attentive": [],
}
SIBLINGS_EPOCHS = 40


def related_methods(options: ReproduceOptions, console: Console) -> list[dict[str, Any]]:
    """Return the rows of all methods on CIFAR-100-LT at imbalance 100, and print them."""
    pack = packed("cifar100-lt", "none", options)
    protocol = load_config("cifar100-lt")
    epochs = options.epochs or protocol.train.epochs
    settings = shortened(epochs, protocol.train.epochs)
    return compared("cifar100-lt", pack, settings, RELATED, options, console)


def related_on_siblings(options: ReproduceOptions, console: Console) -> list[dict[str, Any]]:
    """Return the rows of all methods on top of silenced siblings, and print them.

    Every method has the recipe's own loss, neighbour silencing; what would replace it is left out.
    """
    pack = packed("cifar100-siblings", "siblings", options)
    epochs = options.epochs or SIBLINGS_EPOCHS
    own: dict[str, list[str]] = {
        name: [] for name in RELATED if name not in ("ce", "balanced-softmax", "ldam-drw")
    }
    settings = [f"train.epochs={epochs}"]
    return compared("cifar100-siblings", pack, settings, {"plain": [], **own}, options, console)


def compared(
    recipe: str,
    pack: Path,
    settings: list[str],
    methods: dict[str, list[str]],
    options: ReproduceOptions,
    console: Console,
) -> list[dict[str, Any]]:
    """Train every method, print the table, and return its rows, one a run."""
    controls = {
        name: Control(pack, [*settings, *own, *options.settings], name)
        for name, own in methods.items()
    }
    rows = repeated(recipe, controls, options, console)
    for row in rows:
        run = options.out / folder_name(row["control"], row["seed"])
        row["peak_memory"] = read_result(run)["peak_memory"]
        row["parameters"] = parameters_of(run / "model.safetensors")
    console.print(cost_table(rows))
    return rows


def parameters_of(model: Path) -> int:
    """Return the numbers that an exported model holds, those of batch norm included."""
    with safe_open(model, "pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def cost_table(rows: list[dict[str, Any]]) -> Table:
    """Return accuracies, and time, memory and parameters beside the first method's."""
    names = list(dict.fromkeys(row["control"] for row in rows))
    first = [row for row in rows if row["control"] == names[0]]
    result = Table(
        "",
        "all",
        *METRICS[1:],
        "time",
        "memory",
        "parameters",
        title="accuracy of the last epoch in percent, mean ± standard deviation over seeds",
        caption=f"time and memory are over those of {names[0]}",
    )
    result.columns[0].no_wrap = True
    for name in names:
        runs = [row for row in rows if row["control"] == name]
        figures = [spread([row[group] for row in runs]) for group in METRICS]
        ratios = [f"{ratio(runs, first, key):.2f}" for key in ("seconds", "peak_memory")]
        result.add_row(name, *figures, *ratios, f"{runs[0]['parameters']:,}")
    return result


def ratio(runs: list[dict[str, Any]], first: list[dict[str, Any]], key: str) -> float:
    """Return the mean of a figure over runs, as a multiple of that over the first ones."""
    mean, base = (sum(row[key] for row in some) / len(some) for some in (runs, first))
    return mean / base if base else math.nan
