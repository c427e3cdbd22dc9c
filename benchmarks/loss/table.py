"""The printed method of `fastlt bench-loss`, and a table per size."""

from __future__ import annotations

import itertools
import math
from textwrap import fill
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.filesize import decimal
from rich.table import Table

from fastlt.utils.results_file import machine
from fastlt_benchmarks.loss.contenders import SILENCE, Size
from fastlt_benchmarks.loss.trials import Bench
from fastlt_benchmarks.timing import CPU_CACHE_BYTES

PHASES = ("forward", "backward", "both")
TABLE_WIDTH = 100

Row = dict[str, Any]


def table(size: Size, rows: list[Row]) -> Table:
    """Return a table that fits TABLE_WIDTH; in less, the percentiles go under the medians."""
    unit, ceiling = (
        ("GB/s", "copy_gb_per_s") if size.width is None else ("TFLOP/s", "product_tflop_per_s")
    )
    floor = (
        ""
        if rows[0]["floor_ms"] is None
        else f"; floor {short(rows[0]['floor_ms'])} ms at {short(rows[0][ceiling])} {unit}"
    )
    title = f"\n{size}, {rows[0]['dtype']}{floor}"
    result = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    result.add_column("times in ms", no_wrap=True)
    for name in (*PHASES, "extra", "% floor"):
        result.add_column(name, justify="right", no_wrap=name == "extra")
    for row, after in itertools.zip_longest(rows, rows[1:]):
        extra = "" if row["extra_bytes"] is None else decimal(row["extra_bytes"])
        if row["both_ms"] is None:
            cells = ["-", "-", "-", extra, "-"]
        else:
            cells = [
                *(spread(row, phase) for phase in PHASES),
                extra,
                short(row["percent_of_floor"]),
            ]
        ends = after is not None and after["silences"] != row["silences"]
        result.add_row(
            row["contender"],
            *cells,
            end_section=ends,
            style="bold" if row["contender"].startswith("ours") else None,
        )
    return result


def spread(row: Row, phase: str) -> str:
    """Return the percentiles of a phase."""
    median, low, high = (short(row[f"{phase}_{figure}"]) for figure in ("ms", "p20_ms", "p80_ms"))
    return f"{median} [dim]{low}–{high}[/]"


def short(value: float) -> str:
    """Return a value with three digits."""
    return f"{value:.{max(0, min(3, 2 - math.floor(math.log10(max(value, 1e-9)))))}f}"


def reasons(rows: list[Row]) -> list[str]:
    """Return why contenders have no figures, a line each."""
    return [f"  {row['contender']}: {row['reason']}" for row in rows if row["reason"]]


def method(bench: Bench) -> str:
    """Return what the tables mean, and who is in them."""
    on_gpu = bench.device.type == "cuda"
    clock = (
        "CUDA events, behind queued work that hides the launches"
        if on_gpu
        else "the system's clock"
    )
    turns = "one contender after the other" if on_gpu else "the contenders in turn"
    beyond = "twice the L2" if on_gpu else f"{CPU_CACHE_BYTES >> 20} MiB"
    threads = torch.get_num_threads()
    where = "" if on_gpu else f", {threads} thread{'s' if threads > 1 else ''}"
    least, most, seconds = bench.pace
    paragraphs = [
        f"{machine()}{where}, torch {torch.__version__}; ceilings of this run: copy "
        f"{short(bench.ceilings.copy / 1e9)} GB/s "
        f"(read + written), large matrix product {short(bench.ceilings.product / 1e12)} TFLOP/s",
        "Times: one pass gives all three. forward: from the inputs to the loss, gradients enabled; "
        "backward: from the loss just "
        "made to the gradients of the logits, or of features and weight; both: from the beginning "
        "to the end. Compare both: ours, "
        "torch-linear and liger do much of the gradient's work in the forward. Median, and 20th to "
        "80th percentile, in ms, of "
        f"at least {least} passes and {seconds:g} s (at most {most} passes); {clock}; {turns}; "
        "inputs rotate through more than "
        f"{beyond}; warmed up, and compiled, before.",
        "extra: the most memory held at once in such a pass beyond the inputs and their gradients, "
        "with what the contender keeps "
        "between passes (class graph, table of neighbours, mask); 0 where the gradient is written "
        "over the logits.",
        "floor: the logits read once and written once at the rate of the copy; or the three "
        "products of the linear loss, 6 N C D "
        "FLOP, at the better rate of the large product and of these shapes. % floor: floor / both; "
        "100 is the floor.",
        "Problem: a sixth of the classes are targets, the others auxiliaries of one or two of "
        "them, at most 8 each; silence "
        f"{SILENCE:g}, the prior of a long tail, labels from all classes, mean. The plain loss has "
        "neither prior nor silencing: "
        "the peers know none. Before, loss and gradients of every contender are held to the "
        "specification in float64 on a small "
        "problem.",
    ]
    who = [
        f"  {c.name:<22} {c.what}{'' if c.silences else ' (plain loss)'}" for c in bench.contenders
    ]
    return "\n\n".join([*(fill(text, 98) for text in paragraphs), "\n".join(who)]) + "\n"
