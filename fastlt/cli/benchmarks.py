"""`fastlt bench-loss`, `bench-data` and `bench-train`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from fastlt.cli.app import app, console


class Dtype(str, Enum):
    """The dtypes that are measured."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.command("bench-train")
def bench_train(
    recipe: Annotated[
        str, typer.Argument(help="The recipe whose loop is measured.")
    ] = "cifar100-lt",
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PACK",
            help="A pack, a folder or an address; by default one of random images is made.",
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=5, help="Steps per measurement.")] = 30,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each kind, in turn.")] = 5,
    csv: Annotated[Path | None, typer.Option(help="Add the figures to this file.")] = None,
    adapt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND",
            help="Instead: speed and memory of this kind of model.adapt beside full; may be "
            "repeated.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[section.key=value]...", help="Settings on top of the recipe."),
    ] = None,
) -> None:
    """Compare images/s of the loop with bare forward, backward and step on resident data."""
    if adapt:
        from fastlt_benchmarks.adapt import run_bench_adapt

        run_bench_adapt(recipe, adapt, settings or [], data, steps, rounds, csv, console)
        return
    from fastlt_benchmarks.train import run_bench_train

    run_bench_train(recipe, settings or [], data, steps, rounds, csv, console)


@app.command("bench-loss")
def bench_loss(
    quick: Annotated[
        bool, typer.Option("--quick", help="A first look: two small sizes, nothing compiled.")
    ] = False,
    rows: Annotated[
        list[int] | None, typer.Option(min=1, help="Rows of the batch, N; may be repeated.")
    ] = None,
    classes: Annotated[
        list[int] | None, typer.Option(min=2, help="Classes, C; may be repeated.")
    ] = None,
    width: Annotated[
        list[int] | None, typer.Option(min=1, help="Features, D; may be repeated.")
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="By default bfloat16 on a GPU and float32 on a CPU.")
    ] = None,
    contender: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this one, as the table names it; may be repeated."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep the figures: add them to DIR/loss-<device>.csv, and draw DIR/loss-<device>"
            ".png.",
        ),
    ] = None,
) -> None:
    """Measure time and memory of the losses and their peers, against the floor of the device.

    The picture is of this run, at the smallest N and D.
    """
    from fastlt_benchmarks.loss.run import run_bench_loss

    run_bench_loss(
        quick, rows, classes, width, dtype.value if dtype else None, contender, out, console
    )


@app.command("bench-data")
def bench_data(
    data: Annotated[
        str | None,
        typer.Option(
            metavar="PACK",
            help="Training images of this pack, a folder or an address, at most 10,000.",
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Or images below this folder, as many; by default photos are made."
        ),
    ] = None,
    size: Annotated[
        int, typer.Option(min=1, max=4096, help="Pixels a side of what is made of them.")
    ] = 224,
    batch: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 64,
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes or threads of each; by default one per core."),
    ] = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="Epochs of each after its first, in turn.")
    ] = 3,
    contender: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Only this one, as the table names it; may be repeated."),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A first look: 200 images.")] = False,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune", help="Find the fastest engine and settings for `fastlt train` instead."
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep the figures: add them to DIR/data-<device>.csv, and draw DIR/data-<device>"
            ".png.",
        ),
    ] = None,
) -> None:
    """Measure the loaders and their peers on the same JPEGs, against decoding alone."""
    from fastlt_benchmarks.loaders.run import run_bench_data

    run_bench_data(data, images, size, batch, workers, rounds, contender, quick, tune, out, console)
