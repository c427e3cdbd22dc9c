"""`fastlt predict`: a trained model on images of the user's own."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from fastlt.cli.app import app


class Augmentation(str, Enum):
    """What is averaged at test time."""

    none = "none"
    flip = "flip"
    crops = "crops"


@app.command()
def predict(
    model: Annotated[
        Path, typer.Argument(help="A RUN, or what `fastlt export` wrote: a folder or .safetensors.")
    ],
    images: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGES...",
            help="Files, folders, patterns such as 'shots/**/*.jpg', or - for a list of paths, one "
            "a line.",
        ),
    ],
    top: Annotated[int, typer.Option(min=1, help="Classes that are named of each image.")] = 1,
    csv: Annotated[
        Path | None,
        typer.Option(help="Write a table to this file: image, prediction, classes, probabilities."),
    ] = None,
    jsonl: Annotated[
        Path | None, typer.Option(help="Write a line of JSON an image to this file.")
    ] = None,
    sheet: Annotated[
        Path | None,
        typer.Option(metavar="OUT.html", help="Write a page that shows images and predictions."),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            min=0,
            max=1,
            help="The probability below which an image is `unsure`; by default what `fastlt eval "
            "--precision` has stored, if anything.",
        ),
    ] = None,
    by_class_threshold: Annotated[
        bool,
        typer.Option("--by-class-threshold", help="Take the stored threshold of each class."),
    ] = False,
    prior: Annotated[
        Path | None,
        typer.Option(
            metavar="CSV",
            help="How frequent classes are where the model is used: a table with the columns "
            "class and share, of shares or counts.",
        ),
    ] = None,
    tta: Annotated[
        Augmentation,
        typer.Option(
            help="Test-time augmentation: flip averages the image and its mirror image, crops ten "
            "cuts of it."
        ),
    ] = Augmentation.none,
    range: Annotated[
        str | None,
        typer.Option(
            metavar="full|LOW,HIGH",
            help="Of images of more than 8 bits: which values become black and white; by default "
            "as in the pack that the model was trained on.",
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 256,
    device: Annotated[str, typer.Option(help="A torch device; auto: a GPU if there is one.")] = (
        "auto"
    ),
) -> None:
    """Name the classes of images, with calibrated probabilities.

    Without --csv, --jsonl or --sheet a line is printed for each image. Images that cannot be read
    are listed and left out.
    """
    from fastlt.evaluation.predict import load_model
    from fastlt.evaluation.predict_command import PredictOptions, predict_images, read_prior

    loaded = load_model(model, device, range)
    shares = None if prior is None else read_prior(prior)
    answers = loaded.answers(top, threshold, by_class_threshold, tta.value, shares)
    predict_images(loaded, images, PredictOptions(answers, batch, csv, jsonl, sheet))
