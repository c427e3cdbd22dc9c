"""What is trained beside a long tail: which classes, how many images, and what is reported."""

import csv
import json

import numpy as np
import pytest
from rich.console import Console

from fastlt.config import load_config
from fastlt.errors import UserError
from fastlt.packing.reader import open_pack
from fastlt.studies.companions import controls_of, draw_companions, run_related_study
from fastlt.studies.granularity_training import StudyOptions

FAMILIES = {f"p{p}": [f"c{4 * p + k:02}" for k in range(4)] for p in range(4)}
SMALL = ["train.epochs=2", "data.size=16", "data.batch=8", "model.name=resnet8", "data.budget=4"]


def options_of(study, out):
    return StudyOptions(str(study / "pack"), str(study / "h.csv"), out, 1, 1, 6, SMALL)


@pytest.mark.parametrize("seed", range(5))
def test_companions_are_siblings_strangers_or_half_of_either(study, seed):
    drawn = draw_companions(open_pack(study / "pack"), FAMILIES, np.random.default_rng(seed))
    own = [target // 4 for target in drawn.targets]
    assert len(set(own)) == 2
    assert drawn.beside["alone, as many images"] == []
    related, half, unrelated = (
        drawn.beside[level] for level in ("related", "half related", "unrelated")
    )
    assert len(related) == len(half) == len(unrelated) == 6
    for level in (related, half, unrelated):
        classes = [one for _, one in level]
        assert len(set(classes)) == 6 and not set(classes) & set(drawn.targets)
        # a class has a target beside it exactly where that is its sibling
        assert all(
            own[place] == one // 4 if place >= 0 else one // 4 not in own for place, one in level
        )
    assert [sum(place >= 0 for place, _ in level) for level in (related, half, unrelated)] == [
        6,
        2,
        0,
    ]


def test_packs_have_one_long_tail_and_trainings_as_many_images(study, tmp_path):
    pack = open_pack(study / "pack")
    controls = controls_of(pack, options_of(study, tmp_path / "out"))
    assert len(controls) == 4
    images, tails = set(), set()
    for name, control in controls.items():
        made = open_pack(control.pack)
        assert made.space.train_counts[:2] == [12, 2]
        assert all(count == 12 for count in made.space.train_counts[2:])
        assert all(len(made.train.read(i)) for i in range(len(made.train)))
        of_targets = np.flatnonzero(made.train.label < 2)
        tails.add((*made.space.target_names, *made.train.offset[of_targets].tolist()))
        config = load_config("cifar100-siblings", control.settings)
        an_epoch = 14 + 4 * made.space.num_auxiliaries
        images.add(config.train.epochs * an_epoch)
        assert made.space.num_auxiliaries == (0 if name.startswith("alone") else 6)
    assert len(tails) == 1
    assert max(images) - min(images) <= 14  # to a whole epoch


@pytest.mark.usefixtures("in_process")
@pytest.mark.slow
def test_the_study_is_reported_in_two_stages_and_goes_on(study, tmp_path):
    console = Console(record=True, width=160)
    options = options_of(study, tmp_path / "out")
    run_related_study(options, tmp_path / "r.csv", console)
    said = console.export_text()
    assert "half related" in said and "trained by balanced cross entropy" in said
    with (tmp_path / "r.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["control"] for row in rows] == [
        "alone, as many images",
        "related",
        "half related",
        "unrelated",
    ]
    kept = sorted((tmp_path / "out").glob("*/retrained.json"))
    figures = [json.loads(path.read_text())["retrain"]["top1"] for path in kept]
    assert sorted(float(row["retrained_top1"]) for row in rows) == sorted(figures)
    made = [path.stat().st_mtime_ns for path in kept]
    run_related_study(options, None, console)
    assert [path.stat().st_mtime_ns for path in kept] == made
    with pytest.raises(UserError, match="holds a study with another imbalance"):
        run_related_study(options._replace(imbalance=2), None, console)


def test_too_few_families_are_refused(study):
    with pytest.raises(UserError, match="has 3 parents of two classes or more"):
        few = dict(list(FAMILIES.items())[:3])
        draw_companions(open_pack(study / "pack"), few, np.random.default_rng(0))
