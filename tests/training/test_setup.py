"""What of an epoch the configuration decides: budgets, sizes, and what is refused before the first
step.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from fastlt.classes import ClassSpace
from fastlt.config import DataConfig, load_config
from fastlt.errors import UserError
from fastlt.packing.reader import open_pack
from fastlt.packing.subset import subset
from fastlt.training.loop import train
from fastlt.training.messages import notes
from fastlt.training.setup import budgets_of, build_plan, prepare, size_at
from fastlt.utils.pool import cores

QUIET = Console(quiet=True)
SMALL = [
    "model.name=resnet8",
    "data.size=16",
    "data.batch=16",
    "data.padding=2",
    "data.workers=0",
    "train.threads=1",
]


def config_of(pack, *settings):
    return load_config(
        "cifar100-siblings", [*SMALL, f"data.pack={json.dumps(str(pack))}", *settings]
    )


def test_images_grow_over_the_ramp():
    data = DataConfig(size=192, start_size=160, ramp=(2, 6))
    assert [size_at(data, epoch) for epoch in (0, 2, 3, 4, 5, 6, 9)] == [
        160,
        160,
        160,
        192,
        192,
        192,
        192,
    ]
    small = DataConfig(size=32, start_size=18, ramp=(0, 4))
    assert [size_at(small, epoch) for epoch in range(6)] == [18, 20, 24, 28, 32, 32]
    assert size_at(DataConfig(size=40), 3) == 40


def test_budgets_by_name_and_by_ratio(small_pack):
    space = open_pack(small_pack).space
    assert budgets_of(DataConfig(), space) == (50, 50)
    assert budgets_of(DataConfig(budget=9, budgets={"y": 4}), space) == (9, 4)
    # half of 21 targets, rounded to the even
    assert budgets_of(DataConfig(auxiliary_ratio=0.5), space) == (
        5,
        5,
    )
    assert budgets_of(DataConfig(auxiliary=False, auxiliary_ratio=2), space.targets_only()) == ()
    with pytest.raises(UserError, match=r"data\.budgets names 'z'"):
        budgets_of(DataConfig(budgets={"z": 4}), space)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [((101, 60), 60), ((100, 300), 100), ((21, 20), 50), ((21, 90), 21), ((500, 101), 50)],
)
def test_budgets_by_the_anchor_are_the_releases(counts, expected):
    """The rarest of several anchors counts; a few-shot anchor and none at all give the budget."""
    space = ClassSpace(
        target_names=["a", "b", "c"],
        auxiliary_names=["x", "y", "z"],
        train_counts=[*counts, 5, 9, 9, 9],
        val_counts=[1, 1, 1],
        pairs=[(0, 3), (1, 3), (2, 4)],
    )
    assert budgets_of(DataConfig(budget_by="anchor"), space) == (expected, 50, 50)
    named = DataConfig(budget_by="anchor", budgets={"x": 3})
    assert budgets_of(named, space) == (3, 50, 50)


def test_budgets_by_the_anchor_follow_the_groups():
    """Thresholds move who is medium; of thirds, it is the one in the middle."""
    space = ClassSpace(
        target_names=["a", "b", "c"],
        auxiliary_names=["x", "y", "z"],
        train_counts=[300, 15, 9, 7, 7, 7],
        val_counts=[1, 1, 1],
        pairs=[(0, 3), (1, 4), (2, 5)],
    )
    moved = DataConfig(budget_by="anchor", many_images=300, few_images=15)
    assert budgets_of(moved, space) == (300, 50, 50)
    thirds = DataConfig(budget_by="anchor", groups="thirds")
    assert budgets_of(thirds, space) == (50, 15, 50)


@pytest.mark.parametrize(
    "settings",
    [["data.auxiliary_ratio=1.5"], ["data.budgets={x = 3}"], ["data.target_sampling=square-root"]],
)
def test_the_prior_counts_what_an_epoch_holds(small_pack, settings):
    pack, config = open_pack(small_pack), config_of(small_pack, *settings)
    plan = build_plan(config, *subset(pack, config.data, 0))
    seen = np.bincount(open_pack(small_pack).train.label[plan.order(4)], minlength=5)
    assert seen.tolist() == plan.class_counts.tolist()


def test_a_run_whose_images_grow_resumes_at_its_size(small_pack, tmp_path):
    settings = ["data.start_size=8", "data.ramp=[0, 2]", "train.epochs=3", "data.repeats=2"]
    whole = train(config_of(small_pack, *settings), tmp_path / "whole", QUIET)
    parts = tmp_path / "parts"
    train(config_of(small_pack, *settings), parts, QUIET)
    newest = sorted((parts / "checkpoints").iterdir())[-1]
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()
    (parts / "result.json").unlink()
    again = train(config_of(small_pack, *settings), parts, QUIET)
    assert again["per_class"] == whole["per_class"]
    assert (tmp_path / "whole/val_predictions.npz").read_bytes() == (
        parts / "val_predictions.npz"
    ).read_bytes()


def test_a_model_of_one_size_is_refused(small_pack, tmp_path, monkeypatch):
    config = config_of(small_pack, "data.start_size=8", "data.ramp=[0, 2]")

    def only_16(self, images):
        assert images.shape[-1] == 16, "Input height (8) doesn't match model (16)."

    monkeypatch.setattr("fastlt.models.classifier.Classifier.forward", only_16)
    with pytest.raises(UserError, match=r"does not take images of 8 pixels \(Input height"):
        prepare(config, tmp_path, open_pack(small_pack))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["data.start_size=20"], "more than data.size=16"),
        (["data.start_size=8"], "needs data.ramp"),
        (["data.auxiliary_ratio=1", "data.budgets={x = 3}"], "exclude each other"),
    ],
)
def test_what_does_not_go_together_is_refused(small_pack, settings, said):
    with pytest.raises(UserError, match=said):
        config_of(small_pack, *settings)


def test_a_split_without_auxiliary_images_has_no_budget(small_pack):
    pack = open_pack(small_pack)
    kept = pack.train.label < 3
    columns = {
        name: getattr(pack.train, name)[kept]
        for name in ("shard", "offset", "size", "label", "height", "width")
    }
    plan = build_plan(
        config_of(small_pack, "data.budget=7"),
        replace(pack, train=replace(pack.train, **columns)),
        pack.space,
    )
    assert plan.class_counts.tolist() == [12, 6, 3, 0, 0]


def test_more_workers_than_cores_are_worth_a_word(small_pack):
    assert list(notes(config_of(small_pack, "train.epochs=2", f"data.workers={cores()}"))) == []
    (said,) = notes(config_of(small_pack, "train.epochs=2", f"data.workers={cores() + 1}"))
    assert f"data.workers={cores() + 1}, but there are {cores()} cores" in said
