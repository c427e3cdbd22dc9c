"""No page says what is not so: its code runs, its commands, settings and links exist."""

import functools
import importlib.util
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.doc_pages import (
    ROOT,
    blocks,
    commands,
    given,
    named_in_text,
    pages,
    run_block,
)
from PIL import Image
from typer.main import get_command

import fastlt
from fastlt import config, losses, methods
from fastlt.cli import app
from fastlt.config import config_type, load_config, setting_names
from fastlt.curate.settings import CurateConfig
from fastlt.data.engines import choice
from fastlt.models import heads
from fastlt.sweep.spec import read_sweep

PAGES = {str(page.relative_to(ROOT)): page for page in pages()}
WITH_CODE = [name for name, page in PAGES.items() if any(block.is_run for block in blocks(page))]
CLASSES = {
    "target": {"otter": 12, "fox": 8, "heron": 4},
    "auxiliary": {"weasel": 8, "mink": 8, "jackal": 8, "egret": 8},
    "val": {"otter": 4, "fox": 4, "heron": 4},
    "test": {"otter": 4, "fox": 4, "heron": 4},
    ".": {"new": 3},
}
PAIRS = "target,auxiliary\notter,weasel\notter,mink\nfox,jackal\nheron,egret\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The folders that pages start from: photos, new, pack and run."""
    root = tmp_path_factory.mktemp("pages")
    rng = np.random.default_rng(0)
    for split, classes in CLASSES.items():
        for name, count in classes.items():
            folder = root / (split if split == "." else f"photos/{split}") / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 256, (60 + 4 * number, 64, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.jpg")
    photos = root / "photos"
    (photos / "pairs.csv").write_text(PAIRS)
    images = {split: photos / split for split in ("target", "auxiliary", "val", "test")}
    fastlt.pack(**images, pairs=photos / "pairs.csv", out=root / "pack", quiet=True)
    short = {"train.epochs": 1, "data.workers": 0}
    fastlt.train("demo", data=root / "pack", out=root / "run", settings=short, quiet=True)
    return root


@pytest.fixture
def restored(monkeypatch):
    """Losses, heads, engines and methods that pages add are forgotten afterwards."""
    for table in (losses.LOSSES, heads.HEADS):
        for name in table:
            monkeypatch.setitem(table, name, table[name])
    before = dict(losses.LOSSES), dict(heads.HEADS)
    monkeypatch.setattr(choice, "ENGINES", choice.ENGINES)
    monkeypatch.setattr(choice, "NAMES", choice.NAMES)
    monkeypatch.setattr(methods, "method_names", methods.method_names)
    caches = (losses.section, heads.section, methods.section, methods.method_type)
    for cached in (*caches, config.config_type):
        cached.cache_clear()
    yield monkeypatch
    for table, kept in zip((losses.LOSSES, heads.HEADS), before, strict=True):
        table.clear()
        table.update(kept)
    for cached in (*caches, config.config_type):
        cached.cache_clear()


# each of these trains many times; the README and others do so, too
LONG = {f"docs/how-to/{name}.md" for name in ("fit", "train", "evaluate", "fine-tune")}
LONG.add("docs/tutorial.md")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in LONG else name for name in WITH_CODE],
)
def test_the_code_of_a_page_runs(name, data, tmp_path, restored):
    page = PAGES[name]
    restored.chdir(tmp_path)
    for folder in given(page):
        shutil.copytree(data / folder, tmp_path / folder)
    for block in blocks(page):
        if "file" in block.notes:
            Path(block.notes["file"]).write_text(block.text)
        elif block.is_run:
            run_block(block, restored)


@pytest.mark.parametrize("name", PAGES)
def test_commands_of_a_page_exist(name):
    page = PAGES[name]
    for block in blocks(page):
        assert block.language in ("bash", "python", "toml", "bibtex"), f"{name}:{block.line}"
        assert block.notes.get("not run", "reason").strip()
        if block.language == "bash":
            for words in commands(block):
                check_command(words, f"{name}:{block.line}")
    for words in named_in_text(page):
        check_named(words, name)


@pytest.mark.parametrize("name", PAGES)
def test_settings_of_a_page_exist(name):
    known = known_settings()
    known |= {"method.NAME", "loss.epsilon", "resources.retries", "search.kind", *config.OLD_KEYS}
    sections = {key.partition(".")[0] for key in known}
    text = PAGES[name].read_text(encoding="utf-8")
    for key in re.findall(r"[`\s]([a-z]+\.[a-z_0-9]+)(?==|`)", text):
        section, _, rest = key.partition(".")
        if section in sections and rest not in ("toml", "py", "onnx", "safetensors"):
            assert key in known, f"{name}: {key}"


