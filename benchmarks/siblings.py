"""CIFAR-100 siblings: do auxiliary classes help, which ones, and does silencing? Six controls, several seeds.

Epochs are equal, but for one control that sees as many images without auxiliaries as the others do with them.

    python -m fastlt_benchmarks.siblings CIFAR_DIR --out runs/siblings

Every run is the user's own command, `fastlt train cifar100-siblings ...`; one that stopped goes on when this is called again.
"""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fastlt.__main__ import speak_to_the_user
from fastlt.errors import UserError
from fastlt_benchmarks.results_file import append_rows

CONTROLS: dict[str, tuple[str, list[str]]] = {  # name -> auxiliary set of the pack, settings
    "no auxiliaries": ("none", ["loss.name=balanced-ce"]),
    "no auxiliaries, as many images": ("none", ["loss.name=balanced-ce", "train.epochs=66"]),  # 40 * 3,795 / 2,295
    "random auxiliaries": ("random", []),
    "neighbours, unsilenced (1)": ("siblings", ["loss.silence=1"]),
    "neighbours, silenced (0.1)": ("siblings", ["loss.silence=0.1"]),
    "neighbours, hard mask (0)": ("siblings", ["loss.silence=0"]),
}
GROUPS = ("top1", "many", "medium", "few")


def main(
    cifar: Annotated[Path, typer.Argument(help="CIFAR-100, as `fastlt pack cifar100:DIR` takes it.")],
    out: Annotated[Path, typer.Option(help="The folder for packs and runs.")] = Path("runs/siblings"),
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each control.")] = 3,
    parallel: Annotated[int, typer.Option(min=1, help="Runs at a time; the cores are shared among them.")] = 2,
    csv: Annotated[Path | None, typer.Option(help="Add the figures of every run to this file.")] = None,
    settings: Annotated[list[str] | None, typer.Argument(help="section.key=value for every run.")] = None,
) -> None:
    """Prints mean and standard deviation over the seeds for every control."""
    console = Console()
    packs = {kind: pack(cifar, kind, out) for kind in dict.fromkeys(kind for kind, _ in CONTROLS.values())}
    jobs = [(name, seed) for seed in range(seeds) for name in CONTROLS]
    threads = str(max(1, (os.cpu_count() or 1) // parallel))

    def run(job: tuple[str, int]) -> dict[str, Any]:
        name, seed = job
        kind, extra = CONTROLS[name]
        return {
            "control": name,
            "seed": seed,
            **train(packs[kind], out / folder_name(name, seed), [*extra, *(settings or [])], seed, threads),
        }

    with ThreadPoolExecutor(parallel) as pool:
        rows = list(track(pool.map(run, jobs), "training", total=len(jobs), console=console))
    console.print(table(rows))
    if csv is not None:
        append_rows(csv, rows, "python -m fastlt_benchmarks.siblings")


def folder_name(control: str, seed: int) -> str:
    return "".join(c if c.isalnum() or c == "." else "-" for c in control).strip("-").replace("--", "-") + f"-seed{seed}"


def pack(cifar: Path, kind: str, out: Path) -> Path:
    path = out / f"pack-{kind}"
    if not path.is_dir():
        fastlt("pack", f"cifar100:{cifar}", "--task", "cifar100-siblings", "--auxiliary", kind, "--out", str(path))
    return path


def train(pack: Path, run: Path, settings: list[str], seed: int, threads: str) -> dict[str, Any]:
    options = ["--data", str(pack), "--out", str(run), f"train.seed={seed}", *settings]
    fastlt("train", "cifar100-siblings", *options, threads=threads)
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    figures = {name: result[name] for name in (*GROUPS, "balanced_accuracy", "harmonic_mean", "ece")}
    figures |= {"epochs": result["epochs"], "images": result["images"]}
    return {**figures, "best_top1": result["best"]["top1"], "seconds": round(result["seconds"], 1), "settings": " ".join(settings)}


def fastlt(*arguments: str, threads: str = "0") -> None:
    environment = {**os.environ, **({"OMP_NUM_THREADS": threads} if threads != "0" else {})}
    ended = subprocess.run([sys.executable, "-m", "fastlt", *arguments], capture_output=True, text=True, env=environment)
    if ended.returncode:
        raise UserError(f"`fastlt {' '.join(arguments)}` ended with code {ended.returncode}: {ended.stderr.strip()[-500:]}")


def table(rows: list[dict[str, Any]]) -> Table:
    result = Table("", "all", *GROUPS[1:], title="accuracy of the last epoch in percent, mean ± standard deviation over seeds")
    for name in CONTROLS:
        runs = [row for row in rows if row["control"] == name]
        result.add_row(name, *(spread([row[group] for row in runs]) for group in GROUPS))
    return result


def spread(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return f"{statistics.mean(known):.1f} ± {statistics.stdev(known) if len(known) > 1 else 0:.1f}"


if __name__ == "__main__":
    speak_to_the_user(lambda: typer.run(main))
