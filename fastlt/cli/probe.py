"""`fastlt probe`: classifiers of features that stand still."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from fastlt.cli.app import app, console


class ProbedSplit(str, Enum):
    """The splits of a pack that a probe is scored on."""

    val = "val"
    test = "test"


@app.command()
def probe(
    pack: Annotated[str, typer.Argument(metavar="PACK", help="The pack.")],
    backbone: Annotated[str, typer.Option(help="The name of a timm model or a CIFAR ResNet.")],
    weights: Annotated[
        str,
        typer.Option(help="A file, folder or RUN with its weights; by default timm's."),
    ] = "",
    size: Annotated[int, typer.Option(min=0, help="Pixels a side; 0: as the weights have it.")] = 0,
    split: Annotated[ProbedSplit, typer.Option(help="The images to score on.")] = ProbedSplit.val,
    text: Annotated[
        str,
        typer.Option(
            metavar="FILE.npz|open-clip:MODEL/WEIGHTS",
            help="Vectors of the names of classes, for zero-shot prediction.",
        ),
    ] = "",
    template: Annotated[
        list[str] | None,
        typer.Option(
            help="With open-clip: a text of a class, {} being its name; may be repeated, and their "
            "vectors are averaged."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A folder for probe.json, with the figures.")
    ] = None,
    device: Annotated[str, typer.Option(help="A torch device; auto: a GPU if there is one.")] = (
        "auto"
    ),
) -> None:
    """Compare class means, nearest neighbours and linear probes of a backbone's features.

    The backbone is not trained: minutes on a CPU. Features are kept in the pack's folder.
    """
    from fastlt.studies.probe import ProbeOptions, run_probe

    options = ProbeOptions(pack, backbone, weights, size, split.value, text, out, device)
    if template:
        options = options._replace(templates=tuple(template))
    run_probe(options, console)
