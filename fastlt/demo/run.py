"""The whole way on an embedded data set, by exactly the commands that a user types."""

import shlex
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastlt.demo.procedural import write_demo_data
from fastlt.errors import UserError
from fastlt.utils.output import whole_output
from fastlt.utils.run_files import METRICS, RESULT, read_result

MARK = ".fastlt-demo"  # so that only a folder that the demo made is gone on with


def run_demo(out: Path, console: Console) -> None:
    """Make data and packs, train without and with auxiliaries, evaluate and report in `out`.

    It ends with a table. Called again, it goes on where it was stopped, and once all is there it
    prints the table alone. Nothing is removed.

    With auxiliaries an epoch has more images, so beside the two runs of equal epochs stands one
    without auxiliaries that sees as many images as the one with them.
    """
    begin(out)
    data, pack, plain, method, longer = (
        out / name for name in ("images", "pack", "without", "with", "without-longer")
    )
    runs = {"without auxiliaries": plain, "without, longer": longer, "with, silenced": method}
    if all((run / RESULT).is_file() for run in runs.values()):
        console.print(f"{out} holds a demo that has finished: here is its table", highlight=False)
        show(runs, console)
        return
    if not data.exists():
        with console.status("drawing images"), whole_output(data) as folder:
            write_demo_data(folder)
    images = [f"--{name}={data / name}" for name in ("target", "auxiliary", "val")]
    alone = ["data.auxiliary=false", "loss.name=balanced-ce"]
    if not pack.exists():
        call(console, "pack", *images, f"--pairs={data / 'pairs.csv'}", "--out", pack)
    call(console, "train", "demo", "--data", pack, "--out", plain, *alone)
    call(console, "train", "demo", "--data", pack, "--out", method)
    epochs = round(
        read_result(plain)["epochs"] * read_result(method)["images"] / read_result(plain)["images"]
    )
    call(
        console, "train", "demo", "--data", pack, "--out", longer, *alone, f"train.epochs={epochs}"
    )
    for run in (plain, method):
        call(console, "eval", run)
        call(console, "report", run)
    show(runs, console)


def show(runs: dict[str, Path], console: Console) -> None:
    """Print the table of the runs, and where their reports are."""
    console.print(comparison(runs))
    reports = [run / "report.html" for run in runs.values()]
    console.print(
        f"reports: {'  '.join(str(report) for report in reports if report.is_file())}",
        highlight=False,
        soft_wrap=True,
    )


def begin(out: Path) -> None:
    """Make the folder of a demo. Raises UserError where `out` holds something else."""
    if out.is_dir() and any(out.iterdir()) and not (out / MARK).exists():
        raise UserError(
            f"{out} exists and is not from an earlier demo: name another folder with --out"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / MARK).touch()
    except OSError as error:
        raise UserError(
            f"cannot write to {out}: {error.strerror}; name another folder with --out"
        ) from error


def call(console: Console, *arguments: str | Path) -> None:
    """Print and run a command. Raises UserError where it fails."""
    words = [str(argument) for argument in arguments]
    console.print(f"\n[bold]$ fastlt {shlex.join(words)}[/]", highlight=False, soft_wrap=True)
    code = subprocess.run([sys.executable, "-m", "fastlt", *words]).returncode
    if code:
        raise UserError(
            f"the demo stopped, for `fastlt {words[0]}` ended with code {code}: `fastlt demo` goes "
            "on from there, and with another --out begins anew"
        )


def comparison(runs: dict[str, Path]) -> Table:
    """Return a table of the runs' figures."""
    table = Table(
        "",
        "top-1",
        *METRICS[1:],
        "epochs",
        "images",
        "time",
        title="the last epoch of each run, in percent",
    )
    table.columns[0].no_wrap = True
    for name, run in runs.items():
        result = read_result(run)
        figures = ("-" if result[column] is None else f"{result[column]:.1f}" for column in METRICS)
        table.add_row(
            name,
            *figures,
            str(result["epochs"]),
            f"{result['images']:,}",
            f"{result['seconds']:.0f} s",
        )
    return table
