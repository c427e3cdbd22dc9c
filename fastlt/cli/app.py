"""The app that the commands register with, and what several of them share.

A command parses, calls one function, and prints; what it calls is imported then, so that help comes
at once.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from fastlt.errors import UserError

PANELS = {  # the order of the help
    "Data": ["pack", "curate"],
    "Train": ["fit", "probe", "train", "settings", "methods", "sweep", "reproduce", "demo"],
    "Use": ["eval", "predict", "export", "blend", "extend", "report", "compare"],
    "Measure": ["bench-train", "bench-loss", "bench-data", "granularity", "doctor"],
}
PANEL_OF = {name: panel for panel, names in PANELS.items() for name in names}


class Panels(TyperGroup):
    """The commands in the order of PANELS; one that is not named there comes first, in its own."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands in the order of the help."""
        for name, command in self.commands.items():
            command.rich_help_panel = PANEL_OF.get(name)  # type: ignore[attr-defined]
        order = list(PANEL_OF)
        return sorted(self.commands, key=lambda name: order.index(name) if name in order else -1)


app = typer.Typer(
    cls=Panels,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
curate = typer.Typer(no_args_is_help=True, help="From the names of targets to auxiliary classes.")
app.add_typer(curate, name="curate")
granularity = typer.Typer(
    no_args_is_help=True,
    help="How fine the classes of a pack are, and what that does to a long tail.",
)
app.add_typer(granularity, name="granularity")
console = Console()

PackPath = Annotated[
    str,
    typer.Option(
        "--data", help="What `fastlt pack` wrote: a folder, or an address such as s3://bucket/pack."
    ),
]
Run = Annotated[Path, typer.Argument(help="The folder that `fastlt train` wrote.")]


def show_version(wanted: bool) -> None:
    """Print the version and end, where it is wanted."""
    if wanted:
        console.print(f"fastlt {version('fastlt')}", highlight=False)
        raise typer.Exit


@app.callback()
def before_all(
    context: typer.Context,
    _version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", callback=show_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Long-tailed image classification with auxiliary classes and neighbour silencing."""
    if sys.platform == "win32" and context.invoked_subcommand != "doctor":
        raise UserError("fastlt does not run on Windows itself: use it within WSL 2 (Linux)")


def pack_place(data: str) -> str:
    """Return the place of a pack as a run keeps it, wherever the command is called from."""
    from fastlt.packing.remote import is_remote

    return data if is_remote(data) else str(Path(data).resolve())


@contextmanager
def reporting_stops() -> Iterator[None]:
    """Print where a run that was stopped and saved goes on, and exit with 0."""
    from fastlt.utils.signals import Stopped

    try:
        yield
    except Stopped as stopped:
        console.print(str(stopped), highlight=False, soft_wrap=True)
        raise typer.Exit(0) from stopped
