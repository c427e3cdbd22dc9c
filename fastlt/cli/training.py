"""`fastlt train`, `demo`, `reproduce` and `sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from fastlt.cli.app import PackPath, app, console, pack_place, reporting_stops
from fastlt.cli.tables import (
    print_result,
)
from fastlt.cli.with_settings import WithSettings
from fastlt.config import as_override, check_settings, load_config, recipe_names
from fastlt.errors import UserError
from fastlt.methods import method_settings


@app.command(cls=WithSettings)
def train(
    recipe: Annotated[
        str, typer.Argument(help=f"A recipe ({', '.join(recipe_names())}) or a .toml file.")
    ],
    data: PackPath,
    out: Annotated[
        Path | None, typer.Option(help="The RUN folder; a run that stopped there goes on.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[section.key=value]...", help="Settings on top of the recipe."),
    ] = None,
    exact_decode: Annotated[
        bool,
        typer.Option(
            "--exact-decode", help="Decode whole images, as Pillow does: data.decode=exact."
        ),
    ] = False,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Stop at an image that cannot be decoded, instead of taking another: "
            "data.strict=true.",
        ),
    ] = False,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="A method, whose settings come below your own; `fastlt methods` lists them.",
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            metavar="RUN",
            help="A finished run whose model this one begins with; second stages need one.",
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print the memory, steps and hours it would take, from a few steps; train "
            "nothing.",
        ),
    ] = False,
    nproc: Annotated[
        int,
        typer.Option(
            min=0,
            help="Processes on this machine, one for each GPU; 0: this one alone, or those of "
            "torchrun.",
        ),
    ] = 0,
    restarts: Annotated[
        int,
        typer.Option(min=0, help="With --nproc: how often all are started again where one dies."),
    ] = 3,
) -> None:
    """Train a classifier on a PACK. Killed at any moment and called again, it goes on.

    On several machines: torchrun --nnodes ... --nproc-per-node ... --max-restarts 3 -m fastlt train
    ...
    """
    if exact_decode and any(setting.startswith("data.decode=") for setting in settings or []):
        raise UserError("--exact-decode and data.decode contradict each other: leave one out")
    flags = [
        *(["data.decode=exact"] if exact_decode else []),
        *(["data.strict=true"] if strict else []),
    ]
    begin = method_settings(method, str(Path(start).resolve()) if start else None)
    chosen = [*(settings or []), *flags, as_override("data.pack", pack_place(data))]
    check_settings(recipe, chosen)
    check_places(data, out, dry_run)
    config = load_config(recipe, chosen, begin)
    from fastlt.reports.run import write_report
    from fastlt.training.distributed import is_first, launch
    from fastlt.training.loop import asks_for_silencing
    from fastlt.training.loop import train as train_run
    from fastlt.utils.signals import Stopped

    asked = asks_for_silencing(settings or [])
    if dry_run:
        from fastlt.training.dry_run import dry_run as report_costs

        report_costs(config, max(1, nproc), console, asked)
        return
    assert out is not None  # as check_places has seen
    if nproc:
        shown = [
            f"--{name.replace('_', '-')}"
            for name, given in (("exact_decode", exact_decode), ("strict", strict))
            if given
        ]
        shown += [
            part
            for name, value in (("--method", method), ("--start", start))
            if value
            for part in (name, value)
        ]
        launch(
            ["train", recipe, "--data", data, "--out", str(out), *shown, *(settings or [])],
            nproc,
            restarts,
        )
        return
    try:
        result = train_run(config, out, console, silencing_asked=asked)
    except Stopped as stopped:
        if is_first():
            console.print(str(stopped))
        return
    if not is_first():
        return
    print_result(result, str(out))
    console.print(f"report: {write_report(out)}")


def check_places(data: str, out: Path | None, dry_run: bool) -> None:
    """Raise UserError where there is no pack, or what is at the place of the run is none."""
    from fastlt.packing.reader import read_manifest
    from fastlt.packing.remote import is_remote
    from fastlt.utils.run_files import check_out

    if not is_remote(data):
        read_manifest(Path(pack_place(data)))
    if dry_run:
        return
    if out is None:
        raise UserError("no place for the run: name a folder with --out RUN")
    check_out(out)


@app.command()
def methods() -> None:
    """List the methods for `fastlt train --method NAME`, each with its paper."""
    from fastlt.methods import listed_methods

    table = Table("method", "kind", "what it does", "paper", box=SIMPLE_HEAD, pad_edge=False)
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    for method in listed_methods():
        table.add_row(*method)
    console.print(table)
    console.print(
        "a second stage begins with another run: --start RUN; numbers of a method: method.KEY=VALUE"
    )


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The folder for data, packs and runs.")] = Path("demo"),
) -> None:
    """Run the whole way on an embedded data set: pack, train without and with auxiliaries."""
    from fastlt.demo.run import run_demo

    run_demo(out, console)


@app.command(cls=WithSettings)
def reproduce(
    task: Annotated[
        str,
        typer.Argument(
            help="cifar100-lt: published methods. cifar100-siblings, cifar100-deep, grocery: do "
            "auxiliaries help, and which? methods: the related systems under one protocol. "
            "methods-siblings: the same on top of silenced neighbours. finetune: how much of a "
            "pretrained backbone to train."
        ),
    ],
    data: Annotated[
        str,
        typer.Option(
            metavar="cifar100:DIR|grocery:DIR",
            help="As `fastlt pack` takes it; grocery:DIR for grocery and finetune.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="The folder for packs and runs; what has finished there is not run again."
        ),
    ],
    epochs: Annotated[
        int,
        typer.Option(
            min=0, help="Fewer than the protocol's, with a schedule drawn together; 0: its own."
        ),
    ] = 0,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 1,
    first_seed: Annotated[
        int, typer.Option(min=0, help="The seed of the first run of each; others follow.")
    ] = 0,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="For finetune and the studies of auxiliaries: the rows to run, such as "
            "'lora | *'; may be repeated.",
        ),
    ] = None,
    parallel: Annotated[
        int, typer.Option(min=1, help="Runs at a time; the cores are shared among them.")
    ] = 1,
    csv: Annotated[
        Path | None, typer.Option(help="Add the figures of every run to this file.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[section.key=value]...", help="Settings on top of every run."),
    ] = None,
) -> None:
    """Compare published figures with ours, under their own protocol."""
    from fastlt.studies.reproduce import ReproduceOptions, run_reproduce

    options = ReproduceOptions(
        data, out, epochs, seeds, parallel, settings or [], first_seed, tuple(only or ())
    )
    run_reproduce(task, options, csv, console)


@app.command(cls=WithSettings)
def sweep(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="SWEEP.toml", help="The axes, and how trials are chosen and placed."
        ),
    ],
    data: PackPath,
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="The folder of the sweep: a RUN of each trial, and results.csv."
        ),
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[section.key=value]...", help="Settings of every trial, on top of the file's."
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="A Ray cluster, or auto; DIR and PACK must be seen from all its machines.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with a sweep: what has finished is not run again, what failed is tried "
            "again.",
        ),
    ] = False,
) -> None:
    """Train along axes such as neighbours, silence, images and seed, several trials at a time."""
    from fastlt.sweep.report import write_sweep_report
    from fastlt.sweep.run import run_sweep

    with reporting_stops():
        run_sweep(file, pack_place(data), out, settings or [], address, resume, console)
    console.print(f"report: {write_sweep_report(out)}", soft_wrap=True)
