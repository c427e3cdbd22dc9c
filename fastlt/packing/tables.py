"""Tables that the user names: CSV files with a header."""

import csv
from collections.abc import Sequence
from pathlib import Path

from fastlt.errors import UserError


def read_rows(path: Path, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Return the rows of a CSV file, each with its line and its values by column.

    Raises UserError where it cannot be read, lacks a column, or a row lacks a value.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file)
            names = list(table.fieldnames or ())
            if missing := [column for column in columns if column not in names]:
                raise UserError(
                    f"{path} has no column '{missing[0]}': it needs {', '.join(columns)}, and has "
                    f"{', '.join(names) or 'none'}"
                )
            rows = [(table.line_num, row) for row in table]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    for line, row in rows:
        if any(row[column] is None for column in columns):
            raise UserError(f"{path}, line {line}: it has too few values")
    return rows
