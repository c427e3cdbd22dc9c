"""`fastlt curate propose`, `retrieve`, `filter` and `all`."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from fastlt.cli.app import console, curate, reporting_stops
from fastlt.errors import extra

Curation = Annotated[
    Path, typer.Option(help="The folder of the curation, which each step adds to.")
]
TargetPack = Annotated[str, typer.Argument(metavar="PACK", help="The pack of the targets.")]
Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="[section.key=value]...", help="Of propose, retrieve and filter."),
]
SettingsFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="A .toml file of settings; by default what the last step kept, config.toml.",
    ),
]
AllowPrivate = Annotated[
    bool,
    typer.Option(
        "--allow-private",
        help="Fetch from this machine and private networks too: retrieve.allow_private=true.",
    ),
]


Senses = Annotated[
    str | None,
    typer.Option(
        metavar="CSV|first",
        help="Of targets whose name has several senses: a table target,synset, such as "
        "CURATED/senses.csv with one line of each, or first for the first in WordNet's order.",
    ),
]


class Control(str, Enum):
    """The controls that `propose` draws."""

    random = "random"


@curate.command()
def propose(
    targets: Annotated[
        Path,
        typer.Argument(
            metavar="PACK", help="A pack, or a text file with a name or WordNet id on each line."
        ),
    ],
    out: Curation,
    settings: Settings = None,
    config: SettingsFile = None,
    control: Annotated[
        Control | None,
        typer.Option(
            help="random: as many categories, drawn from all of WordNet, as the paper's control."
        ),
    ] = None,
    senses: Senses = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the prompts and about what they cost; send none."),
    ] = False,
) -> None:
    """Find neighbours of each target: by WordNet, a language model, or a file of your own."""
    from fastlt.curate.propose import run_propose
    from fastlt.curate.settings import read_settings

    run_propose(
        targets,
        out,
        read_settings(out, config, with_options(settings, control, senses)),
        dry_run,
        console,
    )


@curate.command()
def retrieve(
    out: Curation,
    settings: Settings = None,
    config: SettingsFile = None,
    allow_private: AllowPrivate = False,
) -> None:
    """Fetch images of each auxiliary class, with licence and author.

    Called again, it goes on, and retries what may work now.
    """
    from fastlt.curate.settings import read_settings

    with extra("curate"):
        from fastlt.curate.retrieve import run_retrieve
    with reporting_stops():
        run_retrieve(out, read_settings(out, config, settings or [], allow_private), console)


@curate.command("filter")
def filter_images(
    pack: TargetPack, out: Curation, settings: Settings = None, config: SettingsFile = None
) -> None:
    """Keep images that are like their class, unlike one another, and not among the targets'."""
    from fastlt.curate.settings import read_settings

    with extra("curate"):
        from fastlt.curate.filter import run_filter
    run_filter(pack, out, read_settings(out, config, settings or []), console)


@curate.command("all")
def curate_all(
    pack: TargetPack,
    out: Curation,
    settings: Settings = None,
    config: SettingsFile = None,
    control: Annotated[Control | None, typer.Option(help="As of `propose`.")] = None,
    senses: Senses = None,
    allow_private: AllowPrivate = False,
) -> None:
    """Propose, retrieve and filter."""
    from fastlt.curate.propose import run_propose
    from fastlt.curate.settings import read_settings

    with extra("curate"):
        from fastlt.curate.filter import run_filter
        from fastlt.curate.retrieve import run_retrieve
        from fastlt.evaluation.features import open_backbone
    read = read_settings(out, config, with_options(settings, control, senses), allow_private)
    open_backbone(read.filter)  # what it lacks is reported now, not after hours of fetching
    with reporting_stops():
        run_propose(Path(pack), out, read, False, console)
        run_retrieve(out, read, console)
        run_filter(pack, out, read, console)


def with_options(
    settings: list[str] | None, control: Control | None, senses: str | None
) -> list[str]:
    """Return the settings with those that are options of `propose`."""
    chosen = [f"propose.control={control.value}"] if control else []
    chosen += [f"propose.synsets={json.dumps(senses)}"] if senses else []
    return [*(settings or []), *chosen]
