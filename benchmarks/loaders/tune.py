"""`fastlt bench-data --tune`: the fastest engine and settings for the images on this machine."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from fastlt.data.engines import dali
from fastlt.errors import UserError
from fastlt.utils.pool import cores
from fastlt_benchmarks.loaders.contenders import start_ours
from fastlt_benchmarks.loaders.images import PACK
from fastlt_benchmarks.loaders.trials import Contender, Task, Trial, run_rounds
from fastlt_benchmarks.loss.run import progress_bar

ENGINES = ("torch", "ffcv", "dali")  # the one that forks before those with threads
PREFETCH = (1, 2, 4)  # batches
HW_DECODER_LOAD = (0.0, 0.65, 1.0)


@dataclass
class Setting:
    """A way in which `fastlt train` can load, and how fast that is."""

    engine: str
    options: dict[str, Any]  # of the [data] section

    def __post_init__(self) -> None:
        start = partial(start_ours, engine=self.engine, decode="auto", **self.options)
        self.trial = Trial(
            Contender(str(self), "", "ours", PACK, start, forks=self.engine == "torch")
        )

    def __str__(self) -> str:
        return " ".join(
            [
                f"data.engine={self.engine}",
                *(f"data.{name}={value:g}" for name, value in self.options.items()),
            ]
        )

    @property
    def rate(self) -> float:
        """The median of images/s."""
        return (
            statistics.median(epoch.rate for epoch in self.trial.later) if self.trial.later else 0
        )


def run_tune(task: Task, rounds: int, console: Console) -> None:
    """Print a table, and the best settings as a line. Raises UserError where no engine runs."""
    settings = []
    for engine in ENGINES:
        settings += measured(
            [Setting(engine, {"workers": 2**k}) for k in range(cores().bit_length())],
            task,
            rounds,
            console,
        )
    for name, values, usual in (
        ("prefetch", PREFETCH, dali.PREFETCH),
        (
            "hw_decoder_load",
            HW_DECODER_LOAD if task.device.type == "cuda" else (),
            dali.HW_DECODER_LOAD,
        ),
    ):
        best = max(
            (setting for setting in settings if setting.engine == "dali"),
            key=lambda setting: setting.rate,
        )
        if best.rate:
            others = [
                Setting("dali", {**best.options, name: value}) for value in values if value != usual
            ]
            settings += measured(others, task, rounds, console)
    show(settings, task, rounds, console)


def measured(settings: list[Setting], task: Task, rounds: int, console: Console) -> list[Setting]:
    """Return the settings, measured in turn. One that fails has a rate of 0."""
    trials = [setting.trial for setting in settings]
    images = len(task.images.split)
    with progress_bar(console) as progress:
        shown = progress.add_task("", total=len(trials) * (rounds + 1) * images, place="")

        def report(line: str, done: int) -> None:
            epochs = sum(
                rounds + 1 if trial.reason else bool(trial.first) + len(trial.later)
                for trial in trials
            )
            progress.update(shown, description=line, completed=epochs * images + done)

        run_rounds(trials, task, rounds, report)
    return settings


def show(settings: list[Setting], task: Task, rounds: int, console: Console) -> None:
    """Print the settings, fastest first."""
    best = max(settings, key=lambda setting: setting.rate)
    if not best.rate:
        raise UserError(
            "no engine can load these images: "
            f"{'; '.join(f'{s.engine}: {s.trial.reason}' for s in settings)}"
        )
    title = (
        f"{task.images.what} to {task.size} x {task.size}, batch {task.batch}, nothing but "
        f"loading: median of {rounds} epochs"
    )
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, show_edge=False)
    table.add_column("settings", no_wrap=True)
    for name in ("images/s", "CPU s/1,000"):
        table.add_column(name, justify="right")
    for setting in settings:
        table.add_row(
            str(setting),
            *cells(setting.trial, len(task.images.split)),
            style="bold" if setting is best else None,
        )
    console.print(table)
    for engine, reason in {
        setting.engine: setting.trial.reason for setting in settings if setting.trial.reason
    }.items():
        console.print(f"  {engine}: {reason}", style="dim", highlight=False, markup=False)
    needs = ", for a pack written with --beton" if best.engine == "ffcv" else ""
    console.print(
        f"\nfastest{needs}; give it to `fastlt train`, which keeps it in RUN/config.toml:",
        highlight=False,
    )
    console.print(str(best), highlight=False, markup=False, soft_wrap=True)


def cells(trial: Trial, images: int) -> list[str]:
    """Return the cells of a row."""
    if not trial.later:
        return ["-", "-"]
    spent = [
        1_000 * epoch.cpu_seconds / images for epoch in trial.later if epoch.cpu_seconds is not None
    ]
    return [
        f"{statistics.median(epoch.rate for epoch in trial.later):,.0f}",
        f"{statistics.median(spent):.2f}" if spent else "-",
    ]
