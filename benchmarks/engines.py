"""Whether every engine trains alike: the same pack, the same steps, the same loss.

    python -m fastlt_benchmarks.engines [--epochs 4] [--csv FILE] [section.key=value]...

Each engine and way to decode that can be had on this machine trains the same small model on the
same JPEGs. Looked at alone, images may be right that reach a training damaged, because a decoder
writes them while kernels that were queued before still use that memory: only a training, with work
queued ahead, shows it. Exit code 1 where a loss is not that of the first engine, or steps were
skipped.
"""

import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from rich.table import Table

from fastlt.config import Config, as_override, load_config
from fastlt.data.engines.choice import ENGINES
from fastlt.data.engines.ffcv.beton import write_beton
from fastlt.data.engines.ffcv.native import has_ffcv
from fastlt.data.engines.interface import Options
from fastlt.errors import UserError
from fastlt.packing.reader import open_pack
from fastlt.packing.sources import read_collection
from fastlt.packing.writer import PackOptions, write_pack
from fastlt.training.loop import train
from fastlt.utils.results_file import append_rows, check_file
from fastlt.utils.run_files import read_epochs

SIDE = 96  # pixels of the images: more than the resident engine keeps
CLASSES, PER_CLASS = 8, 48
TOLERANCE = 0.15  # of the loss: engines round pixels, and their augmentation is the same
DECODES = ("exact", "region", "gpu")
SETTINGS = (
    "model.name=resnet8",
    "data.size=64",
    "data.batch=32",
    "data.crop=random-resized-crop",
    "optim.lr=0.05",
    "data.workers=2",
    "train.compile=off",
)


def write_images(root: Path) -> None:
    """Write JPEGs of stripes, whose class is their angle and colour, below train/ and val/."""
    y, x = np.mgrid[:SIDE, :SIDE] / SIDE
    for split, count in (("train", PER_CLASS), ("val", 4)):
        for label in range(CLASSES):
            rng = np.random.default_rng([label, count])
            folder = root / split / f"c{label}"
            folder.mkdir(parents=True)
            angle, colour = np.pi * label / CLASSES, np.eye(3)[label % 3]
            for i in range(count):
                phase, waves = rng.uniform(0, 2 * np.pi), rng.uniform(20, 30)
                along = np.cos(angle) * x + np.sin(angle) * y
                stripes = 0.5 + 0.4 * np.sin(waves * along + phase)[..., None] * (0.4 + colour)
                noisy = 255 * stripes.clip(0, 1) + rng.normal(0, 8, (SIDE, SIDE, 3))
                pixels = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
                pixels.save(folder / f"{i}.jpg", quality=90)


def make_pack(folder: Path) -> Path:
    """Return a pack of the JPEGs, with FFCV's files where ffcv is installed."""
    write_images(folder / "images")
    collection = read_collection(
        folder / "images/train", None, folder / "images/val", None, None, None
    )
    options = PackOptions(out=folder / "pack", workers=1)
    beton = write_beton if has_ffcv() else None
    return write_pack(collection, options, Console(quiet=True), beton)


def available(place: Path, size: int) -> list[tuple[str, str]]:
    """Return the engines and ways to decode that can be had, the reference first."""
    pack, found = open_pack(place), []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for name in dict.fromkeys(["torch", *(engine.name for engine in ENGINES)]):
        for decode in DECODES:
            options = Options(size, 2, tuple(pack.betons("train")), decode, device=device)
            kinds = [engine for engine in ENGINES if engine.name == name]
            if any(kind.obstacle(pack.train, options) is None for kind in kinds):
                found.append((name, decode))
    return found


def trained(config: Config, run: Path) -> dict[str, Any]:
    """Return the result of a training, with the loss of its last epoch."""
    result = train(config, run, Console(quiet=True))
    return {**result, "loss": read_epochs(run)[-1]["loss"]}


def main(
    settings: Annotated[list[str] | None, typer.Argument(metavar="[section.key=value]...")] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Epochs of each training.")] = 8,
    csv: Annotated[Path | None, typer.Option(help="Add the figures to this file.")] = None,
) -> None:
    """Train the same pack by every engine, and compare the losses."""
    if csv is not None:
        check_file(csv)
    console, rows = Console(), []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pack = make_pack(folder)
        fixed = [*SETTINGS, f"train.epochs={epochs}", f"train.eval_every={epochs}"]
        common = [*fixed, "loss.name=ce", as_override("data.pack", str(pack)), *(settings or [])]
        for name, decode in available(pack, 64):
            own = [f"data.engine={name}", f"data.decode={decode}"]
            config = load_config("cifar100-siblings", [*common, *own])
            result = trained(config, folder / f"{name}-{decode}")
            columns = ("loss", "top1", "skipped_steps", "images_per_second")
            rows.append({"engine": name, "decode": decode, **{key: result[key] for key in columns}})
    table = Table("engine", "decode", "loss", "top-1", "skipped steps", "images/s")
    for row in rows:
        figures = (f"{row['loss']:.4f}", f"{row['top1']:.1f}", str(row["skipped_steps"]))
        table.add_row(row["engine"], row["decode"], *figures, f"{row['images_per_second']:,.0f}")
    console.print(table)
    if csv is not None:
        append_rows(csv, rows, "python -m fastlt_benchmarks.engines")
    sys.exit(bool(report_faults(rows, console)))


def report_faults(rows: list[dict[str, Any]], console: Console) -> list[str]:
    """Print and return where an engine did not train as the first one did."""
    faults = []
    for row in rows:
        which = f"{row['engine']}, {row['decode']} decode"
        if row["skipped_steps"]:
            faults.append(f"{which}: {row['skipped_steps']} steps were skipped")
        if row["loss"] is None or abs(row["loss"] - rows[0]["loss"]) > TOLERANCE:
            faults.append(f"{which}: loss {row['loss']}, not {rows[0]['loss']:.4f}")
    for fault in faults:
        console.print(f"[bold red]fault:[/] {fault}", highlight=False)
    if not faults:
        console.print(f"{len(rows)} ways to load reach the same loss, within {TOLERANCE}")
    return faults


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        Console(stderr=True).print(f"error: {error}")
        sys.exit(2)
