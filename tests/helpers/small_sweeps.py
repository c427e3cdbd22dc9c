"""Small sweeps, and looking at what they have done."""

import csv
import os
import time
from pathlib import Path

SETTINGS = (
    'recipe = "demo"\n[settings]\ntrain.epochs = {epochs}\ndata.batch = 8\ndata.size = '
    "16\ndata.workers = 0\n"
)
PATIENCE = 180  # seconds for what takes a few


def write(folder, axes, epochs=1, more=""):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "s.toml").write_text(SETTINGS.format(epochs=epochs) + f"[axes]\n{axes}\n{more}")
    return folder / "s.toml"


def table(out):
    with (out / "results.csv").open() as file:
        return list(csv.DictReader(file))


def epochs_of(run: Path) -> int:
    try:
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def until(is_so, process=None):
    end = time.monotonic() + PATIENCE
    while not is_so():
        assert time.monotonic() < end, "it took too long"
        assert process is None or process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.05)


def session_of(leader: int) -> list[int]:
    """The processes of its session."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.getsid(int(entry.name)) == leader:
                found.append(int(entry.name))
        except ProcessLookupError:
            continue
    return found


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
