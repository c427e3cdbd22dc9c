"""The whole way on an embedded data set, by exactly the commands that a user types."""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from fastlt.demo.procedural import write_demo_data
from fastlt.errors import UserError
from fastlt.utils.run_files import METRICS, read_result

MARK = ".fastlt-demo"  # so that only a folder that the demo made is ever replaced


def run_demo(out: Path, console: Console) -> None:
    """Make data and packs, train without and with auxiliaries, evaluate and report in `out`.

    It ends with a table.

    With auxiliaries an epoch has more images, so beside the two runs of equal epochs stands one
    without auxiliaries that sees as many images as the one with them.
    """
    start_anew(out)
    data, pack, plain, method, longer = (
        out / name for name in ("images", "pack", "without", "with", "without-longer")
    )
    with console.status("drawing images"):
        write_demo_data(data)
    images = [f"--{name}={data / name}" for name in ("target", "auxiliary", "val")]
    alone = ["data.auxiliary=false", "loss.name=balanced-ce"]
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
    console.print(
        comparison(
            {"without auxiliaries": plain, "without, longer": longer, "with, silenced": method}
        )
    )
    console.print(f"reports: {plain / 'report.html'}  {method / 'report.html'}", soft_wrap=True)


def start_anew(out: Path) -> None:
    """Remove an earlier demo. Raises UserError where `out` holds something else."""
    if out.is_dir() and any(out.iterdir()) and not (out / MARK).exists():
        raise UserError(
            f"{out} exists and is not from an earlier demo: name another folder with --out"
        )
    shutil.rmtree(out, ignore_errors=True)
    try:
        out.mkdir(parents=True)
    except OSError as error:
        raise UserError(
            f"cannot write to {out}: {error.strerror}; name another folder with --out"
        ) from error
    (out / MARK).touch()


def call(console: Console, *arguments: str | Path) -> None:
    """Print and run a command. Raises UserError where it fails."""
    words = [str(argument) for argument in arguments]
    console.print(f"\n[bold]$ fastlt {shlex.join(words)}[/]", highlight=False, soft_wrap=True)
    code = subprocess.run([sys.executable, "-m", "fastlt", *words]).returncode
    if code:
        raise UserError(f"the demo stopped: `fastlt {words[0]}` ended with code {code}")


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
