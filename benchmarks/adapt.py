"""`fastlt bench-train --adapt`: what kinds of `model.adapt` cost beside the whole model."""

import statistics
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from fastlt.config import load_config
from fastlt.models.adapt import FULL
from fastlt.training.dry_run import Memory, memory_of, probe
from fastlt.training.loop import open_packs, set_modes
from fastlt.training.setup import Trainer, prepare
from fastlt.utils.results_file import append_rows
from fastlt_benchmarks.train import WARM_UP, place_of, timed
from fastlt_benchmarks.train_steps import Marks, loop_steps

PROBED = 2  # images by which activations are counted


class Kind(NamedTuple):
    """A kind of `model.adapt` with its trainer."""

    name: str
    trainer: Trainer
    steps: Iterator[int]
    memory: Memory


def run_bench_adapt(
    recipe: str,
    kinds: list[str],
    settings: list[str],
    data: str | None,
    steps: int,
    rounds: int,
    csv: Path | None,
    console: Console,
) -> None:
    """Measure the loop of each kind in turn, round after round, and print speed and memory.

    Memory is counted: parameters, gradients, the optimiser's state, and what the forward pass of a
    batch keeps for the backward pass.
    """
    names = [FULL, *(kind for kind in kinds if kind != FULL)]
    with place_of(recipe, settings, data, csv) as (folder, pack), ExitStack() as stack:
        measured = []
        for number, name in enumerate(names):
            config = load_config(recipe, [*settings, f"model.adapt={name}", pack])
            packs = open_packs(config.data)
            trainer = stack.enter_context(prepare(config, folder / f"run{number}", packs))
            measured.append(begun(name, trainer))
        speeds = measure(measured, steps, rounds, console)
        rows = [row(kind, speeds[kind.name], speeds[FULL], recipe) for kind in measured]
    console.print(table_of(rows, recipe))
    if csv is not None:
        append_rows(csv, rows)
        console.print(f"added to {csv}")


def begun(name: str, trainer: Trainer) -> Kind:
    """Return a kind whose first steps are done, which allocate, and compile where that is on."""
    set_modes(trainer)
    per_image, _ = probe(trainer, PROBED)
    steps = loop_steps(trainer, Marks(trainer.device))
    timed(steps, WARM_UP, trainer)
    return Kind(name, trainer, steps, memory_of(trainer, per_image))


def measure(kinds: list[Kind], steps: int, rounds: int, console: Console) -> dict[str, list[float]]:
    """Return the images/s of each kind in every round."""
    found: dict[str, list[float]] = {kind.name: [] for kind in kinds}
    with console.status("measuring") as status:
        for number in range(rounds):
            for kind in kinds:
                status.update(f"measuring: round {number + 1} of {rounds}, {kind.name}")
                found[kind.name].append(timed(kind.steps, steps, kind.trainer))
    return found


def row(kind: Kind, speeds: list[float], full: list[float], recipe: str) -> dict[str, Any]:
    """Return the figures of a kind."""
    trainer = kind.trainer
    total, trained = trainer.parameters
    batch = trainer.config.data.batch
    ratios = [one / whole for one, whole in zip(speeds, full, strict=True)]
    return {
        "recipe": recipe,
        "model": trainer.config.model.name,
        "adapt": kind.name,
        "batch": batch,
        "size": trainer.config.data.size,
        "precision": str(trainer.dtype).removeprefix("torch."),
        "parameters": total,
        "trained_parameters": trained,
        "images_per_second": round(statistics.median(speeds), 1),
        "steps_per_second": round(statistics.median(speeds) / batch, 3),
        "speed_over_full": round(statistics.median(ratios), 3),
        "memory_mb": round(kind.memory.at(batch) / 1e6, 1),
        "activations_mb": round(batch * kind.memory.per_image / 1e6, 1),
    }


def table_of(rows: list[dict[str, Any]], recipe: str) -> Table:
    """Return the table of all kinds."""
    first = rows[0]
    title = f"{recipe}: {first['model']}, batch {first['batch']} of {first['size']} pixels"
    table = Table("model.adapt", "trained", "steps/s", "of full", "memory", "of full", title=title)
    for one in rows:
        table.add_row(
            one["adapt"],
            f"{one['trained_parameters'] / one['parameters']:.2%}",
            f"{one['steps_per_second']:.2f}",
            f"{one['speed_over_full']:.2f}",
            f"{one['memory_mb']:,.0f} MB",
            f"{one['memory_mb'] / first['memory_mb']:.2f}",
        )
    return table
