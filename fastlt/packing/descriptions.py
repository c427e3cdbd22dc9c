"""What classes are called in texts, and what they look like: a table beside the images."""

import csv
from pathlib import Path

from fastlt.errors import DataError
from fastlt.packing.collection import Collection
from fastlt.packing.listing import read_text

COLUMNS = ["class", "display_name", "description"]


def describe(collection: Collection, file: Path) -> None:
    """Add display names and descriptions of a CSV, of which cells may be empty, to a collection.

    Raises DataError that names file and line.
    """
    rows = list(csv.reader(read_text(file).splitlines()))
    if not rows or [cell.strip() for cell in rows[0]] != COLUMNS:
        raise DataError(f"{file}, line 1: the header must be '{','.join(COLUMNS)}'")
    known = {*collection.target_names, *collection.auxiliary_names}
    for line, row in enumerate(rows[1:], start=2):
        if len(row) != len(COLUMNS):
            raise DataError(f"{file}, line {line}: it has {len(row)} columns instead of 3")
        name, shown, description = (cell.strip() for cell in row)
        if name not in known:
            raise DataError(f"{file}, line {line}: there is no class '{name}' in this pack")
        if shown:
            collection.display_names[name] = shown
        if description:
            collection.descriptions[name] = description