@pytest.mark.parametrize("name", PAGES)
def test_toml_of_a_page_is_valid(name, tmp_path):
    for block in blocks(PAGES[name]):
        if block.language == "toml":
            file = tmp_path / block.notes["file"]
            file.write_text(block.text)
            read_sweep(file) if "[axes]" in block.text else load_config(str(file))


@pytest.mark.parametrize("name", [name for name in PAGES if not name.startswith("docs/")])
def test_links_between_files_lead_on(name):
    text = PAGES[name].read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#\s]+)", text) + re.findall(r'src="([^"]+)"', text):
        if not link.startswith("http"):
            assert (PAGES[name].parent / link).exists(), f"{name}: {link}"


@pytest.mark.parametrize("name", PAGES)
def test_extras_of_a_page_exist(name):
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for extras in re.findall(
        r"(?:fastlt|\.)\[([a-z,]+)\]", PAGES[name].read_text(encoding="utf-8")
    ):
        for extra in extras.split(","):
            assert re.search(rf"^{extra} = \[", project, re.MULTILINE), f"{name}: {extra}"


@functools.cache
def whole_command() -> Any:
    """Return the command line of fastlt."""
    return get_command(app)


@functools.cache
def known_settings() -> frozenset[str]:
    """Return all settings of trainings, of every method, and of curation."""
    known = {*setting_names(), *setting_names(CurateConfig)}
    for method in methods.method_names():
        known |= set(setting_names(config_type(method)))
    return frozenset(known)


def check_command(words: list[str], where: str) -> None:
    """Assert that a command exists, with its options."""
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets, where
    elif words[:2] == ["python", "-m"]:
        assert find_spec(words[2]), where
    elif words[0] == "torchrun":
        parse(words[words.index("fastlt") + 1 :], where)
    elif words[0] == "fastlt":
        parse([word for word in words[1:] if word != "..."], where)


def parse(words: list[str], where: str) -> None:
    """Assert that fastlt takes these words."""
    command = whole_command()
    if words[0] in ("--help", "--version"):
        return
    while hasattr(command, "commands"):
        assert words[0] in command.commands, f"{where}: there is no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    context = command.make_context(where, [*words])  # raises where an option does not exist
    given_settings = [word for word in context.params.get("settings") or () if "=" in word]
    for setting in given_settings:
        assert setting.partition("=")[0] in known_settings(), f"{where}: {setting}"


def check_named(words: list[str], where: str) -> None:
    """Assert that a command that a text names exists, and its options."""
    command = whole_command()
    words = words[1:]
    while hasattr(command, "commands") and words and words[0] in command.commands:
        command, words = command.commands[words[0]], words[1:]
    if words and words[0] in ("...", "--version", "--help"):
        return
    assert not hasattr(command, "commands") or not words, f"{where}: fastlt {words[0]}"
    options = {option for one in command.params for option in one.opts}
    for word in words:
        assert not word.startswith("--") or word in options, f"{where}: {word}"


def hooks():
    """Return the module that makes pages from the code."""
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_holds_every_setting_and_command():
    pytest.importorskip("mkdocs")
    made = hooks()
    configuration, commands_page = made.configuration(), made.commands()
    for name in (*setting_names(), *setting_names(CurateConfig)):
        assert f"| `{name}` |" in configuration
    assert "| `method.teacher` |" in configuration
    empty = [line for line in configuration.splitlines() if re.search(r"\|\s*\|$", line)]
    assert not empty, "keys without a docstring"
    for name in ("pack", "train", "curate filter", "granularity score", "methods"):
        assert f"## fastlt {name}\n" in commands_page
    for name in (*methods.PRESETS, *methods.method_names()):
        assert f"| `{name}` |" in made.methods()


@pytest.mark.slow
def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path, monkeypatch):
    pytest.importorskip("mkdocs")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config as read_site

    monkeypatch.chdir(ROOT)
    build(read_site(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path)))
    made = list(tmp_path.rglob("*.html"))
    assert len(made) > 20
    for page in made:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r'<(?:script|img|iframe)[^>]*src="([^"]+)"', text)
        loaded += re.findall(
            r'<link[^>]*rel="(?:stylesheet|preconnect|icon)"[^>]*href="([^"]+)"', text
        )
        assert not [one for one in loaded if one.startswith(("http", "//"))], page


@pytest.mark.parametrize("name", WITH_CODE)
def test_modules_of_pages_pass_lint_as_ours_do(name, tmp_path):
    for block in blocks(PAGES[name]):
        if "module" in block.notes:
            command = [
                sys.executable,
                "-m",
                "ruff",
                "check",
                "--config",
                str(ROOT / "pyproject.toml"),
                "--stdin-filename",
            ]
            command += [block.notes["module"].replace(".", "/") + ".py", "-"]
            ended = subprocess.run(command, input=block.text, capture_output=True, text=True)
            assert ended.returncode == 0, ended.stdout
