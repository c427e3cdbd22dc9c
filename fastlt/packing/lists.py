"""Lists of images as a source: split files, tables of paths and labels, and COCO's JSON."""

import csv
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fastlt.decode.formats import EXTENSIONS
from fastlt.errors import DataError
from fastlt.packing.collection import ImageRef
from fastlt.packing.labels import check_single
from fastlt.packing.listing import (
    Listing,
    Reading,
    by_name,
    first_missing,
    in_range,
    read_text,
    relabelled,
    within,
)

INTEGER = re.compile(r"-?[0-9]+")
# of a line of a split file, what follows the name of the image
AFTER_IMAGE = re.compile(rf"(?:{'|'.join(map(re.escape, EXTENSIONS))})\s+(\S.*)$", re.IGNORECASE)
# headers of tables, in lower case, the likeliest first
PATH_COLUMNS = (
    *("path", "image", "file", "filename", "file_name", "filepath", "file_path", "image_path"),
    *("image_name", "img", "img_path", "relative_path", "image_id"),
)
LABEL_COLUMNS = (
    *("label", "class", "class_name", "label_name", "category", "target", "species", "name"),
    *("labels", "class_id", "category_id", "label_id", "fine_label"),
)


def list_file(file: Path, reading: Reading) -> Listing:
    """Return the images of a list: COCO's JSON, a table with a path and a label, or a split file
    of lines `relative/path label`.

    Paths start from the root folder, by default the one that the list lies in. Raises DataError
    that names the line, where a label or a path is bad, or an image is missing.
    """
    if file.suffix.lower() == ".json":
        return list_coco(file, reading)
    text = read_text(file)
    delimiter = delimiter_of(file, text.partition("\n")[0])
    if delimiter:
        return list_table(file, text, delimiter, reading)
    return list_split_file(file, text, reading)


# --- split files


def list_split_file(file: Path, text: str, reading: Reading) -> Listing:
    """Return the images of lines `relative/path label`."""
    root = reading.root or file.parent
    refs: list[ImageRef] = []
    lines: list[int] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            relative, label = split_line(line, f"{file}, line {number}", reading.limit)
            refs.append(reference(relative, label, root))
            lines.append(number)
    if not refs:
        raise DataError(f"{file} lists no images: every line must be 'relative/path label'")
    check_present(file, refs, lines, root)
    return Listing(file, refs, parent_names(refs), numbered=True)


def split_line(line: str, place: str, limit: int | None) -> tuple[str, int]:
    """Return path and label of a line of a split file."""
    named = AFTER_IMAGE.search(line)
    if named is not None:
        check_single(named[1], place)
    relative, label = ([*line.rsplit(maxsplit=1), ""])[:2]
    if not INTEGER.fullmatch(label):
        raise DataError(
            f"{place}: '{line.strip()}' is not of the form 'relative/path label' with an integer "
            "label"
        )
    return within(relative.strip(), place), in_range(int(label), place, limit)


def reference(relative: str, label: int, root: Path) -> ImageRef:
    """Return an image below the root folder."""
    return ImageRef(relative.rpartition(".")[0] or relative, label, f"{root}/{relative}")


def check_present(file: Path, refs: Sequence[ImageRef], lines: Sequence[int], root: Path) -> None:
    """Raise DataError where an image of a list is missing."""
    if missing := first_missing(refs):
        index, path = missing
        line = f", line {lines[index]}" if lines else ""
        raise DataError(
            f"{file}{line}: there is no image {path}: paths are taken below --root, here {root}"
        )


def parent_names(refs: Iterable[ImageRef]) -> dict[int, str]:
    """Label -> name of the folder of its images, or nothing where that is not one-to-one."""
    parents: dict[int, str] = {}
    for ref in refs:
        name = ref.path.split("/")[-2]
        if parents.setdefault(ref.label, name) != name:
            return {}
    return parents if len(set(parents.values())) == len(parents) else {}


# --- tables


def delimiter_of(file: Path, first: str) -> str:
    """Return what separates the columns of a table; empty where the file is none."""
    for delimiter in ("\t", ",", ";"):
        header = next(csv.reader([first], delimiter=delimiter), [])
        cells = [cell.strip().lower() for cell in header]
        has_header = bool({*cells} & {*PATH_COLUMNS}) and bool({*cells} & {*LABEL_COLUMNS})
        if len(cells) > 1 and (has_header or file.suffix.lower() in (".csv", ".tsv")):
            return delimiter
    return ""


def list_table(file: Path, text: str, delimiter: str, reading: Reading) -> Listing:
    """Return the images of a table; without a header it has two columns, path and label."""
    root = reading.root or file.parent
    rows, columns = table_rows(file, text, delimiter, reading)
    refs: list[ImageRef] = []
    labels: list[str] = []
    lines: list[int] = []
    for number, row in rows:
        place = f"{file}, line {number}"
        if len(row) <= max(columns):
            raise DataError(f"{place}: it has {len(row)} values, too few for a path and a label")
        path, label = (row[column].strip() for column in columns)
        if not path or not label:
            raise DataError(f"{place}: it has no {'label' if path else 'path'}")
        check_single(label, place)
        refs.append(reference(within(path, place), 0, root))
        labels.append(label)
        lines.append(number)
    if not refs:
        raise DataError(f"{file} lists no images below its header")
    check_present(file, refs, lines, root)
    if not all(INTEGER.fullmatch(label) for label in labels):
        return by_name(file, list(zip(refs, labels, strict=True)))
    numbered = [
        relabelled(ref, in_range(int(label), f"{file}, line {line}", reading.limit))
        for ref, label, line in zip(refs, labels, lines, strict=True)
    ]
    return Listing(file, numbered, parent_names(numbered), numbered=True)


