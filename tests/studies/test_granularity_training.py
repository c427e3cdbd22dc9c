"""The study of granularity: which sets are trained on, and what is reported of them."""

import csv
import json

import numpy as np
import pytest
from rich.console import Console

from fastlt.errors import UserError
from fastlt.packing.reader import open_pack
from fastlt.studies.granularity_training import (
    StudyOptions,
    levels,
    most_images,
    packs_of,
    run_granularity_study,
    spread_evenly,
    tail_counts,
)


def families():
    return {f"p{p}": [f"c{4 * p + k:02}" for k in range(4)] for p in range(4)}


def test_levels_have_as_many_classes_or_the_same_parents(study):
    found = {
        level.name: level.classes
        for level in levels(open_pack(study / "pack"), families(), np.random.default_rng(0))
    }
    fixed = [len(classes) for name, classes in found.items() if name.startswith("fixed classes")]
    assert fixed == [4, 4, 4, 4]  # parents; 1, 2 and 4 of a parent
    for part in (1, 2, 4):
        of = [int(name[1:]) // 4 for name in found[f"fixed classes: {part} of a parent"]]
        assert all(of.count(parent) == part for parent in of)
    few, fine = found["fixed parents: parents"], found["fixed parents: children"]
    assert sorted(t for targets in few.values() for t in targets) == sorted(
        t for targets in fine.values() for t in targets
    )
    with pytest.raises(UserError, match="has 1 parents of two classes or more: the study needs 4"):
        levels(open_pack(study / "pack"), {"one": families()["p0"]}, np.random.default_rng(0))


def test_both_sets_have_as_many_images(study, tmp_path):
    tail = tail_counts(2293, 100, 20)
    assert (
        sum(tail) == 2293
        and tail == sorted(tail, reverse=True)
        and tail[0] / tail[-1] == pytest.approx(100, rel=0.05)
    )
    assert tail_counts(6, 100, 4) == [3, 1, 1, 1]
    assert spread_evenly(10, 4) == [3, 3, 2, 2]
    pack = open_pack(study / "pack")
    options = StudyOptions(str(study / "pack"), str(study / "h.csv"), tmp_path, 1, 1, 6, [])
    found = levels(pack, families(), np.random.default_rng(0))
    total = min(most_images(pack, level, 6) for level in found)
    # a single class has 12 images at most
    assert total == int(12 * (1 + 6 ** (-1 / 3) + 6 ** (-2 / 3) + 1 / 6))
    for level in found:
        made = {
            kind: open_pack(place)
            for kind, place in packs_of(pack, level, 0, total, options).items()
        }
        assert {len(each.train) for each in made.values()} == {total}
        counts = made["long-tailed"].space.train_counts
        assert max(counts) / min(counts) == pytest.approx(6, rel=0.35)
        assert np.ptp(made["balanced"].space.train_counts) <= 1
        assert made["balanced"].space.val_counts == [
            2 * len(targets) for targets in level.classes.values()
        ]


@pytest.mark.usefixtures("in_process")
@pytest.mark.slow
def test_the_whole_study_is_reported_and_kept(study, tmp_path):
    console = Console(record=True, width=160)
    settings = ["train.epochs=1", "data.size=16", "data.batch=8", "model.name=resnet8"]
    options = StudyOptions(
        str(study / "pack"), str(study / "h.csv"), tmp_path / "out", 1, 1, 6, settings
    )
    run_granularity_study(options, tmp_path / "g.csv", console)
    said = console.export_text()
    assert "the number of classes fixed" in said and "4 of a parent" in said and "children" in said
    with (tmp_path / "g.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 and {row["kind"] for row in rows} == {"balanced", "long-tailed"}
    one = next(path for path in (tmp_path / "out").glob("*/result.json"))
    assert json.loads(one.read_text())["epochs"] == 1
    with pytest.raises(UserError, match="holds other things than a study"):
        run_granularity_study(options._replace(out=study / "pack"), None, console)
    with pytest.raises(UserError, match="holds a study with another imbalance"):
        run_granularity_study(options._replace(imbalance=3), None, console)


def test_too_few_images_are_refused(study, tmp_path):
    options = StudyOptions(
        str(study / "pack"), str(study / "h.csv"), tmp_path / "out", 1, 1, 1e9, []
    )
    with pytest.raises(
        UserError,
        match="has too few images: a long tail of 8 classes would have 12 training images",
    ) as error:
        run_granularity_study(options, None, Console(quiet=True))
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("in_process")
def test_two_stages_judge_the_backbones_by_a_new_classifier(study, tmp_path):
    console = Console(record=True, width=200)
    settings = ["train.epochs=1", "data.size=16", "data.batch=8", "model.name=resnet8"]
    options = StudyOptions(
        str(study / "pack"), str(study / "h.csv"), tmp_path / "out", 1, 1, 6, settings, True
    )
    run_granularity_study(options, tmp_path / "g.csv", console)
    assert "trained by balanced cross entropy" in console.export_text()
    with (tmp_path / "g.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert all(0 <= float(row["retrained_top1"]) <= 100 for row in rows)
    assert len(list((tmp_path / "out").glob("*/retrained.json"))) == 12
