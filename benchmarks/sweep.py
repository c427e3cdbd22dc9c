"""The costs of `fastlt sweep`: time over that of its trials, and memory of trials together.

    python -m fastlt_benchmarks.sweep SWEEP.toml PACK --out DIR [--csv FILE] [section.key=value]...

Memory is the proportional set size: of pages that several processes map each has its share.
"""

import csv
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from fastlt.__main__ import speak_to_the_user
from fastlt.errors import UserError
from fastlt.sweep.spec import Sweep, read_sweep
from fastlt.utils.pool import cores
from fastlt.utils.results_file import append_rows, check_file

TRAINER = b"ray::ImplicitFunc"  # what Ray calls the process of a trial
SECONDS_BETWEEN_LOOKS = 2


class Memory(NamedTuple):
    """The memory of the trainers when they took most together, in MiB."""

    trainers: int = 0
    together: int = 0
    own: float = 0.0  # written to by one alone, mean


def main(
    file: Annotated[Path, typer.Argument(metavar="SWEEP.toml", help="As `fastlt sweep` takes it.")],
    pack: Annotated[Path, typer.Argument(metavar="PACK")],
    out: Annotated[Path, typer.Option(help="The folder of the sweep, not there yet.")],
    csv_file: Annotated[
        Path | None, typer.Option("--csv", help="Add the figures to this file.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Argument(help="section.key=value for every trial.")
    ] = None,
) -> None:
    """Run the sweep, and print its time and memory."""
    if csv_file is not None:
        check_file(csv_file)
    if out.exists():
        raise UserError(f"{out} is there already: name another folder with --out")
    sweep = read_sweep(file)
    began = time.monotonic()
    memory = watch(["sweep", str(file), "--data", str(pack), "--out", str(out), *(settings or [])])
    row = make_row(sweep, read_seconds(out), time.monotonic() - began, memory)
    table = Table(*row)
    table.add_row(*map(str, row.values()))
    Console().print(table)
    if csv_file is not None:
        append_rows(csv_file, [row], "python -m fastlt_benchmarks.sweep")


def watch(arguments: list[str]) -> Memory:
    """Run `fastlt` with these arguments, and watch its trainers.

    Raises UserError where it fails.
    """
    process = subprocess.Popen([sys.executable, "-m", "fastlt", *arguments], start_new_session=True)
    most = Memory()
    while process.poll() is None:
        most = max(most, look(process.pid), key=lambda memory: memory.together)
        try:
            process.wait(SECONDS_BETWEEN_LOOKS)
        except subprocess.TimeoutExpired:
            continue
    if process.returncode:
        raise UserError(f"fastlt {arguments[0]} ended with {process.returncode}")
    return most


def look(session: int) -> Memory:
    """Return the memory of a session's trainers now."""
    found = list(trainers(session))
    return Memory(
        len(found), sum(pss for pss, _ in found), sum(own for _, own in found) / max(1, len(found))
    )


def trainers(session: int) -> Iterator[tuple[int, int]]:
    """Yield proportional and own memory of each training process of a session, in MiB."""
    for entry in Path("/proc").iterdir():
        try:
            if not entry.name.isdigit() or os.getsid(int(entry.name)) != session:
                continue
            if not (entry / "cmdline").read_bytes().startswith(TRAINER):
                continue
            lines = (entry / "smaps_rollup").read_text().splitlines()[1:]
        except OSError:  # it has ended meanwhile
            continue
        sizes = {
            name: int(size.split()[0]) // 1024 for name, size in (line.split(":") for line in lines)
        }
        yield sizes["Pss"], sizes["Private_Dirty"]


def read_seconds(out: Path) -> list[float]:
    """Return the seconds of each run once."""
    with (out / "results.csv").open(encoding="utf-8", newline="") as file:
        runs = {row["run"]: row["seconds"] for row in csv.DictReader(file)}
    return [float(seconds) for seconds in runs.values() if seconds]


def make_row(sweep: Sweep, seconds: list[float], wall: float, memory: Memory) -> dict[str, Any]:
    """Return the figures as a row."""
    parallel = min(
        len(seconds), sweep.resources.parallel or len(seconds), int(cores() / sweep.resources.cpus)
    )
    least = sum(seconds) / parallel
    return {
        "trials": len(seconds),
        "parallel": parallel,
        "seconds": round(wall, 1),
        "trials_seconds": round(sum(seconds), 1),
        "ratio": round(wall / least, 3),
        "trainers": memory.trainers,
        "trainers_mib": memory.together,
        "own_mib": round(memory.own),
    }


if __name__ == "__main__":
    speak_to_the_user(lambda: typer.run(main))
