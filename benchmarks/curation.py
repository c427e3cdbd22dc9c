"""The precision and recall of `fastlt curate filter` on CIFAR-100 with planted images.

They are strangers, duplicates and leaks.

    python -m fastlt_benchmarks.curation CIFAR100_DIR --weights RUN --out runs/curation

Targets are 20 classes, auxiliaries their 30 siblings with 100 images each, to which are added,
class by class: images of classes that are neither; images of the class resized, compressed anew or
mirrored; and test images of a target, as they are, compressed anew or mirrored. RUN is a model of
ours, as no pretrained weights are at hand: say what it was trained on beside the figures.
"""

import io
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import track
from rich.table import Table

from fastlt.__main__ import speak_to_the_user
from fastlt.curate.filter import owner_ids, retrieved_rows, retrieved_split, splits_of
from fastlt.curate.image_index import build_index
from fastlt.curate.retrieve import run_retrieve
from fastlt.curate.selection import UNLIKE, select_images
from fastlt.curate.settings import CurateConfig
from fastlt.curate.table import read_table, write_table
from fastlt.decode.images import decode_pil
from fastlt.evaluation.features import open_backbone
from fastlt.packing.cifar import Cifar, open_cifar, png_bytes
from fastlt.packing.reader import open_pack
from fastlt.studies.repeated import Runner
from fastlt.utils.results_file import append_rows, check_file

# the first fine classes of each are targets, as in `cifar100-siblings`
SUPERCLASSES, TARGETS = (
    range(10),
    2,
)
# of each auxiliary class; copies and leaks of each kind
IMAGES, STRANGERS, COPIES, LEAKS = (
    100,
    10,
    3,
    2,
)
KINDS = {"stranger": UNLIKE, "copy": "duplicate", "leak": "leak"}
THRESHOLDS = {
    "gamma1": (0.5, 0.6, 0.7, 0.8, 0.9),
    "gamma2": (0.95, 0.98, 0.99, 1.5),
    "hash_distance": (-1, 2, 4),
}


def main(
    cifar: Annotated[
        Path, typer.Argument(help="CIFAR-100, as `fastlt pack cifar100:DIR` takes it.")
    ],
    weights: Annotated[str, typer.Option(help="A RUN folder, whose backbone makes the features.")],
    trained: Annotated[
        str, typer.Option(help="What it was trained on, in a few words: it goes into the table.")
    ],
    out: Annotated[Path, typer.Option(help="The folder for images, pack and tables.")] = Path(
        "runs/curation"
    ),
    csv: Annotated[Path | None, typer.Option(help="Add the figures to this file.")] = None,
) -> None:
    """Print precision and recall of what was planted, for several thresholds."""
    console = Console()
    if csv is not None:
        check_file(csv)
    if not (out / "images").is_dir():
        plant(open_cifar(cifar), out, console)
    if not (out / "pack").is_dir():
        Runner().run(
            "pack",
            f"cifar100:{cifar}",
            "--task",
            "cifar100-siblings",
            "--auxiliary",
            "none",
            "--out",
            str(out / "pack"),
        )
    rows = [{"backbone": trained, **row} for row in measure(out, weights, console)]
    console.print(table(rows, trained))
    if csv is not None:
        append_rows(csv, rows, "python -m fastlt_benchmarks.curation")


def plant(cifar: Cifar, out: Path, console: Console) -> None:
    """Write OUT/images, a folder a category, and OUT/categories.jsonl.

    File names begin with what an image is.
    """
    rng = np.random.default_rng(0)
    shutil.rmtree(out, ignore_errors=True)
    (out / "images").mkdir(parents=True)
    strangers = [fine for superclass in range(10, 20) for fine in cifar.members(superclass)]
    categories = []
    for superclass in track(SUPERCLASSES, "planting", console=console):
        owners = cifar.members(superclass)[:TARGETS]
        for fine in cifar.members(superclass)[TARGETS:]:
            name = cifar.fine_names[fine]
            categories.append(
                {
                    "name": name,
                    "query": name,
                    "owners": [cifar.fine_names[owner] for owner in owners],
                }
            )
            (out / "images" / name).mkdir()
            for file, data in planted(cifar, fine, owners, strangers, rng):
                (out / "images" / name / file).write_bytes(data)
    write_table(out / "categories.jsonl", categories)


def planted(
    cifar: Cifar, fine: int, owners: list[int], strangers: list[int], rng: np.random.Generator
) -> Iterator[tuple[str, bytes]]:
    """Yield the name and the bytes of each image.

    Names sort originals before copies of them: the first of those that are the same is kept.
    """
    own = [png_bytes(*place) for place in cifar.train[fine][:IMAGES]]
    yield from ((f"a-own-{i:03}.png", data) for i, data in enumerate(own))
    for i in range(STRANGERS):
        stored = cifar.train[strangers[rng.integers(len(strangers))]]
        yield f"b-stranger-{i:03}.png", png_bytes(*stored[rng.integers(len(stored))])
    for kind, change in CHANGES.items():
        for i in rng.choice(IMAGES, COPIES, replace=False).tolist():
            yield f"c-copy-{kind}-{i:03}.{kind_of(change(own[i]))}", change(own[i])
    for kind, change in {"as it is": unchanged, **CHANGES}.items():
        for i in range(LEAKS):
            stored = cifar.test[owners[rng.integers(len(owners))]]
            data = change(png_bytes(*stored[rng.integers(len(stored))]))
            yield f"d-leak-{kind}-{i:03}.{kind_of(data)}", data


