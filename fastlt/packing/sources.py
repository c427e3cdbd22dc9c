"""Where images come from: class folders, split files or WebDataset shards, read into one list of
references per split.

Nothing is decoded here.
"""

import csv
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fastlt.classes import pair_ids
from fastlt.errors import DataError, UserError
from fastlt.packing.cifar import read_cifar100
from fastlt.packing.collection import Collection, ImageRef
from fastlt.packing.folders import is_of_a_system, list_class_folders
from fastlt.packing.listing import Listing, Reading, children, read_text, relabelled
from fastlt.packing.lists import list_file
from fastlt.packing.parquet import is_saved, list_saved, list_tables
from fastlt.packing.reader import open_pack
from fastlt.packing.webdataset import list_shards

__all__ = ["Collection", "ImageRef", "read_cifar100", "read_collection", "read_pairs"]


def read_collection(
    target: Path,
    auxiliary: Path | None,
    val: Path | None,
    pairs: Path | None = None,
    root: Path | None = None,
    class_names: Path | None = None,
    test: Path | None = None,
    *,
    relabel: bool = False,
    image_key: str = "",
    label_key: str = "",
) -> Collection:
    """Return the images and classes of a pack to be.

    Each of target, auxiliary, val and test is a folder of class sub-folders, a list (a split file,
    a table or COCO's JSON; paths are below `root`, by default the list's folder), a .tar shard, a
    parquet file, a folder or a pattern of such, or a folder that `datasets` saved; all but
    auxiliary may also be a pack, of which the targets of the split of that name are taken. Without
    `val`, the collection has no validation images yet. `pairs` is a CSV with the header
    `target,auxiliary`; `class_names` names the integer labels of the targets, one a line.

    relabel: labels may have gaps, and are numbered anew. image_key, label_key: of shards what
    follows a key, of tables the column. Raises UserError on bad input.
    """
    if auxiliary is not None and pairs is None:
        raise UserError(
            "--auxiliary needs --pairs: a CSV with the header 'target,auxiliary' that says which "
            "neighbours which"
        )
    if pairs is not None and auxiliary is None:
        raise UserError(
            "--pairs needs --auxiliary: the images of the auxiliary classes that it names"
        )
    given = _read_names(class_names) if class_names else []
    reading = Reading(root, image_key=image_key, label_key=label_key)
    targets = (
        _list_pack(target, "train")
        if is_pack(target)
        else _list(target, replace(reading, limit=len(given) or None))
    )
    order = _order(targets, given) if relabel else []
    if order:
        targets, given = _renumbered(targets, order), [given[i] for i in order] if given else []
    if given and not targets.numbered:
        raise UserError(
            f"--class-names is for integer labels, but the classes of {target} have names already: "
            "leave it out"
        )
    target_names = _class_names(targets, given)
    collection = Collection(target_names, targets.refs, [])
    collection.warnings += targets.warnings()
    if is_pack(target):
        collection.scale = open_pack(target).scale
    limit = None if order else len(target_names)
    for split, place in (("val", val), ("test", test)):
        if place is not None:
            listing = (
                _list_pack(place, split)
                if is_pack(place)
                else _list(place, replace(reading, limit=limit, may_be_empty=True))
            )
            listing = _renumbered(listing, order) if order else listing
            setattr(collection, split, _as_targets(listing, targets, target_names, split))
            collection.warnings += listing.warnings()
    if auxiliary is not None and pairs is not None:
        neighbours = _list(auxiliary, reading)
        if relabel and neighbours.numbered:
            neighbours = _renumbered(neighbours, _order(neighbours, []))
        _add_auxiliaries(collection, neighbours, pairs)
    return collection


def _add_auxiliaries(collection: Collection, listing: Listing, pairs: Path) -> None:
    names = _class_names(listing, [], prefix="auxiliary_")
    targets = set(collection.target_names)
    if shared := [name for name in names if name in targets]:
        raise UserError(
            f"{listing.where}: the auxiliary class '{shared[0]}' is a target class as well: rename "
            "or remove it"
        )
    first = len(collection.target_names)
    collection.auxiliary_names = names
    collection.pairs = pair_ids(read_pairs(pairs), collection.target_names, names, str(pairs))
    collection.train = collection.train + [
        replace(ref, label=ref.label + first) for ref in listing.refs
    ]
    collection.origins = dict.fromkeys(names, os.fsencode(listing.where).decode("utf-8", "replace"))
    _add_card(collection, listing.where / "card.json")
    collection.warnings += listing.warnings()


