"""`fastlt bench-loss`: time and memory of the losses and of their peers over sizes.

They are held against what the device can do.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from difflib import get_close_matches
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TimeElapsedColumn, TimeRemainingColumn

from fastlt.errors import UserError
from fastlt.utils.results_file import append_rows, check_place
from fastlt_benchmarks.loss.contenders import Contender, Size, all_contenders, leaf_shapes
from fastlt_benchmarks.loss.plot import draw
from fastlt_benchmarks.loss.table import PHASES, TABLE_WIDTH, Row, method, reasons, table
from fastlt_benchmarks.loss.trials import Bench, Trial, find_faults, floor_ms, measure
from fastlt_benchmarks.timing import Pace, bounded_memory, measure_ceilings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FAMILIES = ("logits", "linear")
PACKAGES = ("triton", "liger-kernel", "cut-cross-entropy")
COLUMNS = (
    "family",
    "contender",
    "silences",
    "rows",
    "classes",
    "width",
    "dtype",
    *(f"{phase}_{figure}" for phase in PHASES for figure in ("ms", "p20_ms", "p80_ms")),
    "repetitions",
    "extra_bytes",
    "gradient_bytes",
    "loss",
    "floor_ms",
    "percent_of_floor",
    "copy_gb_per_s",
    "product_tflop_per_s",
    "threads",
    *(package.replace("-", "_") for package in PACKAGES),
    "reason",
)


class Grid(NamedTuple):
    """The sizes that are measured."""

    rows: list[int]
    classes: list[int]
    widths: list[int]

    def sizes(self, families: set[str]) -> list[Size]:
        """Return all sizes. Logits have no width, so they are measured once for all of them."""
        widths: dict[str, Sequence[int | None]] = {"logits": [None], "linear": self.widths}
        wanted = [family for family in FAMILIES if family in families]
        return [
            Size(family, n, c, d)
            for n, c in itertools.product(self.rows, self.classes)
            for family in wanted
            for d in widths[family]
        ]


QUICK_GRID = Grid([256], [1_000, 10_000], [128])
CPU_GRID = Grid([1024], [1_000, 10_000, 100_000], [768])
GPU_GRID = Grid([1024, 4096, 16_384], [1_000, 10_000, 100_000, 1_000_000], [768, 2048])


def run_bench_loss(
    quick: bool,
    rows: list[int] | None,
    classes: list[int] | None,
    widths: list[int] | None,
    dtype: str | None,
    names: list[str] | None,
    out: Path | None,
    console: Console,
) -> None:
    """Print a table for each size.

    With `out` it is added to OUT/loss-<device>.csv, and OUT/loss-<device>.png is drawn of this run
    at the end; without, nothing is written.
    """
    if not console.is_terminal:
        # a file has no width, and would be taken for a screen of 80
        console.width = max(console.width, TABLE_WIDTH)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    contenders = choose(all_contenders(device), names or [], quick)
    kind = DTYPES[dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    default = QUICK_GRID if quick else GPU_GRID if device.type == "cuda" else CPU_GRID
    grid = Grid(
        *(
            sorted(set(given or usual))
            for given, usual in zip((rows, classes, widths), default, strict=True)
        )
    )
    path = None if out is None else out / f"loss-{device_slug(device)}.csv"
    if path is not None:
        check_place(path, COLUMNS)
    with bounded_memory(device):
        with console.status("measuring the ceilings"):
            ceilings = measure_ceilings(kind, device, quick)
        bench = Bench(contenders, kind, device, pace_on(device, quick), ceilings)
        console.print(method(bench), highlight=False, markup=False)
        kept = run_grid(bench, grid, path, console)
    if path is not None:
        draw(kept, path.with_suffix(".png"))
    console.print(where_kept(path), highlight=False)


def where_kept(path: Path | None) -> str:
    """Return where the figures are, or how to keep them."""
    if path is None:
        return "nothing was written: --out DIR keeps the figures, with a picture"
    return f"added to {path}, drawn in {path.with_suffix('.png')}"


def choose(contenders: list[Contender], names: list[str], quick: bool) -> list[Contender]:
    """Return the named contenders; without names all, but in a quick run none to be compiled."""
    known = [contender.name for contender in contenders]
    for name in names:
        if name not in known:
            close = get_close_matches(name, known, 1)
            hint = (
                f"did you mean '{close[0]}'?" if close else f"it must be one of {', '.join(known)}"
            )
            raise UserError(f"--contender: there is no '{name}': {hint}")
    if names:
        return [contender for contender in contenders if contender.name in names]
    return [contender for contender in contenders if not (quick and contender.is_compiled)]


def pace_on(device: torch.device, quick: bool) -> Pace:
    """Return how often a pass is repeated on a device."""
    if device.type == "cuda":
        return Pace(least=10, most=300, seconds=0.1 if quick else 0.3)
    return Pace(least=10, most=50, seconds=0.1) if quick else Pace(least=5, most=100, seconds=2)


def device_slug(device: torch.device) -> str:
    """Return cpu, h100, h200, or the device's name in small letters and hyphens."""
    if device.type == "cpu":
        return "cpu"
    name = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return next((short for short in ("h100", "h200") if short in name.split("-")), name)


