"""Rows of figures with the machine, the versions and the command that made them."""

import csv
import os
import platform
import re
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fastlt.errors import UserError


def machine() -> str:
    """The device that the figures belong to, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{processor()}, {os.cpu_count()} cores"


def processor() -> str:
    """Return the name of the CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def command(program: str) -> str:
    """The command line as somebody else can type it: of absolute paths the last part alone, for the
    rest is this machine's.
    """
    return f"{program} " + shlex.join(map(of_no_machine, sys.argv[1:]))


def of_no_machine(word: str) -> str:
    """Return a word of a command with the last part alone of an absolute path.

    `/data/cifar`, `cifar100:/data/cifar` and `data.pack=/data/cifar` alike;
    addresses such as s3://bucket/pack stay.
    """
    place = re.search(r"(?:^|[:=])(?=/(?!/))", word)
    if place is None:
        return word
    return word[: place.end()] + Path(word[place.end() :]).name


def check_place(path: Path, columns: tuple[str, ...]) -> None:
    """Before minutes are spent: the folder can be made, its files written, and the one there has
    the columns of this benchmark.
    """
    picture = path.with_suffix(".png")
    if picture.is_dir():
        raise UserError(
            f"cannot write to {picture} (it is a folder): name another folder with --out"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8"):
            pass
        header = path.read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    except OSError as error:
        raise UserError(
            f"cannot write to {path} ({error.strerror}): name another folder with --out"
        ) from error
    if not header:
        path.unlink()
    elif not header.startswith(",".join(columns) + ","):
        raise UserError(
            f"{path} has other columns than this benchmark writes: name another folder with --out"
        )


def check_file(path: Path) -> None:
    """The same for one file: it can be written, once there is something to write."""
    is_new = not path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write to {path} ({error.strerror}): name another file with --csv"
        ) from error
    if is_new:
        path.unlink()


def append_rows(path: Path, rows: list[dict[str, Any]], program: str = "fastlt") -> None:
    """Add rows under the header that the file has; a file of other columns is refused."""
    context = {
        "machine": machine(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "command": command(program),
    }
    rows = [{**row, **context} for row in rows]
    fresh = not path.exists()
    if not fresh and path.read_text(encoding="utf-8").splitlines()[0].split(",") != list(rows[0]):
        raise UserError(f"{path} has other columns than this benchmark writes: name another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        if fresh:
            writer.writeheader()
        writer.writerows(rows)