def _add_card(collection: Collection, file: Path) -> None:
    """What `fastlt curate` says of the auxiliary set, if it made it."""
    if not file.is_file():
        return
    try:
        card = json.loads(read_text(file))
        origins = card.pop("origins")
        collection.origins |= {
            name: origin for name, origin in origins.items() if name in collection.origins
        }
    except (ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"{file} is no summary of `fastlt curate` ({error!r}): remove it, or filter again"
        ) from error
    collection.curation = card


def is_pack(path: Path) -> bool:
    return (path / "manifest.json").is_file() and (path / "classes.json").is_file()


def _list_pack(path: Path, name: str) -> Listing:
    """The images of the targets in a split of a pack."""
    pack = open_pack(path)
    split = getattr(pack, name)
    if split is None:
        raise UserError(f"the pack {path} has no test images: pack it again with --test")
    refs = [
        ImageRef(
            split.key(image).rpartition(".")[0],
            label,
            str(split.folder / split.shards[shard]),
            offset,
            size,
        )
        for image, (label, shard, offset, size) in enumerate(
            zip(
                split.label.tolist(),
                split.shard.tolist(),
                split.offset.tolist(),
                split.size.tolist(),
                strict=True,
            )
        )
        if label < pack.space.num_targets
    ]
    return Listing(path, refs, dict(enumerate(pack.space.target_names)))


def read_pairs(file: Path) -> list[tuple[str, str]]:
    """The (target, auxiliary) names of a pairs CSV; the first pair stands on line 2.

    Raises UserError naming file and line.
    """
    try:
        rows = list(csv.reader(read_text(file).rstrip().splitlines()))
    except csv.Error as error:
        raise DataError(f"{file} is not a CSV file: {error}") from error
    header = [cell.strip() for cell in rows[0]] if rows else []
    if header[:2] != ["target", "auxiliary"]:
        raise DataError(f"{file}, line 1: the header must be 'target,auxiliary'")
    if len(rows) == 1:
        raise DataError(
            f"{file} holds no pairs: every line after the header names a target and an auxiliary "
            "that neighbours it"
        )
    for line, row in enumerate(rows[1:], start=2):
        if len(row) != len(header) or not row[0].strip() or not row[1].strip():
            raise DataError(
                f"{file}, line {line}: '{','.join(row)}' is not of the form '{','.join(header)}'"
            )
    return [(row[0].strip(), row[1].strip()) for row in rows[1:]]


def _list(path: Path, reading: Reading) -> Listing:
    """Return the images of a source, whichever kind it is."""
    if any(letter in path.name for letter in "*?") and not path.exists():
        return _list_files(path, sorted(path.parent.glob(path.name)), reading)
    if path.is_file():
        return _list_files(path, [path], reading)
    if not path.is_dir():
        raise DataError(f"there is no folder or file {path}{_hub_advice(path)}")
    if is_saved(path):
        return list_saved(path, reading)
    found = sorted(child for child in children(path) if not child.name.startswith("."))
    folders = [child for child in found if child.is_dir()]
    files = [child for child in found if child.suffix.lower() in CONTAINERS]
    if files and all(is_of_a_system(folder.name) for folder in folders):
        return _list_files(path, files, reading)
    if not folders:
        raise DataError(
            f"{path} has no class sub-folders, .tar shards or parquet files: give a folder with a "
            "sub-folder of images per class"
        )
    return list_class_folders(path, folders, reading)


CONTAINERS = (".tar", ".parquet", ".arrow")


def _list_files(where: Path, files: list[Path], reading: Reading) -> Listing:
    """Return the images of files of one kind."""
    kinds = {file.suffix.lower() for file in files}
    if len(kinds) > 1:
        raise DataError(f"{where} holds files of several kinds, {', '.join(sorted(kinds))}")
    if not files:
        raise DataError(f"no file matches {where}")
    if kinds <= {".tar"}:
        return list_shards(where, files, reading)
    if kinds <= {".parquet", ".arrow"}:
        return list_tables(where, _of_one_split(where, files), reading)
    if len(files) > 1:
        raise DataError(f"{where} names several lists: give one")
    return list_file(files[0], reading)


