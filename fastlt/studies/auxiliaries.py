"""`fastlt reproduce cifar100-siblings`, `cifar100-deep` and `grocery`: when auxiliary classes help.

The plan, written before the first run, is the page studies/auxiliaries.md: which rows, which
differences, which tests.
"""

from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from fastlt.evaluation.paired import Paired, corrected, paired
from fastlt.studies.auxiliary_kinds import (
    KINDS,
    NONE,
    as_many_images,
    chosen,
    scored_on_test,
)
from fastlt.studies.protocol import ReproduceOptions, packed, repeated
from fastlt.studies.repeated import Control, folder_name, table
from fastlt.utils.run_files import METRICS

SILENCED = "silenced 0.1"


class Task(NamedTuple):
    """A task of the study."""

    recipe: str
    settings: list[str]
    epochs: int
    budgets: tuple[int, ...]  # images of an auxiliary class in an epoch, besides the base
    lengths: tuple[int, ...] = ()
    models: tuple[str, ...] = ()
    neighbours: tuple[int, ...] = (1, 2)
    has_test: bool = False  # else the pack's validation images are the test images of its source


CIFAR = ["model.name=resnet14", "data.workers=0"]
TASKS = {
    "cifar100-siblings": Task(
        "cifar100-siblings",
        CIFAR,
        150,
        (10, 25, 100, 500),
        (40, 80),
        ("resnet20", "resnet32"),
    ),
    "cifar100-deep": Task("cifar100-siblings", [*CIFAR, "data.budget=100"], 100, (10, 25, 50, 500)),
    "grocery": Task(
        "fit",
        [
            "model.name=tf_efficientnet_lite0",
            "model.pretrained=true",
            "data.size=128",
            "data.groups=thirds",
            "train.patience=0",
        ],
        30,
        (10, 50),
        has_test=True,
    ),
}


class Row(NamedTuple):
    """A kind of runs."""

    auxiliaries: str  # --auxiliary of the pack
    settings: list[str]
    epochs: int
    overlap: float = 0.0
    sees_as_many: bool = False  # images as with auxiliaries, in more epochs


def rows_of(name: str, options: ReproduceOptions) -> dict[str, Row]:
    """Return all rows of a task by their name, `family | row`; the base first."""
    task = TASKS[name]
    epochs = options.epochs or task.epochs

    def kind(which: str, *settings: str, length: int = epochs, **more: Any) -> Row:
        auxiliaries, own = KINDS[which]
        return Row(auxiliaries, [*own, *settings], length, sees_as_many=which == NONE, **more)

    rows = {f"base | {which}": kind(which) for which in KINDS}
    rows |= {
        f"tau 0 | {which}": kind(which, *(["loss.name=ce"] if which == NONE else ["loss.tau=0"]))
        for which in (NONE, "neighbours", SILENCED, "hard mask")
    }
    rows |= {f"silence | {s:g}": kind(SILENCED, f"loss.silence={s}") for s in (0.3, 0.03)}
    rows |= {f"a target | {n}": kind(SILENCED, f"data.neighbours={n}") for n in task.neighbours}
    rows |= {f"images | {n}": kind(SILENCED, f"data.budget={n}") for n in task.budgets}
    rows |= {f"overlap | {s:g}": kind(SILENCED, overlap=s) for s in (0.1, 0.3)}
    rows |= {
        f"length {length} | {which}": kind(which, length=length)
        for length in task.lengths
        for which in (NONE, "neighbours", SILENCED, "hard mask")
    }
    rows |= {
        f"{model} | {which}": kind(which, f"model.name={model}")
        for model in task.models
        for which in (NONE, "neighbours", SILENCED)
    }
    if task.has_test:
        frozen = ["model.adapt=head", "data.features=cache"]
        rows |= {
            f"head | {which}": kind(which, *frozen)
            for which in (NONE, "random", "neighbours", SILENCED, "hard mask")
        }
    if name != "grocery":
        merged = ["loss.name=balanced-ce", "data.auxiliary=merged"]
        rows["merged | neighbours"] = Row("siblings", merged, epochs)
    return rows


def run_task(name: str, options: ReproduceOptions, console: Console) -> list[dict[str, Any]]:
    """Return the rows of a task, a run each, and print them with their differences.

    Without --only it is the base alone.
    """
    rows = rows_of(name, options)
    wanted = chosen(rows, options.only or ("base | *",))
    controls = {one: control_of(name, rows[one], options) for one in wanted}
    found = repeated(TASKS[name].recipe, controls, options, console)
    if TASKS[name].has_test:
        found = [on_test(row, options) for row in found]
    found = [{"task": name, **row} for row in found]
    console.print(table(found))
    console.print(differences(found))
    return found


def control_of(name: str, row: Row, options: ReproduceOptions) -> Control:
    """Return the training of a row; its pack is made where it is not there yet."""
    task = TASKS[name]
    more = ("--overlap", f"{row.overlap:g}") if row.overlap else ()
    pack = packed(name, row.auxiliaries, options, *more)
    settings = [*task.settings, *row.settings, *options.settings]
    epochs = row.epochs
    if row.sees_as_many:
        with_them = packed(name, "siblings", options)
        epochs = as_many_images(epochs, with_them, task.recipe, settings)
    return Control(pack, [*settings, f"train.epochs={epochs}", "train.keep_best=false"])


def on_test(row: dict[str, Any], options: ReproduceOptions) -> dict[str, Any]:
    """Return the figures of a run with those of test images in place of validation images."""
    tested = scored_on_test(options.out / folder_name(row["control"], row["seed"]))
    names = (*METRICS, "balanced_accuracy")
    return row | {name: tested[name] for name in names} | {"val_top1": row["top1"]}


# --- differences

# those that the plan names: row, the row it is held against
PLANNED = (
    ("neighbours", NONE),
    ("neighbours", "random"),
    (SILENCED, "neighbours"),
    ("hard mask", "neighbours"),
)


def family_of(rows: list[dict[str, Any]]) -> dict[str, Paired | None]:
    """Return the differences of the plan by their name, of the rows that there are."""
    tops: dict[str, dict[int, float]] = {}
    for row in rows:
        tops.setdefault(row["control"], {})[row["seed"]] = row["top1"]
    groups = dict.fromkeys(name.partition(" | ")[0] for name in tops)
    pairs = [
        (f"{group} | {one}", f"{group} | {other}") for group in groups for one, other in PLANNED
    ]
    base = f"base | {SILENCED}"
    pairs += [
        (name, base)
        for name in tops
        if name.partition(" | ")[0] in ("silence", "a target", "images", "overlap")
    ]
    return {
        f"{one} - {other.removeprefix(one.partition(' | ')[0] + ' | ')}": paired(
            tops[one], tops[other]
        )
        for one, other in pairs
        if one in tops and other in tops
    }


def differences(rows: list[dict[str, Any]]) -> Table:
    """Return the table of the differences of the plan."""
    found = family_of(rows)
    p_values = corrected(found)
    result = Table(
        "difference", "points", "95 %", "t", "p", "Holm", "seeds", title="paired over seeds"
    )
    result.columns[0].overflow = "fold"
    for name, one in found.items():
        if one is None:
            result.add_row(name, *["-"] * 6)
            continue
        interval = f"{one.low:+.1f} to {one.high:+.1f}"
        cells = (f"{one.mean:+.1f}", interval, f"{one.t:.1f}", f"{one.p:.2g}")
        result.add_row(name, *cells, f"{p_values[name]:.2g}", str(one.seeds))
    return result
