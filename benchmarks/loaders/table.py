"""The printed method and table of `fastlt bench-data`."""

from __future__ import annotations

import itertools
from textwrap import fill
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table

from fastlt.utils.pool import cores
from fastlt.utils.results_file import machine
from fastlt_benchmarks.loaders.trials import Contender, Task

TABLE_WIDTH = 100
COLUMNS = ("first", "images/s", "CPU s/1,000", "x pillow", "x ffcv-stock", "% decoding")

Row = dict[str, Any]


def table(rows: list[Row]) -> Table:
    """Return a table that fits TABLE_WIDTH."""
    first = rows[0]
    title = (
        f"\n{first['images']:,} images to {first['size']} x {first['size']}, batch "
        f"{first['batch']}, workers {first['workers']}"
    )
    result = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    result.add_column("", no_wrap=True)
    for name in COLUMNS:
        result.add_column(name, justify="right", no_wrap=name == "images/s")
    for row, after in itertools.zip_longest(rows, rows[1:]):
        ends = after is not None and after["kind"] == "limit" != row["kind"]
        result.add_row(
            row["contender"],
            *cells(row),
            end_section=ends,
            style="bold" if row["kind"] == "ours" else None,
        )
    return result


def cells(row: Row) -> list[str]:
    """Return the cells of a row."""
    if row["images_per_s"] is None:
        return ["-"] * len(COLUMNS)
    rates = (
        f"{row['images_per_s']:,.0f} "
        f"[dim]{row['images_per_s_min']:,.0f}–{row['images_per_s_max']:,.0f}[/]"
    )
    cpu, pillow, stock = (
        row[name] for name in ("cpu_s_per_1000_images", "ratio_to_pillow", "ratio_to_ffcv_stock")
    )
    share = row["percent_of_decoding"]
    ratios = ["" if value is None else f"{value:.2f}" for value in (cpu, pillow, stock)]
    return [
        f"{row['first_images_per_s']:,.0f}",
        rates,
        *ratios,
        "" if share is None else f"{share:.0f}",
    ]


def reasons(rows: list[Row]) -> list[str]:
    """Return why contenders have no figures, a line each."""
    return [f"  {row['contender']}: {row['reason']}" for row in rows if row["reason"]]


def method(task: Task, rounds: int, contenders: list[Contender]) -> str:
    """Return what the table means, and who is in it."""
    split, on_gpu = task.images.split, task.device.type == "cuda"
    height, width = int(np.median(split.height)), int(np.median(split.width))
    where = (
        "on the CPU, but those of DALI on the GPU, which decodes them" if on_gpu else "on the CPU"
    )
    paragraphs = [
        f"{machine()}; {cores()} cores to use, torch {torch.__version__}; {task.images.what}, "
        f"median {width} x {height} pixels, "
        f"mean {split.size.mean() / 1e3:.0f} KB, the same bytes for all; from the page cache, for "
        "they have just been written.",
        f"Work: a random resized crop (area 0.08 to 1, aspect 3/4 to 4/3) to {task.size} x "
        f"{task.size} and a flip with probability "
        f"1/2, to batches (n, {task.size}, {task.size}, 3) of uint8 {where}; {task.workers} worker "
        "processes or threads each.",
        f"Method: an epoch of each in turn, {rounds + 1} times. first: images/s of the first "
        "epoch, in which libraries are loaded, "
        "workers started and, with FFCV, code compiled. images/s: median, and minimum to maximum, "
        f"of the {rounds} epochs "
        "after it. CPU s/1,000: user and system time of this process and all below it for 1,000 "
        "images, median. Ratios: pair by "
        "pair within a round, their median. All loaders stay alive; those that wait take no time.",
        "% decoding: images/s over those of libjpeg-turbo alone on all cores. A loader "
        "that decodes whole images stays below 100; one that decodes the crop alone, or a smaller "
        "version, need not. All draw crops of their own; those of ours are the same.",
    ]
    who = [f"  {contender.name:<17} {contender.what}" for contender in contenders]
    return "\n\n".join([*(fill(text, 98) for text in paragraphs), "\n".join(who)]) + "\n"