def table_rows(
    file: Path, text: str, delimiter: str, reading: Reading
) -> tuple[list[tuple[int, list[str]]], tuple[int, int]]:
    """Return the rows of a table, each with its line, and which columns are path and label."""
    try:
        table = csv.reader(text.splitlines(keepends=True), delimiter=delimiter, strict=True)
        rows = [(table.line_num, row) for row in table if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise DataError(f"{file} is no table: {error}") from error
    header = [cell.strip() for cell in rows[0][1]]
    named = reading.image_key or reading.label_key
    if not named and len(header) == 2 and Path(header[0]).suffix.lower() in EXTENSIONS:
        return rows, (0, 1)
    path = column_of(file, header, reading.image_key, PATH_COLUMNS, "--image-key")
    label = column_of(file, header, reading.label_key, LABEL_COLUMNS, "--label-key")
    return rows[1:], (path, label)


def column_of(
    where: Path, header: Sequence[str], given: str, likely: Sequence[str], option: str
) -> int:
    """Return the column that the user named, or the likeliest. DataError where there is none."""
    lower = [name.lower() for name in header]
    wanted = [given.lower()] if given else likely
    found = next((lower.index(name) for name in wanted if name in lower), None)
    if found is None:
        what = "paths" if option == "--image-key" else "labels"
        problem = f"no column '{given}'" if given else f"no column that is known to hold {what}"
        raise DataError(f"{where} has {problem}: name one of {', '.join(header)} with {option}")
    return found


# --- COCO's JSON


def list_coco(file: Path, reading: Reading) -> Listing:
    """Return the images of COCO's or iNaturalist's JSON that show one category.

    Whole images are taken, not what boxes enclose; those of several categories, or of none, are
    left out and counted.
    """
    root = reading.root or file.parent
    images, annotations, categories = coco_parts(file)
    names = category_names(categories)
    shown: dict[Any, set[Any]] = {}
    for annotation in annotations:
        shown.setdefault(annotation["image_id"], set()).add(annotation["category_id"])
    if unknown := {one for each in shown.values() for one in each} - names.keys():
        raise DataError(f"{file}: category {min(unknown, key=str)} is annotated, but not listed")
    refs, labels = [], []
    for image in images:
        found = shown.get(image["id"], set())
        if len(found) == 1:
            path = within(str(image["file_name"]), f"{file}, image {image['id']}")
            refs.append(reference(path, 0, root))
            labels.append(next(iter(found)))
    if not refs:
        raise DataError(f"{file} lists no images that show one category")
    check_present(file, refs, (), root)
    used = {*labels}
    order = [category for category in names if category in used]
    ids = {category: label for label, category in enumerate(order)}
    return Listing(
        file,
        [relabelled(ref, ids[label]) for ref, label in zip(refs, labels, strict=True)],
        {ids[category]: names[category] for category in order},
        notes=coco_notes(file, images, shown, annotations),
    )


def coco_parts(file: Path) -> tuple[list[Any], list[Any], list[Any]]:
    """Return the lists of a COCO file. DataError where it is none."""
    try:
        found = json.loads(read_text(file))
        parts = [found[name] for name in ("images", "annotations", "categories")]
        for part, keys in zip(
            parts, [("id", "file_name"), ("image_id", "category_id"), ("id", "name")], strict=True
        ):
            for entry in part:
                for key in keys:
                    entry[key]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{file} is not of COCO's form ({error!r}): it needs images (id, file_name), "
            "annotations (image_id, category_id) and categories (id, name)"
        ) from error
    return parts[0], parts[1], parts[2]


def category_names(categories: Iterable[Any]) -> dict[Any, str]:
    """Category -> name, in the order of the file; with its number where a name is not unique."""
    names = {entry["id"]: str(entry["name"]).strip() for entry in categories}
    repeated = len(set(names.values())) < len(names)
    return {key: f"{name} {key}" for key, name in names.items()} if repeated else names


def coco_notes(
    file: Path, images: Sequence[Any], shown: dict[Any, set[Any]], annotations: Sequence[Any]
) -> list[str]:
    """Return what was left out of a COCO file."""
    several = sum(len(shown.get(image["id"], ())) > 1 for image in images)
    none = sum(image["id"] not in shown for image in images)
    notes = []
    if several:
        notes.append(f"{file}: {several} images left out that show several categories")
    if none:
        notes.append(f"{file}: {none} images left out that have no category")
    if any("bbox" in annotation for annotation in annotations):
        notes.append(f"{file}: its boxes are not cut out: whole images are taken")
    return notes