def _of_one_split(where: Path, files: list[Path]) -> list[Path]:
    """Return parquet files, unless they are named as those of several splits."""
    splits = {split for file in files if (split := file.name.partition("-")[0]) in SPLIT_NAMES}
    if len(splits) > 1:
        raise DataError(
            f"{where} holds files of several splits, {', '.join(sorted(splits))}: name those of "
            f"one by a pattern, such as '{where}/train-*.parquet'"
        )
    return files


SPLIT_NAMES = ("train", "validation", "val", "valid", "dev", "test")


def _hub_advice(path: Path) -> str:
    """What to do where a path looks like the name of a data set of a hub."""
    parts = path.parts
    if path.is_absolute() or len(parts) > 2 or path.suffix:
        return ""
    return "; a data set of a hub is saved first, with `datasets`: load_dataset(...).save_to_disk"


def _order(listing: Listing, given: Sequence[str]) -> list[int]:
    """Return the integer labels that occur, sorted. UserError where the source has names."""
    if not listing.numbered:
        raise UserError(
            f"--relabel is for integer labels, but the classes of {listing.where} have names: "
            "leave it out"
        )
    return sorted({ref.label for ref in listing.refs})


def _renumbered(listing: Listing, order: Sequence[int]) -> Listing:
    """Return a listing whose labels are their places in `order`; classes keep their numbers as
    names where they have no others.
    """
    ids = {label: place for place, label in enumerate(order)}
    if unknown := sorted({ref.label for ref in listing.refs} - ids.keys()):
        raise DataError(
            f"{listing.where}: label {unknown[0]} is no class of the training set: --relabel "
            "numbers its labels alone"
        )
    refs = [relabelled(ref, ids[ref.label]) for ref in listing.refs]
    names = {place: listing.names.get(label, str(label)) for label, place in ids.items()}
    return replace(listing, refs=refs, names=names)


def _class_names(listing: Listing, given: list[str], prefix: str = "") -> list[str]:
    """Return the names of the classes 0.., each of which must have an image."""
    labels = {ref.label for ref in listing.refs}
    count = len(given) or max(labels) + 1
    for label in range(
        count
    ):  # the first gap comes within len(labels) steps, however large the labels are
        if label not in labels:
            name = f" ('{given[label]}')" if given else ""
            raise DataError(
                f"{listing.where}: class {label}{name} has no images: labels must run from 0 to "
                f"{count - 1} with no gap; --relabel numbers them anew"
            )
    return given or [listing.names.get(label, f"{prefix}{label}") for label in range(count)]


def _as_targets(
    validation: Listing, targets: Listing, target_names: list[str], split: str
) -> list[ImageRef]:
    """The images of `val` or `test` with the targets' ids."""
    kind = "validation" if split == "val" else "test"
    if not validation.refs:
        raise DataError(f"{validation.where} holds no {kind} images")
    if validation.numbered:
        known = targets.names or dict(enumerate(target_names))
        for label, name in validation.names.items():
            if known[label] != name and name in known.values():
                raise DataError(
                    f"{validation.where}: label {label} is '{name}' here but '{known[label]}' in "
                    f"{targets.where}: "
                    "both must number the classes alike"
                )
        return validation.refs
    ids = {name: label for label, name in enumerate(target_names)}
    for name in validation.names.values():
        if name not in ids:
            raise DataError(
                f"{validation.where}: the {kind} class '{name}' is no class of the training "
                f"set {targets.where}"
            )
    return [replace(ref, label=ids[validation.names[ref.label]]) for ref in validation.refs]


def _read_names(file: Path) -> list[str]:
    names = [line.strip() for line in read_text(file).rstrip().splitlines()]
    repeated = {name for name, times in Counter(names).items() if times > 1}
    for line, name in enumerate(names, start=1):
        if not name or name in repeated:
            problem = (
                f"the class name '{name}' stands there more than once"
                if name
                else "there is no class name"
            )
            raise DataError(
                f"{file}, line {line}: {problem}; every line names one class, in the order of the "
                "labels"
            )
    if not names:
        raise DataError(
            f"{file} holds no class names: every line names one class, in the order of the labels"
        )
    return names
