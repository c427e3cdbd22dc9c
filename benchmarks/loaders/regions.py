"""The accuracy of decoding only what a crop needs, beside decoding whole images.

The JPEGs are the same, over several seeds.

    python -m fastlt_benchmarks.loaders.regions CIFAR_DIR --out runs/regions

CIFAR-100's images are enlarged to JPEGs of 96 pixels, colours subsampled: small enough to train on
a CPU, and still whole JPEGs.
"""

from pathlib import Path
from typing import Annotated

import typer
from PIL import Image
from rich.console import Console
from rich.progress import track

from fastlt.__main__ import speak_to_the_user
from fastlt.decode.images import decode_pil
from fastlt.packing.cifar import open_cifar, png_bytes
from fastlt.studies.repeated import Control, Runner, table, train_all
from fastlt.utils.output import whole_output
from fastlt.utils.results_file import append_rows

CLASSES = range(0, 100, 5)
IMAGES = {"train": 400, "test": 100}  # of each class
SIDE = 96
SETTINGS = [
    "data.crop=random-resized-crop",
    "data.scale=[0.25,1.0]",
    "data.auxiliary=false",
    "loss.name=balanced-ce",
    "train.epochs=12",
    "train.eval_every=12",
]


def main(
    cifar: Annotated[
        Path, typer.Argument(help="CIFAR-100, as `fastlt pack cifar100:DIR` takes it.")
    ],
    out: Annotated[Path, typer.Option(help="The folder for images, pack and runs.")] = Path(
        "runs/regions"
    ),
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each way to decode.")] = 4,
    parallel: Annotated[
        int, typer.Option(min=1, help="Runs at a time; the cores are shared among them.")
    ] = 2,
    csv: Annotated[
        Path | None, typer.Option(help="Add the figures of every run to this file.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Argument(help="section.key=value for every run.")
    ] = None,
) -> None:
    """Print mean and standard deviation over the seeds for both ways to decode."""
    console = Console()
    pack = make_pack(cifar, out, console)
    controls = {
        way: Control(pack, [f"data.decode={way}", *SETTINGS, *(settings or [])])
        for way in ("exact", "region")
    }
    rows = train_all("cifar100-siblings", controls, out, seeds, parallel, console)
    console.print(table(rows))
    if csv is not None:
        append_rows(csv, rows, "python -m fastlt_benchmarks.loaders.regions")


def make_pack(cifar: Path, out: Path, console: Console) -> Path:
    """Return a pack of CIFAR-100's images, enlarged as JPEGs."""
    images, pack = out / "images", out / "pack"
    if not images.is_dir():
        with whole_output(images) as folder:
            write_images(cifar, folder, console)
    if not pack.is_dir():
        Runner().run(
            "pack",
            "--target",
            str(images / "train"),
            "--val",
            str(images / "test"),
            "--transcode",
            "--out",
            str(pack),
        )
    return pack


def write_images(cifar: Path, folder: Path, console: Console) -> None:
    """Write the images as files."""
    source = open_cifar(cifar)
    for fine in track(CLASSES, "enlarging", console=console):
        for split, stored in (("train", source.train), ("test", source.test)):
            place = folder / split / source.fine_names[fine]
            place.mkdir(parents=True)
            for path, part in stored[fine][: IMAGES[split]]:
                enlarged = decode_pil(png_bytes(path, part)).resize(
                    (SIDE, SIDE), Image.Resampling.BICUBIC
                )
                enlarged.save(place / f"{part:05}.jpg", quality=90, subsampling=2)


if __name__ == "__main__":
    speak_to_the_user(lambda: typer.run(main))
