"""Tables of decisions and their reasons: JSON lines, whole or not there."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastlt.errors import UserError
from fastlt.utils.files import whole_file


def write_table(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write the rows, a line each."""
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_table(path: Path, made_by: str) -> list[dict[str, Any]]:
    """Return the rows.

    Raises UserError that names the bad line, or the step that makes the table.
    """
    try:
        # splitlines() takes U+2028, which JSON may hold, for an end
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError as error:
        raise UserError(f"there is no {path}: make it with `{made_by}`") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    return [
        _row(line, f"{path}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def _row(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object but {line.strip()[:40]}")
    return row
