"""`fastlt reproduce finetune`: how much of a pretrained backbone to train, and what auxiliary
classes and silencing are worth then.

Rows are kinds of `model.adapt`, columns are kinds of auxiliaries. With grocery:DIR the backbone is
a CNN whose weights `model.weights=` names; with cifar100:DIR it is a small vision transformer that
is pretrained first, on classes of CIFAR-100 that have nothing to do with the targets.
"""

import statistics
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from fastlt.config import load_config
from fastlt.errors import UserError
from fastlt.studies.auxiliary_kinds import (
    KINDS,
    NONE,
    as_many_images,
    chosen,
    scored_on_test,
)
from fastlt.studies.pretraining import SMALL_VIT, pretrained_vit
from fastlt.studies.protocol import ReproduceOptions, packed, repeated
from fastlt.studies.repeated import Control, folder_name, spread
from fastlt.utils.run_files import METRICS, read_result

CACHED_SEEDS = 5  # at least, of rows that are trained on features computed once
COLUMNS = (NONE, "neighbours", "silenced 0.1", "random", "hard mask")
CACHED = ["model.adapt=head", "data.features=cache"]
ADAMW = ["optim.name=adamw", "optim.nesterov=false"]


class Task(NamedTuple):
    """A pack, and the rows that are trained on it."""

    pack: str  # --task of `fastlt pack`
    recipe: str
    settings: list[str]
    rows: dict[str, list[str]]  # name -> settings
    columns: tuple[str, ...] = COLUMNS
    alone: Mapping[str, list[str]] = {}  # of rows whose rate without auxiliaries is another
    has_test: bool = True  # else the pack's validation images are the test images of its source


# The rates are those of the best balanced accuracy on validation images: see the page's account.
GROCERY = Task(
    "grocery",
    "fit",
    # small, so that two cores can run it
    [
        "model.name=tf_efficientnet_lite0",
        "model.pretrained=true",
        "data.size=64",
        "train.epochs=10",
        "train.patience=0",
        "data.groups=thirds",
    ],
    {
        "head": [*CACHED, "optim.lr=0.03"],
        "bitfit": ["model.adapt=bitfit", *ADAMW, "optim.lr=0.01"],
        "norm": ["model.adapt=norm", *ADAMW, "optim.lr=0.01"],
        "lora": ["model.adapt=lora", "optim.lr=0.03"],
        "last:2": ["model.adapt=last:2", "optim.lr=0.1"],
        "full": ["optim.lr=0.1"],
    },
    alone={"full": ["optim.lr=0.03"]},  # at 0.1 it diverges there
)
SIBLINGS = Task(
    "cifar100-siblings",
    "finetune-vit",
    [*SMALL_VIT, "data.crop=pad-crop", "data.batch=128", "data.budget=50", "train.epochs=10"],
    {
        "head": [*CACHED, "optim.lr=0.01"],
        "bitfit": ["model.adapt=bitfit", "optim.lr=0.03"],
        "norm": ["model.adapt=norm", "optim.lr=0.03"],
        "lora": ["model.adapt=lora", "optim.lr=0.01"],
        "adaptformer": ["model.adapt=adaptformer", "optim.lr=0.01"],
        "vpt-deep": ["model.adapt=vpt-deep", "optim.lr=0.03"],
        "last:2": ["model.adapt=last:2", "optim.lr=0.003"],
        "full": ["model.adapt=full", "optim.lr=0.001"],
    },
    tuple(name for name in COLUMNS if name != "random"),
    has_test=False,
)
TASKS = {"grocery": GROCERY, "cifar100": SIBLINGS}


def finetune(options: ReproduceOptions, console: Console) -> list[dict[str, Any]]:
    """Return the rows of the study, a run each, and print their tables.

    Raises UserError for a source of another kind, and where there are no weights to begin with.
    """
    kind = options.source.partition(":")[0]
    if kind not in TASKS:
        raise UserError(
            f"finetune is for --data {':DIR or '.join(TASKS)}:DIR, not for '{options.source}'"
        )
    task = TASKS[kind]
    begin = start_of(kind, options, console)
    controls = controls_of(task, [*begin, *options.settings], options)
    cached = {name: one for name, one in controls.items() if "data.features=cache" in one.settings}
    others = {name: one for name, one in controls.items() if name not in cached}
    rows = []
    for some, least in ((cached, CACHED_SEEDS), (others, 1)):
        if some:
            found = repeated(task.recipe, some, options, console, least)
            rows += [described(row, task, options) for row in found]
    console.print(accuracies(rows))
    console.print(by_group(rows))
    return rows


