"""`fastlt granularity score`, `train` and `related`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastlt.cli.app import console, granularity, pack_place

HIERARCHY = "a CSV with the columns class,parent, cifar100:DIR, wordnet:FOLDER or wn:LEXICON"


@granularity.command("score")
def granularity_score(
    data: Annotated[
        str, typer.Argument(metavar="PACK", help="The pack whose training images are looked at.")
    ],
    weights: Annotated[
        str, typer.Option(help="A RUN whose backbone makes the features, or a file for --backbone.")
    ] = "",
    backbone: Annotated[
        str, typer.Option(help="Any timm model; by default that of `fastlt curate filter`.")
    ] = "",
    hierarchy: Annotated[
        str,
        typer.Option(
            help=f"What the targets belong to, scored beside them: {HIERARCHY}.", show_default=False
        ),
    ] = "",
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="Figures, and all pairs of nearest targets."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 128,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
) -> None:
    """Score how fine the classes of a pack are; nothing is trained.

    It names the nearest targets, and which auxiliary lies between.
    """
    from fastlt.evaluation.feature_settings import FeatureSettings
    from fastlt.studies.granularity import run_granularity

    chosen = {
        "weights": weights,
        "batch": batch,
        "device": device,
        **({"backbone": backbone} if backbone else {}),
    }
    settings = FeatureSettings.model_validate(chosen)
    run_granularity(pack_place(data), settings, hierarchy, out, console)


Study = Annotated[
    str,
    typer.Argument(
        metavar="PACK",
        help="A pack whose classes have many images each, such as all of CIFAR-100.",
    ),
]
Hierarchy = Annotated[str, typer.Option(help=f"What the classes belong to: {HIERARCHY}.")]
StudyFolder = Annotated[
    Path,
    typer.Option(metavar="DIR", help="Packs and runs; what has finished there is not run again."),
]
Draws = Annotated[int, typer.Option(min=1, help="Of classes, images and trainings.")]
Parallel = Annotated[
    int, typer.Option(min=1, help="Runs at a time; the cores are shared among them.")
]
Imbalance = Annotated[float, typer.Option(min=1, help="Most over fewest images of a class.")]
ResultsFile = Annotated[
    Path | None, typer.Option("--csv", help="Add the figures of every run to this file.")
]
Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="[section.key=value]...", help="Settings of every run."),
]


@granularity.command("train")
def granularity_train(
    data: Study,
    hierarchy: Hierarchy,
    out: StudyFolder,
    draws: Draws = 3,
    parallel: Parallel = 1,
    imbalance: Imbalance = 100,
    two_stage: Annotated[
        bool,
        typer.Option("--two-stage", help="Judge the backbones by a classifier trained again, too."),
    ] = False,
    csv: ResultsFile = None,
    settings: Settings = None,
) -> None:
    """Train on balanced and long-tailed sets at several granularities.

    Does a long tail hurt less where classes are finer?
    """
    from fastlt.studies.granularity_training import StudyOptions, run_granularity_study

    options = StudyOptions(
        pack_place(data), hierarchy, out, draws, parallel, imbalance, settings or [], two_stage
    )
    run_granularity_study(options, csv, console)


@granularity.command("related")
def granularity_related(
    data: Study,
    hierarchy: Hierarchy,
    out: StudyFolder,
    draws: Draws = 3,
    parallel: Parallel = 1,
    imbalance: Imbalance = 100,
    csv: ResultsFile = None,
    settings: Settings = None,
) -> None:
    """Train a long tail beside related classes, unrelated ones, half of either, and alone.

    Which classes help a long tail, end to end and by a classifier trained again?
    """
    from fastlt.studies.companions import run_related_study
    from fastlt.studies.granularity_training import StudyOptions

    options = StudyOptions(
        pack_place(data), hierarchy, out, draws, parallel, imbalance, settings or [], True
    )
    run_related_study(options, csv, console)
