"""The study of auxiliary classes: its rows, its packs, and the differences that its plan names."""

import csv

import pytest
from helpers.method_cases import QUIET
from rich.console import Console

from fastlt.config import load_config
from fastlt.errors import UserError
from fastlt.packing.reader import open_pack
from fastlt.studies.auxiliaries import (
    TASKS,
    control_of,
    differences,
    family_of,
    rows_of,
    run_task,
)
from fastlt.studies.auxiliary_kinds import KINDS, NONE
from fastlt.studies.protocol import ReproduceOptions
from fastlt.studies.reproduce import run_reproduce


def options(source, out, *settings, **more):
    return ReproduceOptions(source, out, more.pop("epochs", 0), 1, 1, list(settings), **more)


@pytest.mark.parametrize("name", TASKS)
def test_every_row_fits_together_and_changes_what_it_says(name, tmp_path):
    rows = rows_of(name, options("", tmp_path))
    task = TASKS[name]
    assert list(rows)[: len(KINDS)] == [f"base | {kind}" for kind in KINDS]
    base = load_config(task.recipe, [*task.settings, *rows["base | silenced 0.1"].settings])
    assert base.loss.silence == 0.1 and base.loss.tau == 1
    for row in rows.values():
        load_config(task.recipe, [*task.settings, *row.settings])

    def changed(row):
        return load_config(task.recipe, [*task.settings, *rows[row].settings])

    assert changed("tau 0 | hard mask").loss.tau == changed("tau 0 | hard mask").loss.silence == 0
    assert changed(f"tau 0 | {NONE}").loss.name == "ce"
    assert changed("silence | 0.03").loss.silence == 0.03
    assert changed("a target | 1").data.neighbours == 1
    assert changed("images | 10").data.budget == 10
    assert rows["overlap | 0.3"].overlap == 0.3
    if task.lengths:
        assert rows["length 40 | hard mask"].epochs == 40
    if task.has_test:
        assert changed("head | random").data.features == "cache"


@pytest.mark.slow
def test_packs_and_lengths_of_rows(shared_data, tmp_path):
    if not (shared_data / "grocery" / "task.csv").is_file():
        pytest.skip("the grocery photographs are not here")
    wanted = options(f"grocery:{shared_data / 'grocery'}", tmp_path)
    rows = rows_of("grocery", wanted)
    none = control_of("grocery", rows[f"base | {NONE}"], wanted)
    dirty = control_of("grocery", rows["overlap | 0.1"], wanted)
    assert none.pack.name == "pack-none" and dirty.pack.name == "pack-siblings-overlap-0.1"
    space = open_pack(str(dirty.pack)).space
    targets = sum(space.train_counts[:23])
    assert f"train.epochs={round(30 * (targets + 27 * 25) / targets)}" in none.settings
    assert "train.epochs=30" in dirty.settings


def rows_with(tops):
    return [
        {"control": name, "seed": seed, "top1": top}
        for name, values in tops.items()
        for seed, top in enumerate(values)
    ]


def test_differences_are_those_of_the_plan():
    rows = rows_with(
        {
            f"base | {NONE}": (50, 51, 52),
            "base | neighbours": (55, 57, 56),
            "base | silenced 0.1": (58, 58, 60),
            "length 40 | neighbours": (50, 50, 50),
            "length 40 | silenced 0.1": (50, 51, 49),
            "images | 10": (57, 58, 56),
        }
    )
    found = family_of(rows)
    assert list(found) == [
        f"base | neighbours - {NONE}",
        "base | silenced 0.1 - neighbours",
        "length 40 | silenced 0.1 - neighbours",
        "images | 10 - base | silenced 0.1",
    ]
    assert found["base | silenced 0.1 - neighbours"].mean == pytest.approx(8 / 3)
    said = Console(record=True, width=160)
    said.print(differences(rows))
    text = said.export_text()
    assert "+5.0" in text and "length 40" in text


def test_rows_are_picked_by_their_names(tmp_path):
    with pytest.raises(UserError, match="--only nothing matches none of: base"):
        run_task("grocery", options("grocery:x", tmp_path, only=("nothing",)), QUIET)


@pytest.mark.slow
def test_rows_are_trained_and_kept(shared_data, tmp_path):
    small = ["model.name=resnet8", "data.size=16", "data.padding=2", "train.eval_every=1"]
    source = f"cifar100:{shared_data / 'cifar100'}"
    only = ("base | silenced*", "base | hard*")
    wanted = options(source, tmp_path / "runs", *small, epochs=1, only=only)
    run_reproduce("cifar100-deep", wanted, tmp_path / "rows.csv", QUIET)
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    assert {row["task"] for row in rows} == {"cifar100-deep"}
    assert [row["control"] for row in rows] == ["base | silenced 0.1", "base | hard mask"]
