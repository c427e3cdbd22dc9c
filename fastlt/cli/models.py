"""`fastlt eval`, `export`, `report` and `compare`: commands on finished runs."""

from __future__ import annotations

import math
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from fastlt.cli.app import Run, app, console
from fastlt.cli.tables import (
    print_blends,
    print_classes,
    print_confusions,
    print_post_hoc,
    print_result,
    print_thresholds,
    write_figures,
)
from fastlt.errors import UserError
from fastlt.utils.run_files import check_has_model

# as fastlt.evaluation.posthoc has them, which imports torch
POST_HOC = (
    "tau-norm",
    "logit-adjustment",
    "cosine",
    "angular",
)


class ScoredSplit(str, Enum):
    """The splits of a pack that `eval` scores."""

    val = "val"
    test = "test"


class Views(str, Enum):
    """Views of an image that test-time ensembling averages over."""

    none = "none"
    flip = "flip"
    crops = "crops"


@app.command("eval")
def evaluate(
    run: Run,
    data: Annotated[
        str | None,
        typer.Option(help="Another pack with the same targets; by default the run's own."),
    ] = None,
    split: Annotated[
        ScoredSplit,
        typer.Option(help="The images to score on; test writes RUN/test.json too."),
    ] = ScoredSplit.val,
    post_hoc: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METHOD",
            help=f"Compare with this made of it without training, {', '.join(POST_HOC)} or all of "
            "these, or with retrain: a new linear head on the features of the training images.",
        ),
    ] = None,
    validation: Annotated[
        str | None,
        typer.Option(
            metavar="PACK", help="A pack on whose validation images the strength is chosen."
        ),
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=0.9,
            help="Without --validation: the share of images it is chosen on, which are not scored; "
            "0.2.",
        ),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(min=0, help="The strength itself, of one method: nothing is chosen."),
    ] = None,
    tta: Annotated[
        Views,
        typer.Option(
            help="Test-time ensembling: average the probabilities of an image and its mirror "
            "image, or of its centre and corners too."
        ),
    ] = Views.none,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all figures to this file.")
    ] = None,
    precision: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=1,
            help="Choose the probability below which `fastlt predict` calls an image unsure, so "
            "that so large a share of the others is right, and store it in RUN.",
        ),
    ] = None,
) -> None:
    """Score a trained model: top-1 over the targets, by group and by class."""
    check_has_model(run)
    from fastlt.evaluation.evaluate import evaluate_post_hoc, evaluate_run

    if tta is not Views.none:
        if post_hoc or precision is not None:
            raise UserError("--tta does not go with --post-hoc or --precision: leave them out")
        from fastlt.evaluation.views import evaluate_views

        result = evaluate_views(run, data, split.value, tta.value)
        print_classes(result, run)
        print_result(result, f"{run}, {tta.value}")
        write_figures(json_file, result)
        return
    if not post_hoc:
        if validation or strength is not None or share is not None:
            raise UserError(
                "--validation, --share and --strength are for --post-hoc: name a method, or leave "
                "them out"
            )
        result = evaluate_run(run, data, split.value, precision)
        print_classes(result, run)
        print_result(result, str(run))
        print_confusions(result, run)
        if precision is not None:
            print_thresholds(result["calibration"])
        write_figures(json_file, result)
        return
    if precision is not None:
        raise UserError("--precision does not go with --post-hoc: leave one of them out")
    if split is ScoredSplit.test:
        raise UserError("--split test does not go with --post-hoc: leave one of them out")
    if strength is not None and validation:
        raise UserError(
            "--strength and --validation exclude each other: the one fixes what the other is for"
        )
    if share is not None and (validation or strength is not None):
        raise UserError(
            "--share is for choosing on the run's own images: leave it out with --validation and "
            "--strength"
        )
    names = ["all"] if "all" in post_hoc else list(dict.fromkeys(post_hoc))
    if strength is not None and (names == ["all"] or len(names) > 1):
        raise UserError(
            "--strength is of one method, as it means something else for each: name one with "
            "--post-hoc"
        )
    if strength is not None and not math.isfinite(strength):
        raise UserError(f"--strength {strength} must be a finite number")
    results = evaluate_post_hoc(
        run, names, data, validation, 0.2 if share is None else share, strength
    )
    print_post_hoc(results, str(run), validation)
    write_figures(json_file, results)


