"""`fastlt bench-data`: images/s and CPU time of the loaders and of their peers, against what
libjpeg-turbo alone can do.
"""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from fastlt.errors import UserError
from fastlt.utils.pool import cores
from fastlt.utils.results_file import append_rows, check_place
from fastlt_benchmarks.loaders.contenders import all_contenders, all_limits
from fastlt_benchmarks.loaders.images import Images, choose_images, temporary_folder, write_forms
from fastlt_benchmarks.loaders.plot import draw
from fastlt_benchmarks.loaders.table import TABLE_WIDTH, Row, method, reasons, table
from fastlt_benchmarks.loaders.trials import Contender, Task, Trial, run_rounds
from fastlt_benchmarks.loaders.tune import run_tune
from fastlt_benchmarks.loss.run import device_slug, installed, progress_bar, rounded, where_kept

QUICK_IMAGES = 200
IMAGES_PER_CORE, LEAST_IMAGES = 500, 1_000  # an epoch of the fastest takes half a second and more
MOST_IMAGES = 10_000  # of a pack or a folder: each is copied up to eight times
PACKAGES = {
    "pillow_version": "pillow",
    "simplejpeg_version": "simplejpeg",
    "ffcv_version": "ffcv",
    "dali_version": "nvidia-dali-cuda130",
    "spdl_version": "spdl-io",
}
COLUMNS = (
    "contender",
    "kind",
    "source",
    "images",
    "mean_kb",
    "median_width",
    "median_height",
    "size",
    "batch",
    "workers",
    "rounds",
    "first_epoch_s",
    "first_images_per_s",
    "images_per_s",
    "images_per_s_min",
    "images_per_s_max",
    "cpu_s_per_1000_images",
    "ratio_to_pillow",
    "ratio_to_ffcv_stock",
    "percent_of_decoding",
    *PACKAGES,
    "reason",
)


def run_bench_data(
    data: str | None,
    images: Path | None,
    size: int,
    batch: int,
    workers: int | None,
    rounds: int,
    names: list[str] | None,
    quick: bool,
    tune: bool,
    out: Path | None,
    console: Console,
) -> None:
    """Print a table of the loaders, or with `tune` of the settings of fastlt's own.

    With `out` the former is added to OUT/data-<device>.csv, and OUT/data-<device>.png is drawn;
    without, nothing is written.
    """
    if not console.is_terminal:
        # a file has no width, and would be taken for a screen of 80
        console.width = max(console.width, TABLE_WIDTH)
    if tune and names:
        raise UserError("--tune goes through the engines of fastlt: leave --contender out")
    contenders = choose(all_contenders(), names or [])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = None if out is None or tune else out / f"data-{device_slug(device)}.csv"
    if path is not None:
        check_place(path, COLUMNS)
    generated = QUICK_IMAGES if quick else max(LEAST_IMAGES, IMAGES_PER_CORE * cores())
    most = generated if quick or tune else MOST_IMAGES
    with temporary_folder() as folder:
        with console.status("choosing the images"):
            choice = choose_images(data, images, most, generated, folder)
        prepared = write_forms(
            choice, {contender.form for contender in contenders if not tune}, folder, console
        )
        task = Task(prepared, size, batch, workers or cores(), device)
        if tune:
            run_tune(task, rounds, console)
            return
        console.print(
            method(task, rounds, [*contenders, *all_limits()]), highlight=False, markup=False
        )
        trials = measure(contenders, task, rounds, console)
    show(trials, task, rounds, path, console)


def choose(contenders: list[Contender], names: list[str]) -> list[Contender]:
    """Return the named contenders, all without names. Raises UserError for an unknown one."""
    known = [contender.name for contender in contenders]
    for name in names:
        if name not in known:
            raise UserError(
                f"--contender: there is no '{name}': it must be one of {', '.join(known)}"
            )
    return [contender for contender in contenders if contender.name in (names or known)]


def measure(contenders: list[Contender], task: Task, rounds: int, console: Console) -> list[Trial]:
    """Return the trials of all contenders and limits."""
    trials = [Trial(contender) for contender in [*contenders, *all_limits()]]
    images = len(task.images.split)
    with progress_bar(console) as progress:
        shown = progress.add_task("", total=len(trials) * (rounds + 1) * images, place="")

        def report(name: str, done: int) -> None:
            trial = next(trial for trial in trials if trial.contender.name == name)
            number = len(trial.later) + bool(trial.first)
            # who failed is through with it
            epochs = sum(number if t.reason else len(t.later) + bool(t.first) for t in trials)
            before = f", before {trial.last.rate:,.0f} images/s" if trial.last else ""
            place = f"{f'round {number} of {rounds}' if number else 'first epoch'}{before}"
            progress.update(shown, description=name, completed=epochs * images + done, place=place)

        run_rounds(trials, task, rounds, report)
    return trials


def show(trials: list[Trial], task: Task, rounds: int, path: Path | None, console: Console) -> None:
    """Print the table, and keep it where there is a path."""
    rows = [make_row(trial, trials, task, rounds) for trial in trials]
    console.print(table(rows))
    for line in reasons(rows):
        console.print(line, style="dim", highlight=False, markup=False)
    if path is not None:
        append_rows(path, rows)
        draw(rows, path.with_suffix(".png"))
    console.print(f"\n{where_kept(path)}", highlight=False)


# ---- what is kept and shown


def make_row(trial: Trial, trials: list[Trial], task: Task, rounds: int) -> Row:
    """Return the columns of the file; empty where nothing was measured."""
    row: Row = dict.fromkeys(COLUMNS)
    row |= {
        "contender": trial.contender.name,
        "kind": trial.contender.kind,
        **of_images(task.images),
    }
    workers = cores() if trial.contender.kind == "limit" else task.workers
    row |= {
        "size": task.size,
        "batch": task.batch,
        "workers": workers,
        "rounds": rounds,
        "reason": trial.reason,
    }
    row |= {column: installed(package) for column, package in PACKAGES.items()}
    if trial.first is None:
        return row
    rates = [epoch.rate for epoch in trial.later]
    row |= {
        "first_epoch_s": rounded(trial.first.seconds),
        "first_images_per_s": rounded(trial.first.rate),
    }
    row |= {"images_per_s": rounded(statistics.median(rates))}
    row |= {"images_per_s_min": rounded(min(rates)), "images_per_s_max": rounded(max(rates))}
    spent = [
        1_000 * epoch.cpu_seconds / row["images"]
        for epoch in trial.later
        if epoch.cpu_seconds is not None
    ]
    row["cpu_s_per_1000_images"] = rounded(statistics.median(spent)) if spent else None
    for column, name, scale in (
        ("ratio_to_pillow", "pillow", 1),
        ("ratio_to_ffcv_stock", "ffcv-stock", 1),
        ("percent_of_decoding", "decoding", 100),
    ):
        row[column] = ratio(
            trial, next((other for other in trials if other.contender.name == name), None), scale
        )
    return row


def of_images(images: Images) -> Row:
    """Return the columns that describe the images."""
    split = images.split
    height, width = (int(np.median(sides)) for sides in (split.height, split.width))
    mean_kb = rounded(float(split.size.mean()) / 1e3)
    return {
        "source": images.source,
        "images": len(split),
        "mean_kb": mean_kb,
        "median_width": width,
        "median_height": height,
    }


def ratio(trial: Trial, other: Trial | None, scale: float) -> float | None:
    """Return the median of the ratio of rates, pair by pair within a round."""
    if other is None or other.first is None:
        return None
    return rounded(
        scale
        * statistics.median(a.rate / b.rate for a, b in zip(trial.later, other.later, strict=True))
    )
