"""`fastlt settings`: every key of a recipe, with its type, default and meaning."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from fastlt.cli.app import app, console
from fastlt.cli.setting_list import Setting, listed_settings, matching


@app.command()
def settings(
    wanted: Annotated[
        str | None,
        typer.Argument(
            metavar="[SECTION|WORD]",
            help="A section, such as optim; or a word that a key or its meaning contains.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print them as JSON.")] = False,
) -> None:
    """List the keys for section.key=value, with type, default and meaning."""
    found = matching(listed_settings(), wanted)
    if as_json:
        print(json.dumps([one._asdict() for one in found], indent=1, ensure_ascii=False))
        return
    sections: dict[str, list[Setting]] = {}
    for one in found:
        sections.setdefault(one.section, []).append(one)
    for name, rows in sections.items():
        console.print(table_of(name, rows))


def table_of(section: str, rows: list[Setting]) -> Table:
    """Return the table of a section: key and default, and below them type and meaning."""
    table = Table(
        "key", "default", "type and meaning", title=section, title_justify="left", box=SIMPLE_HEAD
    )
    table.columns[0].overflow = "fold"
    table.columns[1].max_width, table.columns[1].overflow = 20, "fold"
    table.columns[0].min_width = min(24, max(len(one.name) for one in rows))
    for one in rows:
        table.add_row(
            f"[bold]{escape(one.name)}[/]",
            escape(one.default),
            f"[dim]{escape(one.type)}.[/] {escape(one.meaning)}",
        )
    return table