@app.command()
def export(
    run: Run,
    to: Annotated[
        Path,
        typer.Option(
            help="A folder, timm's own where the model is one of timm's, or a file that ends in "
            ".onnx, .pt2 (torch.export) or .safetensors."
        ),
    ],
    force: Annotated[
        bool, typer.Option("--force", help="Replace what is there, once the new one is checked.")
    ] = False,
    half: Annotated[
        bool, typer.Option("--half", help="Weights in float16: half the size.")
    ] = False,
    preprocessing: Annotated[
        bool,
        typer.Option(
            "--preprocessing",
            help="Of .onnx: resizing, cutting and normalising inside; it takes (N, H, W, 3) uint8 "
            "of any size.",
        ),
    ] = False,
    push: Annotated[
        str | None,
        typer.Option(
            metavar="REPO", help="Of a folder: upload it to this repository of the hub as well."
        ),
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="With --push: make the repository private.")
    ] = False,
) -> None:
    """Write the model, targets alone, for others to load; it is read back and compared first."""
    check_has_model(run)
    from fastlt.evaluation.export import ExportOptions, export_run
    from fastlt.evaluation.push import check_push, push_folder

    if private and push is None:
        raise UserError("--private is for --push: name a repository with it")
    if push is not None:
        check_push(to)
    said = export_run(run, to, ExportOptions(force, half, preprocessing))
    console.print(f"{to}: {said}", markup=False, highlight=False, soft_wrap=True)
    if push is not None:
        console.print(push_folder(to, push, private), highlight=False, soft_wrap=True)


@app.command()
def blend(
    run: Run,
    weight: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Of the trained weights; the rest is of the start's."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="The folder to write, used as a RUN.")
    ] = None,
) -> None:
    """Blend a fine-tuned model with the weights that it started from (WiSE-FT).

    Without --weight and --out, the figures of eleven blends on validation images are printed.
    """
    check_has_model(run)
    if (weight is None) != (out is None):
        raise UserError("--weight and --out go together: give both, or neither for a table")
    from fastlt.studies.blend import blend_run, score_blends

    if weight is None or out is None:
        print_blends(score_blends(run), run)
        return
    blend_run(run, weight, out)
    console.print(f"{out}: fastlt eval {out}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def extend(
    run: Run,
    images: Annotated[
        Path,
        typer.Option(help="A folder for each new class, named like it, with a few images."),
    ],
    to: Annotated[Path, typer.Option(help="The model that is written, a .safetensors file.")],
) -> None:
    """Add classes that the run never saw, from a few images each, without training.

    For runs of --method fate.
    """
    check_has_model(run)
    from fastlt.evaluation.extend import extend_run

    names = extend_run(run, images, to)
    console.print(
        f"{to}: {len(names)} classes more, {', '.join(names)}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


@app.command()
def report(
    place: Annotated[
        Path, typer.Argument(metavar="DIR", help="What `fastlt train` or `fastlt sweep` wrote.")
    ],
    axes: Annotated[
        str,
        typer.Option(
            metavar="A,B",
            help="Of a sweep: the two axes of the heat map; by default the strongest.",
        ),
    ] = "",
    baseline: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", help="Of a run: another one of the same classes that stands beside it."
        ),
    ] = None,
) -> None:
    """Write DIR/report.html, of a run or a sweep: one page that needs nothing else."""
    if (place / "sweep.toml").is_file():
        if baseline is not None:
            raise UserError(
                f"--baseline is for runs, and {place} is a sweep: name its baseline in the sweep's "
                "file"
            )
        from fastlt.sweep.report import write_sweep_report

        written = write_sweep_report(place, [axis for axis in axes.split(",") if axis])
    else:
        from fastlt.reports.run import write_report

        if axes:
            raise UserError(f"--axes is for sweeps, and {place} is none")
        written = write_report(place, baseline=baseline)
    console.print(f"report: {written}", soft_wrap=True)


@app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN RUN...", help="Finished runs, the one to beat first."),
    ],
) -> None:
    """Compare runs: figures, the settings in which they differ, and whether that is chance."""
    from fastlt.evaluation.compare import compare as compare_runs

    compare_runs(runs, console)
