"""`fastlt pack`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from fastlt.cli.app import app, console
from fastlt.errors import UserError


class Task(str, Enum):
    """A long-tailed task that is cut out of CIFAR-100 or of the Grocery Store data set."""

    lt = "cifar100-lt"
    siblings = "cifar100-siblings"
    deep = "cifar100-deep"
    unrelated = "cifar100-unrelated"
    grocery = "grocery"


@app.command()
def pack(
    source: Annotated[
        str | None,
        typer.Argument(
            help="cifar100:DIR or grocery:DIR, or nothing where --target names the data."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder to write; it must not exist yet.")
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option(
            help="Target training images: class folders, a list (split file, CSV, COCO's JSON), "
            "shards, parquet, what `datasets` saved, or a pack."
        ),
    ] = None,
    auxiliary: Annotated[
        str | None,
        typer.Option(
            help="Auxiliary images, in the same forms; for cifar100 and grocery: siblings, "
            "random or none."
        ),
    ] = None,
    val: Annotated[
        Path | None,
        typer.Option(
            help="Validation images of the targets, in the same forms; for cifar100-siblings and "
            "-deep also `unused`, training images that the task leaves out: the official test "
            "images become --test."
        ),
    ] = None,
    test: Annotated[
        Path | None,
        typer.Option(
            help="Test images of the targets, in the same forms; training never reads them."
        ),
    ] = None,
    holdout: Annotated[
        float,
        typer.Option(
            min=0,
            max=0.9,
            metavar="SHARE",
            help="Instead of --val: take this share of each target class out of training as "
            "validation images, such as 0.1; for cifar100, the official test images become --test.",
        ),
    ] = 0.0,
    groups: Annotated[
        Path | None,
        typer.Option(
            metavar="CSV",
            help="With --holdout: a table with the columns image,group, whose groups (a patient, "
            "specimen or location) stay on one side.",
        ),
    ] = None,
    pairs: Annotated[
        Path | None,
        typer.Option(
            help="CSV with the columns target,auxiliary: which auxiliary neighbours which target."
        ),
    ] = None,
    root: Annotated[
        Path | None, typer.Option(help="The folder that the paths of lists start from.")
    ] = None,
    class_names: Annotated[
        Path | None,
        typer.Option(help="For split files: a class name per line, in the order of the labels."),
    ] = None,
    descriptions: Annotated[
        Path | None,
        typer.Option(
            metavar="CSV",
            help="A table with the columns class,display_name,description, for texts.",
        ),
    ] = None,
    relabel: Annotated[
        bool,
        typer.Option("--relabel", help="Number integer labels anew, where some have no images."),
    ] = False,
    image_key: Annotated[
        str,
        typer.Option(
            metavar="KEY",
            help="Of shards: what follows the key of an image, such as input.jpg; of tables: the "
            "column of paths or images.",
        ),
    ] = "",
    label_key: Annotated[
        str,
        typer.Option(
            metavar="KEY",
            help="Of shards: what follows the key of a label, such as label.cls, txt or "
            "json:FIELD; of tables: the column.",
        ),
    ] = "",
    task: Annotated[
        Task | None,
        typer.Option(help="For cifar100 and grocery: which long-tailed task to cut out of it."),
    ] = None,
    imbalance: Annotated[
        float,
        typer.Option(
            min=1, help="For cifar100: images of the most frequent class over those of the rarest."
        ),
    ] = 100,
    owners: Annotated[
        int,
        typer.Option(
            min=0,
            help="Let each auxiliary neighbour at most so many of its targets, those with the "
            "fewest images; 0: all.",
        ),
    ] = 0,
    overlap: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            metavar="SHARE",
            help="For tasks with auxiliaries, a control: replace this share of each auxiliary's "
            "images by images of its targets that training does not use.",
        ),
    ] = 0.0,
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
        bool,
        typer.Option(
            "--drop-leaks", help="Leave out training images that are also in val or test."
        ),
    ] = False,
    drop_conflicts: Annotated[
        bool,
        typer.Option(
            "--drop-conflicts",
            help="Leave out training images that stand under several classes.",
        ),
    ] = False,
    max_pixels: Annotated[
        int, typer.Option(min=1, help="Larger images are taken for decompression bombs.")
    ] = 178_956_970,
    range: Annotated[
        str,
        typer.Option(
            metavar="auto|full|LOW,HIGH",
            help="Of images of more than 8 bits: which values become black and white; auto: by the "
            "data set's percentiles.",
        ),
    ] = "auto",
    verify: Annotated[
        str | None,
        typer.Option(help="Check an existing pack against its manifest, and do nothing else."),
    ] = None,
) -> None:
    """Write target and auxiliary images into one PACK that every loader reads."""
    given = dict(locals())
    from dataclasses import fields

    from fastlt.data.engines.ffcv.beton import beton_writer
    from fastlt.packing.collect import collect
    from fastlt.packing.holdout import Together
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
    write_beton = beton_writer() if beton else None
    collection = collect(
        source,
        target=target,
        auxiliary=auxiliary,
        val=val,
        test=test,
        holdout=holdout,
        pairs=pairs,
        root=root,
        class_names=class_names,
        task=task.value if task else None,
        imbalance=imbalance,
        together=Together(groups),
        relabel=relabel,
        image_key=image_key,
        label_key=label_key,
        descriptions=descriptions,
        owners=owners,
        overlap=overlap,
    )
    if out is None:
        raise UserError("no place to write to: name one with --out PACK")
    options = PackOptions(
        **{one.name: given[one.name] for one in fields(PackOptions) if one.name in given}
    )
    write_pack(collection, options, console, write_beton)
