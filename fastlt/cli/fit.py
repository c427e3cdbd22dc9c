"""`fastlt fit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastlt.cli.app import app, console
from fastlt.cli.tables import print_confusions
from fastlt.cli.with_settings import WithSettings
from fastlt.config import check_settings
from fastlt.errors import UserError
from fastlt.utils.run_files import read_result


@app.command(cls=WithSettings)
def fit(
    images: Annotated[
        Path,
        typer.Argument(help="A folder with a folder of images for each class, or a split file."),
    ],
    out: Annotated[
        Path, typer.Option(metavar="RUN", help="The folder to write; one that was begun goes on.")
    ],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[section.key=value]...", help="Settings in place of choices."),
    ] = None,
    auxiliary: Annotated[
        Path | None, typer.Option(help="Images of auxiliary classes, in the same forms.")
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(metavar="CSV", help="Which auxiliary neighbours which target."),
    ] = None,
    val: Annotated[
        Path | None,
        typer.Option(help="Validation images; by default a fifth of each class is taken out."),
    ] = None,
    test: Annotated[
        Path | None, typer.Option(help="Test images; training never reads them.")
    ] = None,
    groups: Annotated[
        Path | None,
        typer.Option(
            metavar="CSV",
            help="A table with the columns image,group: images of one patient, specimen or "
            "location stay on one side.",
        ),
    ] = None,
    holdout: Annotated[
        float, typer.Option(min=0.01, max=0.9, help="Without --val: the share that is taken out.")
    ] = 0.2,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|NAME",
            help="What the backbone starts from: a file, a RUN, or a name of timm's; by default "
            "what is in the hub's cache, or on the hub.",
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="The architecture, where --weights does not tell it.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(metavar="TIME", help="How long it may take, about: 30m, 2h."),
    ] = None,
    baseline: Annotated[
        bool, typer.Option(help="Train the plain baseline too, to compare with.")
    ] = True,
) -> None:
    """Train a model on a folder of images: packed, split, chosen, compared, ready to predict.

    Called again it goes on where it stopped.
    """
    check_settings("fit", settings or [])
    if val is not None and groups is not None:
        raise UserError("--groups is for taking validation images out: leave it out with --val")
    from fastlt.studies.fit import FitOptions, print_ending, run_fit
    from fastlt.studies.fit_choices import seconds_of

    given = FitOptions(
        images=images,
        out=out,
        auxiliary=auxiliary,
        pairs=pairs,
        val=val,
        test=test,
        groups=groups,
        holdout=holdout,
        weights=weights,
        model=model,
        budget=None if budget is None else seconds_of(budget),
        baseline=baseline,
        settings=tuple(settings or ()),
    )
    if run_fit(given, console):
        print_confusions(read_result(out), out)
        print_ending(out, console)
