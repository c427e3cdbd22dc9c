"""What MkDocs calls: pages and parts of pages that are made from the code.

`reference/configuration.md`, `reference/commands.md` and `changelog.md` are made whole; in other
pages a line `<!-- generated: NAME -->` is replaced by what the function of PARTS returns.
"""

import re
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

from mkdocs.structure.files import File, Files

from fastlt.cli.setting_list import NAMED
from fastlt.utils.key_words import default_of, in_words, type_of

ROOT = Path(__file__).resolve().parents[1]
MARK = re.compile(r"^<!-- generated: (\S+) -->$", re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are made from the code."""
    pages = {
        "reference/configuration.md": configuration,
        "reference/commands.md": commands,
        "changelog.md": changelog,
    }
    for path, make in pages.items():
        files.append(File.generated(config, path, content=make()))
    for measured in sorted((ROOT / "benchmarks/results").iterdir()):
        path = f"results/{measured.name}"
        files.append(File.generated(config, path, abs_src_path=str(measured)))
    return files


def on_page_markdown(markdown: str, **given: Any) -> str:
    """Fill in the parts of a page that are made from the code."""
    return MARK.sub(lambda found: PARTS[found[1]](), markdown)


def changelog() -> str:
    """Return the changelog of the repository."""
    return (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("](docs/", "](")


# --- the configuration


def configuration() -> str:
    """Return the page of all settings: those of recipes, of curations and of sweeps."""
    from fastlt.config import config_type
    from fastlt.curate.settings import CurateConfig
    from fastlt.methods import method_names, section
    from fastlt.sweep.spec import Sweep

    own = config_type().model_fields["method"].annotation.model_fields
    lines = [
        "# Configuration",
        "",
        "A recipe is a TOML file with the tables below. `fastlt train` takes any of their keys as "
        "`section.key=value` on top of the recipe, and writes what results to `RUN/config.toml`. A "
        'recipe that says `extends = "NAME"`, or the path of another one, changes that one. '
        "`fastlt.config` checks all of it: a key or a value that does not exist is refused, with "
        "the nearest one that does.",
        *sections(config_type()),
    ]
    for name in method_names():
        numbers = {k: f for k, f in section(name).model_fields.items() if k not in own}
        if numbers:
            lines += ["", f"### With method.name={name}", "", *table("method", numbers)]
    lines += [
        "",
        "## Settings of fastlt curate",
        "",
        "The steps of `fastlt curate` take them as `section.key=value`, and keep them in "
        "`config.toml` in the folder of the curation.",
        *sections(CurateConfig, "###"),
        "",
        "## SWEEP.toml",
        "",
        "What `fastlt sweep` reads: see [Sweep over settings](../how-to/sweep.md).",
        "",
        *table("", Sweep.model_fields),
    ]
    for name in ("search", "resources"):
        kind = Sweep.model_fields[name].annotation
        lines += ["", f"### {name}", "", *table(name, kind.model_fields)]
    return "\n".join(lines) + "\n"


def platforms() -> str:
    """Return a list of operating systems, with what runs there."""
    from fastlt.cli.doctor import PLATFORMS

    return "\n".join(f"- {words}" for words in PLATFORMS.values())


def key_types() -> str:
    """Return a table of the types of keys that fastlt.config names."""
    from fastlt import config

    names = [name for name, kind in vars(config).items() if hasattr(kind, "__metadata__")]
    rows = [f"| `{name}` | {cell(in_words(getattr(config, name), '`'))} |" for name in names]
    return "\n".join(["| type | values |", "|---|---|", *rows])


def sections(tree: Any, level: str = "##") -> Iterator[str]:
    """Yield the lines of the sections of a tree, a table each."""
    for name, field in tree.model_fields.items():
        yield from ("", f"{level} {name}", "")
        if doc := (field.annotation.__doc__ or "").strip():
            yield from (" ".join(doc.split()), "")
        yield from table(name, field.annotation.model_fields)


def table(section: str, fields: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of a table of keys, with type, default and meaning."""
    yield "| key | type | default | meaning |"
    yield "|---|---|---|---|"
    for key, field in flat_fields(section, fields):
        name = f"{section}.{key}" if section else key
        kind, meaning = cell(type_of(field, "`")), cell(field.description or "")
        if name in NAMED:
            meaning += f" One of {', '.join(f'`{one}`' for one in NAMED[name]())}."
        yield f"| `{name}` | {kind} | {default_cell(field)} | {meaning} |"


def flat_fields(section: str, fields: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the keys of a section and of the tables within it, as `adapter.rank`."""
    from fastlt.config import is_section

    for key, field in fields.items():
        if is_section(field.annotation) and section:
            for inner, one in flat_fields(section, field.annotation.model_fields):
                yield f"{key}.{inner}", one
        else:
            yield key, field


def default_cell(field: Any) -> str:
    """Return the default of a key as code; what is none, in words."""
    words = default_of(field)
    return words if words in ("needed", "-") else cell(f"`{words}`")


def cell(text: str) -> str:
    """Return text that neither ends the cell of a table nor is taken for HTML."""
    parts = " ".join(text.split()).replace("|", "\\|").split("`")
    parts[::2] = [part.replace("<", "&lt;") for part in parts[::2]]
    return "`".join(parts)


# --- the commands


def commands() -> str:
    """Return the page of all commands, with their arguments and options."""
    from typer.main import get_command

    from fastlt.cli import app

    lines = [
        "# Commands",
        "",
        "Bad input ends a command with one sentence and exit code 2.",
    ]

    def describe(command: Any, path: str) -> None:
        if hasattr(command, "commands"):
            for name, inner in sorted(command.commands.items()):
                describe(inner, f"{path} {name}")
            return
        context = command.make_context(path, [], resilient_parsing=True)
        choices = choices_of(command.callback)
        usage = " ".join(command.collect_usage_pieces(context))
        lines.extend(["", f"## {path}", "", f"    {path} {usage}", "", unrolled(command.help), ""])
        lines.extend(["| | | default |", "|---|---|---|"])
        lines.extend(row for one in command.params if (row := option(one, choices)))

    describe(get_command(app), "fastlt")
    return "\n".join(lines) + "\n"


def option(one: Any, choices: dict[str, list[str]]) -> str | None:
    """Return the row of an argument or an option; None for those of every command."""
    if one.name == "help" or one.hidden:
        return None
    names = ", ".join(f"`{name}`" for name in one.opts) if one.opts[0].startswith("-") else ""
    name = names or f"`{one.metavar or one.name.upper()}`"
    default = "needed" if one.required else ""
    if not one.required and one.default not in (None, "", False, []):
        default = f"`{getattr(one.default, 'value', one.default)}`"
    among = ", ".join(f"`{choice}`" for choice in choices.get(one.name, []))
    text = (one.help or "") + (f" One of {among}." if among else "")
    return f"| {name} | {cell(text)} | {default} |"


def choices_of(function: Any) -> dict[str, list[str]]:
    """Return the values of each parameter whose type is an Enum."""
    found = {}
    for name, kind in get_type_hints(function).items():
        for each in (kind, *get_args(kind)):
            if isinstance(each, type) and issubclass(each, Enum):
                found[name] = [str(member.value) for member in each]
    return found


def unrolled(text: str | None) -> str:
    """Return a docstring with each paragraph on one line."""
    paragraphs = (text or "").split("\n\n")
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)


# --- parts of pages


def methods() -> str:
    """Return the table of methods and presets."""
    from fastlt.methods import listed_methods

    lines = ["| `--method` | kind | what it does | paper |", "|---|---|---|---|"]
    rows = [(f"`{one.name}`", *one[1:3], linked(one.paper)) for one in listed_methods()]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def losses() -> str:
    """Return the table of losses, with the keys that each brings."""
    from fastlt.config import Section
    from fastlt.losses import LOSSES

    lines = ["| `loss.name` | what it is | keys of its own |", "|---|---|---|"]
    for name, loss in LOSSES.items():
        has_own = loss.Numbers is not Section
        keys = ", ".join(f"`loss.{key}`" for key in loss.Numbers.model_fields) if has_own else ""
        first = unrolled(loss.__doc__).partition("\n\n")[0]
        lines.append(f"| `{name}` | {linked(cell(first))} | {keys} |")
    return "\n".join(lines)


def heads() -> str:
    """Return the table of heads."""
    from fastlt.models.heads import HEADS

    lines = ["| `model.head` | what it is |", "|---|---|"]
    for name, head in HEADS.items():
        first = unrolled(head.__doc__).partition("\n\n")[0]
        lines.append(f"| `{name}` | {linked(cell(first))} |")
    return "\n".join(lines)


def recipes() -> str:
    """Return the table of recipes."""
    from fastlt.config import load_config, recipe_names

    lines = ["| recipe | model | pixels | batch | epochs |", "|---|---|---|---|---|"]
    for name in recipe_names():
        config = load_config(name)
        model = f"{config.model.name}{', pretrained' if config.model.pretrained else ''}"
        shape = f"{config.data.size} | {config.data.batch} | {config.train.epochs}"
        lines.append(f"| `{name}` | {model} | {shape} |")
    return "\n".join(lines)


def moved() -> str:
    """Return the table of the modules that have moved."""
    from fastlt._moved import MOVED

    rows = [
        f"| `{old}` | {', '.join(f'`{place}`' for place in places.split())} |"
        for old, places in MOVED.items()
    ]
    return "\n".join(["| 0.1 | 0.2 |", "|---|---|", *rows])


def linked(text: str) -> str:
    """Return text with arXiv numbers as links."""
    return re.sub(r"arXiv (\d{4}\.\d{5})", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


PARTS: dict[str, Callable[[], str]] = {
    "key-types": key_types,
    "platforms": platforms,
    "methods": methods,
    "moved": moved,
    "losses": losses,
    "heads": heads,
    "recipes": recipes,
}
