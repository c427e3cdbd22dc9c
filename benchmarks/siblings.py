"""CIFAR-100 siblings: do auxiliary classes help, which ones, and does silencing? Six controls, several seeds.

Epochs are equal, but for one control that sees as many images without auxiliaries as the others do with them.

    python -m fastlt_benchmarks.siblings CIFAR_DIR --out runs/siblings

Every run is the user's own command, `fastlt train cifar100-siblings ...`; one that stopped goes on when this is called again.
"""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from fastlt.__main__ import speak_to_the_user
from fastlt_benchmarks.repeated import Control, fastlt, table, train_all
from fastlt_benchmarks.results_file import append_rows

CONTROLS: dict[str, tuple[str, list[str]]] = {  # name -> auxiliary set of the pack, settings
    "no auxiliaries": ("none", ["loss.name=balanced-ce"]),
    "no auxiliaries, as many images": ("none", ["loss.name=balanced-ce", "train.epochs=66"]),  # 40 * 3,795 / 2,295
    "random auxiliaries": ("random", []),
    "neighbours, unsilenced (1)": ("siblings", ["loss.silence=1"]),
    "neighbours, silenced (0.1)": ("siblings", ["loss.silence=0.1"]),
    "neighbours, hard mask (0)": ("siblings", ["loss.silence=0"]),
}


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
    controls = {name: Control(packs[kind], [*extra, *(settings or [])]) for name, (kind, extra) in CONTROLS.items()}
    rows = train_all("cifar100-siblings", controls, out, seeds, parallel, console)
    console.print(table(rows))
    if csv is not None:
        append_rows(csv, rows, "python -m fastlt_benchmarks.siblings")


def pack(cifar: Path, kind: str, out: Path) -> Path:
    path = out / f"pack-{kind}"
    if not path.is_dir():
        fastlt("pack", f"cifar100:{cifar}", "--task", "cifar100-siblings", "--auxiliary", kind, "--out", str(path))
    return path


if __name__ == "__main__":
    speak_to_the_user(lambda: typer.run(main))