def unchanged(data: bytes) -> bytes:
    """Return the bytes as they are."""
    return data


def resized(data: bytes) -> bytes:
    """Return the image at another size."""
    return stored_as(decode_pil(data).resize((26, 26), Image.Resampling.BICUBIC), "PNG")


def compressed(data: bytes) -> bytes:
    """Return the image compressed as a JPEG."""
    return stored_as(decode_pil(data), "JPEG", quality=60)


def mirrored(data: bytes) -> bytes:
    """Return the image mirrored."""
    return stored_as(ImageOps.mirror(decode_pil(data)), "JPEG", quality=90)


CHANGES = {"resized": resized, "compressed": compressed, "mirrored": mirrored}


def stored_as(image: Image.Image, kind: str, **options: Any) -> bytes:
    """Return the bytes of an image in a format."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def kind_of(data: bytes) -> str:
    """Return the kind of a planted image."""
    return "png" if data.startswith(b"\x89PNG") else "jpg"


def measure(out: Path, weights: str, console: Console) -> Iterator[dict[str, Any]]:
    """Yield a row for each threshold and kind of what was planted."""
    base: dict[str, Any] = {
        "weights": weights,
        "gamma1": 0.7,
        "gamma2": 0.98,
        "hash_distance": 4,
        "workers": 0,
    }
    folder = {
        "sources": ["folder"],
        "folder": str(out / "images"),
        "min_side": 16,
        "per_category": 1000,
    }
    config = CurateConfig.model_validate({"retrieve": folder, "filter": base})
    run_retrieve(out, config, console)
    categories = read_table(out / "categories.jsonl", "fastlt curate propose")
    rows = retrieved_rows(out, categories)
    kinds = [Path(row["place"]).name.split("-")[1] for row in rows]
    originals = originals_of(rows)
    pack, backbone = open_pack(out / "pack"), open_backbone(config.filter)
    owners = owner_ids(pack.space, categories, str(out / "pack"))
    known = {
        name: build_index(out / "features", split, backbone, config.filter, name, console)
        for name, split in splits_of(pack, config.filter).items()
    }
    index = build_index(
        out / "features",
        retrieved_split(out, rows, categories),
        backbone,
        config.filter,
        "images",
        console,
    )
    changes: list[dict[str, Any]] = [
        {name: value} for name, values in THRESHOLDS.items() for value in values
    ]
    for change in [{}, *(change for change in changes if not change.items() <= base.items())]:
        settings = config.filter.model_copy(update=change)
        verdicts = select_images(index, known, owners, settings, backbone.device)
        for kind, reason in KINDS.items():
            dropped = np.array([found.startswith(reason) for found in verdicts.reasons])
            was_planted = np.array([found == kind for found in kinds])
            hits = int((dropped & was_planted).sum())
            yield {
                "gamma1": settings.gamma1,
                "gamma2": settings.gamma2,
                "hash_distance": settings.hash_distance,
                "kind": kind,
                "planted": int(was_planted.sum()),
                "dropped": int(dropped.sum()),
                "hits": hits,
                "recall": round(hits / was_planted.sum(), 4),
                "precision": round(hits / max(1, dropped.sum()), 4),
                "missed": missed(kind, kinds, verdicts.reasons, originals),
                "kept_of_class": int(
                    sum(
                        found == "own" and not why
                        for found, why in zip(kinds, verdicts.reasons, strict=True)
                    )
                ),
                "of_class": kinds.count("own"),
            }


def originals_of(rows: Sequence[dict[str, Any]]) -> dict[int, int]:
    """Return the number of the image that each copy was made from."""
    numbers = {place_of(row): number for number, row in enumerate(rows)}
    return {
        number: numbers[(category, f"a-own-{name.rpartition('-')[2]}")]
        for (category, name), number in numbers.items()
        if name.startswith("c-copy-")
    }


def place_of(row: dict[str, Any]) -> tuple[str, str]:
    """Return category and file name of a row."""
    return row["category"], Path(row["place"]).stem


def missed(
    kind: str, kinds: Sequence[str], reasons: Sequence[str], originals: dict[int, int]
) -> int:
    """Return how many planted images are left, whatever others were dropped for.

    Copies count where what they are copies of is left as well.
    """
    left = [number for number, found in enumerate(kinds) if found == kind and not reasons[number]]
    return len(left) if kind != "copy" else sum(not reasons[originals[number]] for number in left)


def table(rows: list[dict[str, Any]], trained: str) -> Table:
    """Return the rows as a table."""
    columns = (
        "gamma1",
        "gamma2",
        "hash",
        "planted",
        "",
        "recall",
        "precision",
        "missed",
        "own images kept",
    )
    result = Table(*columns, title=f"features: {trained}")
    for row in rows:
        result.add_row(
            f"{row['gamma1']:g}",
            f"{row['gamma2']:g}",
            str(row["hash_distance"]),
            str(row["planted"]),
            row["kind"],
            f"{row['recall']:.1%}",
            f"{row['precision']:.1%}",
            str(row["missed"]),
            f"{row['kept_of_class'] / row['of_class']:.1%}",
        )
    return result


if __name__ == "__main__":
    speak_to_the_user(lambda: typer.run(main))