def run_grid(bench: Bench, grid: Grid, path: Path | None, console: Console) -> list[Row]:
    """Return the rows of this run; those of a size are in the file as soon as it is done."""
    kept: list[Row] = []
    sizes = grid.sizes({contender.family for contender in bench.contenders})
    with progress_bar(console) as progress:
        task = progress.add_task("", total=sum(map(cost, sizes)), place="")
        find_faults(bench, lambda name: progress.update(task, description=f"checking {name}"))
        for number, size in enumerate(sizes, start=1):
            minutes = (progress.tasks[0].elapsed or 0) / 60
            rate = f" ({len(kept) / minutes:.0f} contenders/min)" if kept else ""
            progress.update(task, place=f"size {number} of {len(sizes)}{rate}")
            trials, ceiling = measure(bench, size, partial(report, progress, task, size))
            rows = [make_row(bench, size, trial, ceiling) for trial in trials]
            if path is not None:
                append_rows(path, rows)
            kept += rows
            progress.console.print(table(size, rows))
            for line in reasons(rows):
                progress.console.print(line, style="dim", highlight=False, markup=False)
    return kept


def progress_bar(console: Console) -> Progress:
    """Return the bar of a benchmark."""
    columns = (
        "{task.description}",
        BarColumn(10),
        "{task.percentage:.0f}% {task.fields[place]}",
        TimeElapsedColumn(),
        "left",
    )
    return Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, refresh_per_second=2
    )


def report(progress: Progress, task: TaskID, size: Size, text: str, share: float) -> None:
    """Move the bar on."""
    progress.update(task, description=f"{size}: {text}", advance=cost(size) * share)


def cost(size: Size) -> float:
    """Return roughly how long a size takes: a fixed part, and the work."""
    return 2e9 + size.rows * size.classes * (size.width or 50)


# ---- what is kept and shown


def make_row(bench: Bench, size: Size, trial: Trial, ceiling: float | None) -> Row:
    """Return the columns of the file; empty where nothing was measured."""
    row: Row = dict.fromkeys(COLUMNS)
    row |= {
        "family": size.family,
        "contender": trial.contender.name,
        "silences": trial.contender.silences,
        "rows": size.rows,
    }
    row |= {
        "classes": size.classes,
        "width": size.width,
        "dtype": str(bench.dtype).removeprefix("torch."),
    }
    row |= {
        "threads": torch.get_num_threads(),
        "reason": trial.reason,
        "extra_bytes": trial.extra_bytes,
        "loss": trial.loss,
    }
    row |= {package.replace("-", "_"): installed(package) for package in PACKAGES}
    row["gradient_bytes"] = sum(n * m for n, m in leaf_shapes(size)) * bench.dtype.itemsize
    if ceiling is not None:
        row["floor_ms"] = rounded(floor_ms(size, bench.dtype, ceiling))
        name, unit = ("copy_gb_per_s", 1e9) if size.width is None else ("product_tflop_per_s", 1e12)
        row[name] = rounded(ceiling / unit)
    if trial.passes:
        row["repetitions"] = len(trial.passes)
        for phase in PHASES:
            low, middle, high = np.percentile(
                [getattr(p, phase) for p in trial.passes], [20, 50, 80]
            )
            row |= {
                f"{phase}_ms": rounded(middle),
                f"{phase}_p20_ms": rounded(low),
                f"{phase}_p80_ms": rounded(high),
            }
        row["percent_of_floor"] = rounded(100 * row["floor_ms"] / row["both_ms"])
    return row


def rounded(value: float) -> float:
    """Return a value with five digits."""
    return float(f"{value:.5g}")


def installed(package: str) -> str:
    """Return the version of a package, empty where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
