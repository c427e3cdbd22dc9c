"""The commands.

Each parses, calls one function, and prints; what it calls is imported then, so that help comes at
once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Long-tailed image classification with auxiliary classes and neighbour silencing.",
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


def pack_place(data: str) -> str:
    """As the run's configuration keeps it: wherever the command is called from."""
    from fastlt.packing.remote import is_remote

    return data if is_remote(data) else str(Path(data).resolve())


@contextmanager
def stopped_in_words() -> Iterator[None]:
    """What was stopped, and is saved, ends as well as what was let run."""
    from fastlt.utils.signals import Stopped

    try:
        yield
    except Stopped as stopped:
        console.print(str(stopped), highlight=False, soft_wrap=True)
        raise typer.Exit(0) from stopped
