"""The commands.

Each parses, calls one function, and prints; what it calls is imported then, so that help comes at
once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastlt.config import as_override, load_config, recipe_names
from fastlt.errors import UserError, extra
from fastlt.methods.presets import ONE_STAGE, SECOND_STAGE, method_settings

if TYPE_CHECKING:
    from fastlt.packing.sources import Collection

HIERARCHY = "a CSV with the columns class,parent, cifar100:DIR, wordnet:FOLDER or wn:LEXICON"
# as fastlt.evaluation.posthoc has them, which imports torch
POST_HOC = (
    "tau-norm",
    "logit-adjustment",
    "cosine",
    "angular",
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Long-tailed image classification with auxiliary classes and neighbour silencing.",
)
curate = typer.Typer(no_args_is_help=True, help="From the names of targets to auxiliary classes.")
app.add_typer(curate, name="curate")
granularity = typer.Typer(
    no_args_is_help=True,
    help="How fine the classes of a pack are, and what that does to a long tail.",
)
app.add_typer(granularity, name="granularity")
console = Console()

PackPath = Annotated[
    str,
    typer.Option(
        "--data", help="What `fastlt pack` wrote: a folder, or an address such as s3://bucket/pack."
    ),
]
RESULT_COLUMNS = {
    "top-1": "top1",
    "many": "many",
    "medium": "medium",
    "few": "few",
    "balanced": "balanced_accuracy",
    "harmonic": "harmonic_mean",
    "ECE": "ece",
}
Curation = Annotated[
    Path, typer.Option(help="The folder of the curation, which each step adds to.")
]
TargetPack = Annotated[str, typer.Argument(metavar="PACK", help="The pack of the targets.")]
Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="[section.key=value]...", help="Of propose, retrieve and filter."),
]
SettingsFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="A .toml file of settings; by default what the last step kept, config.toml.",
    ),
]
AllowPrivate = Annotated[
    bool,
    typer.Option(
        "--allow-private",
        help="Fetch from this machine and private networks too: retrieve.allow_private=true.",
    ),
]
Run = Annotated[Path, typer.Argument(help="The folder that `fastlt train` wrote.")]


class Task(str, Enum):
    lt = "cifar100-lt"
    siblings = "cifar100-siblings"


class Control(str, Enum):
    random = "random"


class Dtype(str, Enum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.command()
def pack(
    source: Annotated[
        str | None, typer.Argument(help="cifar100:DIR, or nothing where --target names the data.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder to write; it must not exist yet.")
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option(
            help="Target training images: class folders, a split file, a folder of shards, or a "
            "pack."
        ),
    ] = None,
    auxiliary: Annotated[
        str | None,
        typer.Option(
            help="Auxiliary images, in the same forms; for cifar100: siblings, random or none."
        ),
    ] = None,
    val: Annotated[
        Path | None, typer.Option(help="Validation images of the targets, in the same forms.")
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(
            help="CSV with the columns target,auxiliary: which auxiliary neighbours which target."
        ),
    ] = None,
    root: Annotated[
        Path | None, typer.Option(help="The folder that the paths of split files start from.")
    ] = None,
    class_names: Annotated[
        Path | None,
        typer.Option(help="For split files: a class name per line, in the order of the labels."),
    ] = None,
    task: Annotated[
        Task | None, typer.Option(help="For cifar100: which long-tailed task to cut out of it.")
    ] = None,
    imbalance: Annotated[
        float,
        typer.Option(
            min=1, help="For cifar100: images of the most frequent class over those of the rarest."
        ),
    ] = 100,
    max_side: Annotated[
        int,
        typer.Option(
            min=0, help="Shrink larger images to this many pixels a side and store JPEG; 0: do not."
        ),
    ] = 0,
    quality: Annotated[
        int,
        typer.Option(
            min=0, max=100, help="Store all images as JPEG of this quality; 0: as they are."
        ),
    ] = 0,
    transcode: Annotated[
        bool,
        typer.Option(
            "--transcode",
            help="Rewrite JPEGs, losslessly, so that crops of them are decoded faster.",
        ),
    ] = False,
    beton: Annotated[bool, typer.Option("--beton", help="Write the FFCV files too.")] = False,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0: one per core.")] = 0,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first image that cannot be used.")
    ] = False,
    drop_leaks: Annotated[
        bool, typer.Option("--drop-leaks", help="Leave out training images that are also in val.")
    ] = False,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Larger images are taken for decompression bombs.")
    ] = 178_956_970,
    verify: Annotated[
        str | None,
        typer.Option(help="Check an existing pack against its manifest, and do nothing else."),
    ] = None,
) -> None:
    """Write target and auxiliary images into one PACK that every loader reads."""
    from fastlt.packing.remote import is_remote
    from fastlt.packing.writer import PackOptions, verify_pack, write_pack

    if verify is not None and is_remote(verify):
        raise UserError(
            f"{verify} lies elsewhere, and shards of such packs are verified as they come: copy it "
            "here to verify it whole"
        )
    if verify is not None:
        console.print(
            f"{verify}: all {verify_pack(Path(verify), console)} files are as the manifest says"
        )
        return
    collection = collect(source, target, auxiliary, val, pairs, root, class_names, task, imbalance)
    if out is None:
        raise UserError("no place to write to: name one with --out PACK")
    options = PackOptions(
        out=out,
        workers=workers,
        max_side=max_side,
        quality=quality,
        transcode=transcode,
        strict=strict,
        drop_leaks=drop_leaks,
        beton=beton,
        max_pixels=max_pixels,
    )
    write_pack(collection, options, console)


@app.command()
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
            help="Settings of a published method, below your own: "
            f"{', '.join([*ONE_STAGE, *SECOND_STAGE])}.",
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
            help="Tell the memory, the steps and the hours it would take, from a few steps; train "
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
    from fastlt.reports.run import write_report
    from fastlt.training.distributed import is_first, launch
    from fastlt.training.loop import train as train_run
    from fastlt.utils.signals import Stopped

    if exact_decode and any(setting.startswith("data.decode=") for setting in settings or []):
        raise UserError("--exact-decode and data.decode contradict each other: leave one out")
    flags = [
        *(["data.decode=exact"] if exact_decode else []),
        *(["data.strict=true"] if strict else []),
    ]
    begin = method_settings(method, str(Path(start).resolve()) if start else None)
    config = load_config(
        recipe, [*(settings or []), *flags, as_override("data.pack", pack_place(data))], begin
    )
    if dry_run:
        from fastlt.training.dry_run import dry_run as tell

        tell(config, max(1, nproc), console)
        return
    if out is None:
        raise UserError("no place for the run: name a folder with --out RUN")
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
        result = train_run(config, out, console)
    except Stopped as stopped:
        if is_first():
            console.print(str(stopped))
        return
    if not is_first():
        return
    print_result(result, str(out))
    console.print(f"report: {write_report(out)}")


@app.command("eval")
def evaluate(
    run: Run,
    data: Annotated[
        str | None,
        typer.Option(help="Another pack with the same targets; by default the run's own."),
    ] = None,
    post_hoc: Annotated[
        list[str] | None,
        typer.Option(
            metavar="METHOD",
            help=f"Compare with this made of it, without training: {', '.join(POST_HOC)} or all.",
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
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all figures to this file.")
    ] = None,
) -> None:
    """Score a trained model: top-1 over the targets, by group and by class."""
    from fastlt.evaluation.evaluate import evaluate_post_hoc, evaluate_run

    if not post_hoc:
        if validation or strength is not None or share is not None:
            raise UserError(
                "--validation, --share and --strength are for --post-hoc: name a method, or leave "
                "them out"
            )
        result = evaluate_run(run, data)
        print_classes(result, run)
        print_result(result, str(run))
        write_figures(json_file, result)
        return
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
    run: Run, to: Annotated[Path, typer.Option(help="A name that ends in .safetensors or .onnx.")]
) -> None:
    """Write the model with its targets alone, checked to predict the same."""
    from fastlt.models.export import export_run

    console.print(f"{to}: {export_run(run, to)}")


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
) -> None:
    """Write DIR/report.html, of a run or a sweep: one page that needs nothing else."""
    if (place / "sweep.toml").is_file():
        from fastlt.sweep.report import write_sweep_report

        written = write_sweep_report(place, [axis for axis in axes.split(",") if axis])
    else:
        from fastlt.reports.run import write_report

        if axes:
            raise UserError(f"--axes is for sweeps, and {place} is none")
        written = write_report(place)
    console.print(f"report: {written}", soft_wrap=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The folder for data, packs and runs.")] = Path("demo"),
) -> None:
    """The whole way on an embedded data set: pack, train without and with auxiliaries, compare."""
    from fastlt.demo.run import run_demo

    run_demo(out, console)


@app.command()
def reproduce(
    task: Annotated[
        str,
        typer.Argument(
            help="cifar100-lt: published methods. cifar100-siblings: do auxiliaries help, and "
            "which?"
        ),
    ],
    data: Annotated[str, typer.Option(metavar="cifar100:DIR", help="As `fastlt pack` takes it.")],
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
    """Published figures beside ours, under their own protocol."""
    from fastlt.studies.reproduce import Asked, run_reproduce

    run_reproduce(task, Asked(data, out, epochs, seeds, parallel, settings or []), csv, console)


@app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN RUN...", help="Finished runs, the one to beat first."),
    ],
) -> None:
    """Runs side by side: figures, the settings in which they differ, and whether that is more than
    chance.
    """
    from fastlt.evaluation.compare import compare as tell

    tell(runs, console)


@app.command()
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

    with stopped_in_words():
        run_sweep(file, pack_place(data), out, settings or [], address, resume, console)
    console.print(f"report: {write_sweep_report(out)}", soft_wrap=True)


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
    """How fine the classes of a pack are, which targets are nearest, and which auxiliary lies
    between; nothing is trained.
    """
    from fastlt.curate.settings import FilterConfig
    from fastlt.studies.granularity import run_granularity

    chosen = {
        "weights": weights,
        "batch": batch,
        "device": device,
        **({"backbone": backbone} if backbone else {}),
    }
    settings = FilterConfig.model_validate(chosen)
    run_granularity(pack_place(data), settings, hierarchy, out, console)


@granularity.command("train")
def granularity_train(
    data: Annotated[
        str,
        typer.Argument(
            metavar="PACK",
            help="A pack whose classes have many images each, such as all of CIFAR-100.",
        ),
    ],
    hierarchy: Annotated[str, typer.Option(help=f"What the classes belong to: {HIERARCHY}.")],
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="Packs and runs; what has finished there is not run again."
        ),
    ],
    draws: Annotated[int, typer.Option(min=1, help="Of classes, images and trainings.")] = 3,
    parallel: Annotated[
        int, typer.Option(min=1, help="Runs at a time; the cores are shared among them.")
    ] = 1,
    imbalance: Annotated[
        float, typer.Option(min=1, help="Most over fewest images of a class.")
    ] = 100,
    csv: Annotated[
        Path | None, typer.Option(help="Add the figures of every run to this file.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[section.key=value]...", help="Settings of every run."),
    ] = None,
) -> None:
    """Balanced and long-tailed trainings at several granularities: does a long tail hurt less where
    classes are finer?
    """
    from fastlt.studies.granularity_training import Asked, run_granularity_study

    asked = Asked(pack_place(data), hierarchy, out, draws, parallel, imbalance, settings or [])
    run_granularity_study(asked, csv, console)


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
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[section.key=value]...", help="Settings on top of the recipe."),
    ] = None,
) -> None:
    """Images/s of the loop over images/s of bare forward, backward and step on resident data."""
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
        Path,
        typer.Option(
            metavar="DIR", help="Where loss-<device>.csv, which is added to, and .png go."
        ),
    ] = Path("benchmarks/results"),
) -> None:
    """Time and memory of the losses and their peers over a grid of sizes, against the floor of the
    device.

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
        Path, typer.Option(metavar="DIR", help="Where data-<device>.csv and .png go.")
    ] = Path("benchmarks/results"),
) -> None:
    """Images/s and CPU time of the loaders and their peers on the same JPEGs, against decoding
    alone.
    """
    from fastlt_benchmarks.loaders.run import run_bench_data

    run_bench_data(data, images, size, batch, workers, rounds, contender, quick, tune, out, console)


