"""Where images come from: class folders, split files or WebDataset shards, read into one list of
references per split.

Nothing is decoded here.
"""

import csv
import json
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn

from fastlt.classes import pair_ids
from fastlt.decode.formats import EXTENSIONS, is_image_file
from fastlt.errors import DataError, UserError
from fastlt.packing.cifar import read_cifar100
from fastlt.packing.collection import Collection, ImageRef
from fastlt.packing.labels import check_single
from fastlt.packing.reader import open_pack

__all__ = ["Collection", "ImageRef", "read_cifar100", "read_collection", "read_pairs"]

# of a line of a split file, what follows the name of the image
AFTER_IMAGE = re.compile(rf"(?:{'|'.join(map(re.escape, EXTENSIONS))})\s+(\S.*)$", re.IGNORECASE)


@dataclass(frozen=True)
class Listing:
    """One of --target, --auxiliary and --val as it stands, its labels still its own."""

    where: Path
    refs: list[ImageRef]
    names: dict[int, str]  # by label; empty where the source names none
    numbered: bool = False  # labels are integers that the user chose, so target and val share them
    # files that are no images, by extension
    left_out: Counter[str] = field(default_factory=Counter)


def read_collection(
    target: Path,
    auxiliary: Path | None,
    val: Path | None,
    pairs: Path | None = None,
    root: Path | None = None,
    class_names: Path | None = None,
    test: Path | None = None,
) -> Collection:
    """Return the images and classes of a pack to be.

    Each of target, auxiliary, val and test is a folder of class sub-folders, a split file
    (`relative/path label` per line, below `root`, by default the split file's folder), or a .tar
    shard or a folder of them; all but auxiliary may also be a pack, of which the targets of the
    split of that name are taken. Without `val`, the collection has no validation images yet.
    `pairs` is a CSV with the header `target,auxiliary`; `class_names` names the integer labels of
    the targets, one a line. Raises UserError on bad input.
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
    targets = (
        _list_pack(target, "train")
        if is_pack(target)
        else _list(target, root, limit=len(given) or None)
    )
    if given and not targets.numbered:
        raise UserError(
            f"--class-names is for integer labels, but the classes of {target} have names already: "
            "leave it out"
        )
    target_names = _class_names(targets, given)
    collection = Collection(target_names, targets.refs, [])
    collection.warnings += _left_out(targets)
    for split, place in (("val", val), ("test", test)):
        if place is not None:
            listing = (
                _list_pack(place, split)
                if is_pack(place)
                else _list(place, root, limit=len(target_names), may_be_empty=True)
            )
            setattr(collection, split, _as_targets(listing, targets, target_names, split))
            collection.warnings += _left_out(listing)
    if auxiliary is not None and pairs is not None:
        _add_auxiliaries(collection, _list(auxiliary, root), pairs)
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
    collection.warnings += _left_out(listing)


def _add_card(collection: Collection, file: Path) -> None:
    """What `fastlt curate` says of the auxiliary set, if it made it."""
    if not file.is_file():
        return
    try:
        card = json.loads(_read_text(file))
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
        rows = list(csv.reader(_read_text(file).rstrip().splitlines()))
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


def _list(
    path: Path, root: Path | None, limit: int | None = None, may_be_empty: bool = False
) -> Listing:
    """`limit`: integer labels must be below it.

    `may_be_empty`: a class folder without images is allowed.
    """
    if path.is_file() and path.suffix == ".tar":
        return _list_shards(path, [path], limit)
    if path.is_file():
        return _list_split_file(path, root or path.parent, limit)
    if not path.is_dir():
        raise DataError(f"there is no folder or file {path}")
    children = sorted(child for child in _children(path) if not child.name.startswith("."))
    classes = [child for child in children if child.is_dir()]
    shards = [child for child in children if child.suffix == ".tar"]
    if shards and not classes:
        return _list_shards(path, shards, limit)
    if not classes:
        raise DataError(
            f"{path} has no class sub-folders and no .tar shards: give a folder with a sub-folder "
            "of images per class"
        )
    return _list_class_folders(path, classes, may_be_empty)


def _list_class_folders(path: Path, classes: list[Path], may_be_empty: bool) -> Listing:
    refs: list[ImageRef] = []
    left_out: Counter[str] = Counter()
    for label, folder in enumerate(classes):
        if not _is_text(folder.name):
            raise DataError(
                f"{path}: the name of class folder {folder.name!a} is not valid UTF-8: rename it"
            )
        before = len(refs)
        for relative in _files_below(folder):
            if is_image_file(f"{folder}/{relative}"):
                stem = relative.rpartition(".")[0] or relative
                refs.append(ImageRef(f"{folder.name}/{stem}", label, f"{folder}/{relative}"))
            else:
                left_out[Path(relative).suffix or "without extension"] += 1
        if len(refs) == before and not may_be_empty:
            raise DataError(f"the class folder {folder} holds no images: add some or remove it")
    return Listing(
        path, refs, {label: folder.name for label, folder in enumerate(classes)}, left_out=left_out
    )


def _files_below(folder: Path) -> Iterator[str]:
    """Yield paths relative to `folder`, sorted, without what is hidden."""
    start = len(str(folder)) + 1
    for parent, folders, files in os.walk(folder, onerror=_cannot_list):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (
            f"{parent}/{name}"[start:] for name in sorted(files) if not name.startswith(".")
        )


def _list_split_file(file: Path, root: Path, limit: int | None) -> Listing:
    refs: list[ImageRef] = []
    lines: list[int] = []
    for number, line in enumerate(_read_text(file).splitlines(), start=1):
        if line.strip():
            relative, label = _split_line(line, f"{file}, line {number}", limit)
            refs.append(
                ImageRef(relative.rpartition(".")[0] or relative, label, f"{root}/{relative}")
            )
            lines.append(number)
    if not refs:
        raise DataError(f"{file} lists no images: every line must be 'relative/path label'")
    if missing := _first_missing(refs):
        index, path = missing
        raise DataError(
            f"{file}, line {lines[index]}: there is no image {path}: paths are taken below --root, "
            f"here {root}"
        )
    return Listing(file, refs, _parent_names(refs), numbered=True)


def _split_line(line: str, place: str, limit: int | None) -> tuple[str, int]:
    named = AFTER_IMAGE.search(line)
    if named is not None:
        check_single(named[1], place)
    relative, label = ([*line.rsplit(maxsplit=1), ""])[:2]
    relative = relative.strip()
    if not re.fullmatch(r"-?[0-9]+", label):
        raise DataError(
            f"{place}: '{line.strip()}' is not of the form 'relative/path label' with an integer "
            "label"
        )
    if relative.startswith("/") or ".." in relative.split("/"):
        raise DataError(
            f"{place}: {relative} leaves the root folder: paths must be relative and stay below "
            "--root"
        )
    return relative, _in_range(int(label), place, limit)


def _in_range(label: int, place: str, limit: int | None) -> int:
    if label < 0:
        raise DataError(f"{place}: label {label} is out of range: labels start at 0")
    if limit is not None and label >= limit:
        raise DataError(
            f"{place}: label {label} is out of range: there are {limit} target classes, 0 to "
            f"{limit - 1}"
        )
    return label


def _first_missing(refs: Sequence[ImageRef]) -> tuple[int, str] | None:
    """One directory listing per folder instead of one question per file: much faster on network
    storage.
    """
    present: dict[str, set[str]] = {}
    for index, ref in enumerate(refs):
        parent, _, name = ref.path.rpartition("/")
        if parent not in present:
            folder = Path(parent)
            present[parent] = (
                {child.name for child in _children(folder)} if folder.is_dir() else set()
            )
        if name not in present[parent]:
            return index, ref.path
    return None


def _parent_names(refs: Iterable[ImageRef]) -> dict[int, str]:
    """Label -> name of the folder of its images, or nothing where that is not one-to-one."""
    parents: dict[int, str] = {}
    for ref in refs:
        name = ref.path.split("/")[-2]
        if parents.setdefault(ref.label, name) != name:
            return {}
    return parents if len(set(parents.values())) == len(parents) else {}


def _list_shards(where: Path, shards: list[Path], limit: int | None) -> Listing:
    """Return images with their `.cls`, an ASCII integer or a class name; pixels are not read."""
    found = [(shard, *sample) for shard in shards for sample in _samples(shard)]
    if not found:
        raise DataError(f"{where} holds no images")
    for shard, key, _, text in found:
        check_single(text, f"{shard}, {key}.cls")
    numbered = all(re.fullmatch(r"-?[0-9]+", text) for *_, text in found)
    if numbered:
        labels = [
            _in_range(int(text), f"{shard}, {key}.cls", limit) for shard, key, _, text in found
        ]
        names = {}
    else:
        names = dict(enumerate(sorted({text for *_, text in found})))
        ids = {name: label for label, name in names.items()}
        labels = [ids[text] for *_, text in found]
    refs = [
        ImageRef(key, label, str(shard), image.offset_data, image.size)
        for (shard, key, image, _), label in zip(found, labels, strict=True)
    ]
    return Listing(where, refs, names, numbered)


def _samples(shard: Path) -> list[tuple[str, tarfile.TarInfo, str]]:
    """(key, image member, text of its .cls) in the order of the shard."""
    images: dict[str, tarfile.TarInfo] = {}
    classes: dict[str, str] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, slash, name = member.name.rpartition("/")
                stem, _, extension = name.partition(".")
                key = folder + slash + stem
                if member.isfile() and f".{extension.lower()}" in EXTENSIONS:
                    images.setdefault(key, member)
                elif member.isfile() and extension == "cls":
                    classes[key] = _class_text(tar, member, shard)
            end = tar.offset
        with shard.open("rb") as file:  # tarfile takes a cut-off or damaged header for the end
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("it is cut off or damaged")
    except (OSError, tarfile.TarError) as error:
        raise DataError(
            f"cannot read the shard {shard} ({error}): it must be a whole, uncompressed tar file"
        ) from error
    if unlabelled := next((key for key in images if key not in classes), None):
        raise DataError(
            f"{shard}: the image {unlabelled} has no {unlabelled}.cls that names its class"
        )
    return [(key, image, classes[key]) for key, image in images.items()]


def _class_text(tar: tarfile.TarFile, member: tarfile.TarInfo, shard: Path) -> str:
    content = tar.extractfile(member)
    data = content.read(1024) if content else b""
    try:
        text = data.decode("utf-8").strip()
    except UnicodeDecodeError:
        text = ""
    if not text or not text.isprintable():
        raise DataError(
            f"{shard}: {member.name} must hold a class as text, an integer or a name, not "
            f"{data[:16]!r}"
        )
    return text


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
                f"{count - 1} with no gap"
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


def _left_out(listing: Listing) -> list[str]:
    if not listing.left_out:
        return []
    kinds = ", ".join(f"{times} x {kind}" for kind, times in listing.left_out.most_common(3))
    return [
        f"{listing.where}: {listing.left_out.total()} files left out that are no images ({kinds})"
    ]


def _read_names(file: Path) -> list[str]:
    names = [line.strip() for line in _read_text(file).rstrip().splitlines()]
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


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from error


def _children(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        _cannot_list(error)


def _cannot_list(error: OSError) -> NoReturn:
    raise DataError(f"cannot read the folder {error.filename}: {error.strerror}") from error


def _is_text(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:  # a surrogate: the bytes of the file name are no UTF-8
        return False
    return True