def start_of(kind: str, options: ReproduceOptions, console: Console) -> list[str]:
    """Return the settings of the weights to begin with; those of the transformer are made here."""
    if any(
        setting.startswith(("model.weights=", "model.pretrained=")) for setting in options.settings
    ):
        return []
    if kind == "cifar100":
        return pretrained_vit(options, console)
    return []  # from the hub


def controls_of(task: Task, settings: list[str], options: ReproduceOptions) -> dict[str, Control]:
    """Return the trainings of rows and columns, `row | column`, that --only lets through."""
    names = {f"{row} | {column}": (row, column) for column in task.columns for row in task.rows}
    wanted = chosen(names, options.only)
    controls = {}
    for name in wanted:
        row, column = names[name]
        auxiliaries, own = KINDS[column]
        pack = packed(task.pack, auxiliaries, options)
        alone = task.alone.get(row, []) if column == NONE else []
        every = [*task.settings, *task.rows[row], *alone, *own, *settings]
        epochs = options.epochs or load_config(task.recipe, every).train.epochs
        if column == NONE:
            with_them = packed(task.pack, "siblings", options)
            epochs = as_many_images(epochs, with_them, task.recipe, every)
        every += [f"train.epochs={epochs}", f"train.eval_every={epochs}", "train.keep_best=false"]
        controls[name] = Control(pack, every)
    return controls


def described(row: dict[str, Any], task: Task, options: ReproduceOptions) -> dict[str, Any]:
    """Return the figures of a run, those of test images among them, and what it trained."""
    run = options.out / folder_name(row["control"], row["seed"])
    kind, column = row["control"].split(" | ")
    result = read_result(run)
    found = {"row": kind, "column": column, **row, "val_top1": row["top1"]}
    if task.has_test:
        tested = scored_on_test(run)
        found |= {name: tested[name] for name in (*METRICS, "balanced_accuracy")}
    return found | {
        "parameters": result["parameters"],
        "trained_parameters": result["trained_parameters"],
    }


# --- tables


def accuracies(rows: list[dict[str, Any]]) -> Table:
    """Return test accuracy by row and column, with what a row trains and how long it took."""
    columns = list(dict.fromkeys(row["column"] for row in rows))
    table = Table(
        "trained",
        "share",
        *columns,
        "s a run",
        title="test accuracy in percent, mean ± standard deviation over seeds",
    )
    table.columns[0].no_wrap = True
    for kind in dict.fromkeys(row["row"] for row in rows):
        runs = [row for row in rows if row["row"] == kind]
        cells = [spread([r["top1"] for r in runs if r["column"] == column]) for column in columns]
        share = statistics.mean(r["trained_parameters"] / r["parameters"] for r in runs)
        seconds = statistics.mean(row["seconds"] for row in runs)
        table.add_row(kind, f"{share:.2%}", *cells, f"{seconds:,.0f}")
    return table


def by_group(rows: list[dict[str, Any]]) -> Table:
    """Return test accuracy in the groups many, medium and few."""
    columns = list(dict.fromkeys(row["column"] for row in rows))
    table = Table("trained", *columns, title="many / medium / few")
    table.columns[0].no_wrap = True
    for kind in dict.fromkeys(row["row"] for row in rows):
        cells = []
        for column in columns:
            runs = [row for row in rows if (row["row"], row["column"]) == (kind, column)]
            cells.append(" / ".join(mean_of(run[group] for run in runs) for group in METRICS[1:]))
        table.add_row(kind, *cells)
    return table


def mean_of(values: Iterable[float | None]) -> str:
    """Return a mean in words."""
    known = [value for value in values if value is not None]
    return f"{statistics.mean(known):.0f}" if known else "-"
