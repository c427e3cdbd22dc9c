"""The code of the documentation's pages: found, and carried out as a reader would."""

import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
NOTE = re.compile(r"<!-- ([a-z ]+): (.+) -->")
FENCE = re.compile(r"^```(\w*)$")


class Block(NamedTuple):
    """A fenced block of a page."""

    line: int
    language: str
    text: str
    notes: dict[str, str]  # of the HTML comments right above: not run, module, file

    @property
    def is_run(self) -> bool:
        return self.language in ("bash", "python") and "not run" not in self.notes


def pages() -> list[Path]:
    """Return the README and the pages of the documentation."""
    top = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
    return [*top, *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page."""
    found: list[Block] = []
    notes: dict[str, str] = {}
    inside: list[str] | None = None
    language, first = "", 0
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if inside is not None:
            if line == "```":
                found.append(Block(first, language, "\n".join(inside) + "\n", notes))
                inside, notes = None, {}
            else:
                inside.append(line)
        elif fence := FENCE.match(line):
            inside, language, first = [], fence[1], number
        elif note := NOTE.match(line):
            notes = {**notes, note[1]: note[2]}
        else:
            notes = {}
    assert inside is None, f"{page}: a block does not end"
    return found


def given(page: Path) -> list[str]:
    """Return what a page starts from."""
    text = page.read_text(encoding="utf-8")
    return [name for note in NOTE.findall(text) if note[0] == "given" for name in note[1].split()]


def commands(block: Block) -> Iterator[list[str]]:
    """Yield the words of each command of a block of bash."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def named_in_text(page: Path) -> Iterator[list[str]]:
    """Yield the words of each `fastlt ...` that the text of a page names."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for found in re.findall(r"`(fastlt [^`]+)`", text):
        yield found.split()


def run_block(block: Block, context: Any) -> None:
    """Run a block in the working folder; `fastlt` within this process, which saves its start."""
    if block.language == "python":
        if "module" in block.notes:
            add_module(block.notes["module"], block.text, context)
            return
        exec(compile(block.text, f"line {block.line}", "exec"), {"__name__": "__main__"})
        return
    for words in commands(block):
        if words[0] == "fastlt":
            run_fastlt(words[1:])
        else:
            subprocess.run(words, check=True, capture_output=True)


def run_fastlt(words: list[str]) -> None:
    """Run a command line of fastlt."""
    from typer.testing import CliRunner

    from fastlt.cli import app

    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert done.exit_code == 0, done.output


def add_module(place: str, source: str, context: Any) -> None:
    """Make a method or an engine of the source, as if it were the file of that module."""
    module = types.ModuleType(place)
    exec(compile(source, place, "exec"), vars(module))
    context.setitem(sys.modules, place, module)
    (add_method if place.startswith("fastlt.methods.") else add_engine)(module, context)


def add_method(module: types.ModuleType, context: Any) -> None:
    """Let the method of a module be found."""
    from fastlt import methods

    name = module.__name__.rpartition(".")[2].replace("_", "-")
    names = [*methods.method_names(), name]
    context.setattr(methods, "method_names", lambda: names)


def add_engine(module: types.ModuleType, context: Any) -> None:
    """Let the engine of a module be found."""
    from fastlt.data.engines import choice

    (engine,) = (one for one in vars(module).values() if hasattr(one, "obstacle"))
    context.setattr(choice, "ENGINES", (*choice.ENGINES, engine))
    context.setattr(choice, "NAMES", (*choice.NAMES, engine.name))