@curate.command()
def propose(
    targets: Annotated[
        Path,
        typer.Argument(
            metavar="PACK", help="A pack, or a text file with a name or WordNet id on each line."
        ),
    ],
    out: Curation,
    settings: Settings = None,
    config: SettingsFile = None,
    control: Annotated[
        Control | None,
        typer.Option(
            help="random: as many categories, drawn from all of WordNet, as the paper's control."
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the prompts and about what they cost; ask nobody."),
    ] = False,
) -> None:
    """Find neighbours of each target: by WordNet, a language model, or a file of your own."""
    from fastlt.curate.propose import run_propose
    from fastlt.curate.settings import read_settings

    run_propose(
        targets, out, read_settings(out, config, with_control(settings, control)), dry_run, console
    )


@curate.command()
def retrieve(
    out: Curation,
    settings: Settings = None,
    config: SettingsFile = None,
    allow_private: AllowPrivate = False,
) -> None:
    """Fetch images of each auxiliary class, with licence and author.

    Called again, it goes on, and retries what may work now.
    """
    from fastlt.curate.settings import read_settings

    with extra("curate"):
        from fastlt.curate.retrieve import run_retrieve
    with stopped_in_words():
        run_retrieve(out, read_settings(out, config, settings or [], allow_private), console)


@curate.command("filter")
def filter_images(
    pack: TargetPack, out: Curation, settings: Settings = None, config: SettingsFile = None
) -> None:
    """Keep the images that are like their class and not like one another, and none that the targets
    have.
    """
    from fastlt.curate.settings import read_settings

    with extra("curate"):
        from fastlt.curate.filter import run_filter
    run_filter(pack, out, read_settings(out, config, settings or []), console)


@curate.command("all")
def curate_all(
    pack: TargetPack,
    out: Curation,
    settings: Settings = None,
    config: SettingsFile = None,
    control: Annotated[Control | None, typer.Option(help="As of `propose`.")] = None,
    allow_private: AllowPrivate = False,
) -> None:
    """Propose, retrieve and filter."""
    from fastlt.curate.propose import run_propose
    from fastlt.curate.settings import read_settings

    with extra("curate"):
        from fastlt.curate.features import open_backbone
        from fastlt.curate.filter import run_filter
        from fastlt.curate.retrieve import run_retrieve
    read = read_settings(out, config, with_control(settings, control), allow_private)
    open_backbone(read.filter)  # what it lacks is told now, not after hours of fetching
    with stopped_in_words():
        run_propose(Path(pack), out, read, False, console)
        run_retrieve(out, read, console)
        run_filter(pack, out, read, console)


@contextmanager
def stopped_in_words() -> Iterator[None]:
    """What was stopped, and is saved, ends as well as what was let run."""
    from fastlt.utils.signals import Stopped

    try:
        yield
    except Stopped as stopped:
        console.print(str(stopped), highlight=False, soft_wrap=True)
        raise typer.Exit(0) from stopped


def with_control(settings: list[str] | None, control: Control | None) -> list[str]:
    return [*(settings or []), *([f"propose.control={control.value}"] if control else [])]


def collect(
    source: str | None,
    target: Path | None,
    auxiliary: str | None,
    val: Path | None,
    pairs: Path | None,
    root: Path | None,
    class_names: Path | None,
    task: Task | None,
    imbalance: float,
) -> Collection:
    """The images that the arguments of `pack` name."""
    from fastlt.packing.sources import is_pack, read_cifar100, read_collection

    if source is None:
        if target is not None and val is None and is_pack(target):
            val = target
        if target is None or val is None:
            raise UserError(
                "nothing to pack: name images with --target and --val, or give cifar100:DIR"
            )
        if task is not None:
            raise UserError(
                f"--task {task.value} is for cifar100:DIR, not for --target: leave it out"
            )
        return read_collection(
            target, Path(auxiliary) if auxiliary else None, val, pairs, root, class_names
        )
    kind, _, folder = source.partition(":")
    if kind != "cifar100" or not folder:
        raise UserError(
            f"unknown source '{source}': it must be cifar100:DIR; folders are named with --target, "
            "--auxiliary and --val"
        )
    if target or val or pairs or root or class_names:
        raise UserError(
            "--target, --val, --pairs, --root and --class-names do not go with cifar100:DIR: leave "
            "them out"
        )
    if task is None:
        raise UserError("cifar100 needs --task cifar100-lt or --task cifar100-siblings")
    controls = ["siblings", "random", "none"]
    default = "none" if task is Task.lt else "siblings"
    if auxiliary not in (None, *controls):
        raise UserError(f"--auxiliary {auxiliary}: for cifar100 it is one of {', '.join(controls)}")
    return read_cifar100(Path(folder), task.value, imbalance, auxiliary or default)


def pack_place(data: str) -> str:
    """As the run's configuration keeps it: wherever the command is called from."""
    from fastlt.packing.remote import is_remote

    return data if is_remote(data) else str(Path(data).resolve())


def print_result(result: dict[str, Any], name: str) -> None:
    """The last epoch; the best one, chosen by the test images themselves, is named beside it."""
    table = Table("", *RESULT_COLUMNS, title=escape(name), title_justify="left")
    table.columns[0].no_wrap = True
    columns = list(RESULT_COLUMNS.values())
    table.add_row("last epoch", *(figure(result[column]) for column in columns))
    if best := result.get("best"):
        table.add_row(
            f"best, epoch {best['epoch']}",
            *(figure(best[column]) for column in columns[:4]),
            style="dim",
        )
    console.print(table)
    if damaged := result.get("damaged_images"):
        console.print(
            f"[yellow]note:[/] {damaged:,} training images could not be decoded; others of their "
            "classes took their place"
        )
    worst = result["worst_class"]
    console.print(
        f"worst class: {worst['name']}, {figure(worst['accuracy'])} %",
        markup=False,
        highlight=False,
    )


def write_figures(file: Path | None, figures: dict[str, Any]) -> None:
    from fastlt.utils.files import write_text

    if file is None:
        return
    try:
        write_text(file, json.dumps(figures, indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"cannot write to {file} ({error.strerror}): name another file with --json"
        ) from error
    console.print(f"written to {file}", highlight=False, soft_wrap=True)


def print_post_hoc(results: dict[str, dict[str, Any]], name: str, validation: str | None) -> None:
    # 80 characters hold no more
    columns = {title: column for title, column in RESULT_COLUMNS.items() if title != "harmonic"}
    table = Table(
        "",
        "strength",
        *columns,
        title=escape(name),
        title_justify="left",
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    table.columns[0].no_wrap = table.columns[1].no_wrap = True
    for method, result in results.items():
        strength = f"{result['strength']:.3g}" if "strength" in result else ""
        table.add_row(method, strength, *(figure(result[column]) for column in columns.values()))
    console.print(table)
    first = results["as trained"]
    chosen = (
        f"strengths chosen on {first['chosen_on']:,} images "
        f"{f'of {validation}' if validation else 'set aside'}, and "
    )
    console.print(
        f"{chosen if first['chosen_on'] else ''}all scored on the same {first['images']:,}",
        highlight=False,
    )


def print_classes(result: dict[str, Any], run: Path) -> None:
    from fastlt.classes import ClassSpace

    space = ClassSpace.load(run / "classes.json")
    table = Table("class", "training images", "accuracy", "most often taken for")
    mistaken: dict[int, str] = {}
    for true, predicted, count in result["confusion"]:  # most frequent first
        mistaken.setdefault(true, escape(f"{space.target_names[predicted]} ({count} x)"))
    for target in sorted(range(space.num_targets), key=lambda t: -space.train_counts[t]):
        accuracy = figure(result["per_class"][target])
        table.add_row(
            escape(space.target_names[target]),
            f"{space.train_counts[target]:,}",
            accuracy,
            mistaken.get(target, ""),
        )
    console.print(table)


def figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
