"""The tables that commands print fit in 80 columns, and hold every figure whole."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastlt.classes import ClassSpace
from fastlt.cli import tables, training
from fastlt.evaluation.compare import compare
from fastlt.methods import listed_methods
from fastlt.sweep.run import show
from fastlt.sweep.spec import read_sweep
from fastlt.utils.run_files import FIGURES

WIDTH = 80
LONG = "a-name-that-is-as-long-as-those-of-some-dictionaries-with-all-synonyms"


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch) -> Console:
    found = Console(record=True, width=WIDTH)
    monkeypatch.setattr(tables, "console", found)
    monkeypatch.setattr(training, "console", found)
    return found


def figures_in(text: str) -> list[str]:
    return re.findall(r"(?<!\S)[+-]?\d+\.\d(?!\S)", text)


def result(value: float, **more: Any) -> dict[str, Any]:
    named = {"worst_class": {"name": LONG, "accuracy": value}, "mce": value, "pdc": 0.5}
    return dict.fromkeys(FIGURES, value) | named | more


def lines_of(console: Console) -> str:
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= WIDTH and "…" not in text
    return text


def test_eval_prints_the_last_and_the_best_epoch_whole(console: Console) -> None:
    tables.print_result(result(100.0, best={"epoch": 200, **result(88.8)}), LONG)
    text = lines_of(console)
    assert figures_in(text).count("100.0") >= 7 and figures_in(text).count("88.8") == 4
    assert "best, epoch 200" in text


def test_what_is_not_known_is_a_dash(console: Console) -> None:
    tables.print_result(result(100.0, few=None, harmonic_mean=None), "run")
    (row,) = (line for line in lines_of(console).splitlines() if "last epoch" in line)
    assert row.split()[2:] == ["100.0", "100.0", "100.0", "-", "100.0", "-", "100.0"]


def test_post_hoc_figures_stand_beside_their_strength(console: Console) -> None:
    more = {"images": 100_000, "chosen_on": 25_000}
    tables.print_post_hoc(
        {
            "as trained": result(100.0, **more),
            "logit-adjustment": result(100.0, strength=0.000123, **more),
        },
        LONG,
        None,
    )
    text = lines_of(console)
    assert figures_in(text).count("100.0") == 12 and "0.000123" in text.split()


def test_figures_of_classes_stand_beside_long_names(console: Console, tmp_path: Path) -> None:
    names = [f"{LONG}-{i}" for i in range(2)]
    ClassSpace(target_names=names, train_counts=[123_456, 9], val_counts=[1, 1]).save(
        tmp_path / "classes.json"
    )
    tables.print_classes({"per_class": [100.0, None], "confusion": [[0, 1, 12_345]]}, tmp_path)
    text = lines_of(console)
    assert {"123,456", "100.0"} <= set(text.split())
    start = next(line.index("training") for line in text.splitlines() if "training" in line)
    first = "".join(line[:start].strip() for line in text.splitlines())
    assert all(name in first for name in names)  # folded, and not cut


def test_compare_shows_every_figure_and_difference(tmp_path: Path) -> None:
    runs = []
    for number, value in enumerate((100.0, 0.0, 0.0, 0.0)):
        run = tmp_path / f"{LONG}{number}"
        run.mkdir()
        (run / "result.json").write_text(json.dumps(result(value, epochs=1000)))
        ClassSpace(target_names=["a"], train_counts=[1], val_counts=[1]).save(run / "classes.json")
        runs.append(run)
    console = Console(record=True, width=WIDTH)
    compare(runs, console)
    text = console.export_text().partition("no test of")[0]
    table = [line for line in text.splitlines() if "were evaluated" not in line]
    assert max(map(len, table)) <= WIDTH
    assert figures_in(text).count("100.0") == 7 and figures_in(text).count("-100.0") == 3 * 7
    assert text.split().count("1000") == 4


def test_methods_are_listed_with_whole_names_and_papers(console: Console) -> None:
    training.methods()
    words = lines_of(console).split()
    for name, *_, paper in listed_methods():
        assert name in words
        assert set(re.findall(r"\d{4}\.\d{5}", paper)) <= set(words)


def test_a_sweep_of_three_axes_shows_whole_figures(tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    axes = '"optim.weight_decay" = [1e-4, 2e-4]\nsilence = [0.1]\nneighbours = [16]'
    file.write_text(f'recipe = "demo"\n[axes]\n{axes}\nseed = [0, 1]\n')
    point = {"silence": 0.1, "neighbours": 16, "optim.weight_decay": 0.000123456}
    rows = [
        {"run": f"r{i}", "status": "finished", **point, **dict.fromkeys(FIGURES, value)}
        for i, value in enumerate((100.0, 80.0))
    ]
    console = Console(record=True, width=WIDTH)
    show(rows, read_sweep(file), console)
    text = lines_of(console)
    assert text.count("90.0 ± 14.1") == 4
    assert "0.000123456" in re.sub(r",", " ", text).split()
