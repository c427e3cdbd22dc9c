"""SWEEP.toml, its points, and which of them are one run."""

import pytest

from fastlt.errors import UserError
from fastlt.sweep.spec import read_sweep
from fastlt.sweep.trial import check_axes, make_trial, points


@pytest.fixture
def sweep(tmp_path):
    def read(text):
        (tmp_path / "sweep.toml").write_text(text)
        return read_sweep(tmp_path / "sweep.toml")

    return read


def test_a_grid_is_every_combination(sweep):
    found = sweep(
        'recipe = "demo"\n[settings]\ntrain.epochs = 2\n[axes]\nsilence = [1, 0.1]\noptim.lr = '
        "[0.1, 0.2, 0.3]\nseed = [0, 1]"
    )
    assert found.settings == {"train.epochs": 2} and list(found.axes) == [
        "silence",
        "optim.lr",
        "seed",
    ]
    values = points(found)
    assert len(values) == 12 and values[0] == {"silence": 1, "optim.lr": 0.1, "seed": 0}
    trial = make_trial(found, "pack", values[-1], ["train.epochs=3"])
    assert (
        trial.config.loss.silence,
        trial.config.optim.lr,
        trial.seed,
        trial.config.train.epochs,
    ) == (0.1, 0.3, 1, 3)
    assert trial.name == "silence=0.1,lr=0.3,seed=1" and trial.config.data.pack == "pack"


def test_numbers_of_adapters_are_axes(sweep):
    found = sweep(
        'recipe = "demo"\n[settings]\nmodel.adapt = "lora"\n[axes]\nmodel.adapter.rank = [2, 8]\n'
        '"model.adapter.alpha" = [0, 1]\nloss.silence = {low = 0.1, high = 1}\n'
        '[search]\nkind = "random"\ntrials = 3'
    )
    assert list(found.axes)[:2] == ["model.adapter.rank", "model.adapter.alpha"]
    values = {"model.adapter.rank": 8, "model.adapter.alpha": 1, "loss.silence": 0.5}
    trial = make_trial(found, "pack", values)
    assert trial.config.model.adapter.rank == 8 and trial.config.model.adapter.alpha == 1


def test_what_makes_no_difference_is_one_run(sweep):
    found = sweep(
        'recipe = "demo"\n[axes]\nsilence = [1, 0.1]\nneighbours = [0, 1]\nimages = [5, 9]'
    )
    trials = [make_trial(found, "pack", values) for values in points(found)]
    keys = {trial.key for trial in trials}
    # without neighbours silence and images do not matter
    assert len(trials) == 8 and len(keys) == 5
    of = {trial.name: trial.key for trial in trials}
    assert of["silence=1,neighbours=0,images=5"] == of["silence=0.1,neighbours=0,images=9"]
    # or it would be refused
    assert all(
        trial.config.loss.silence == 1 for trial in trials if trial.values["neighbours"] == 0
    )
    more = sweep(
        'recipe = "demo"\n[axes]\ncontrol = ["none", "random", "neighbours"]\nsilence = [0, 0.5]'
    )
    assert len({make_trial(more, "pack", values).key for values in points(more)}) == 5


def test_folders_differ_where_short_names_do_not(sweep):
    found = sweep(
        'recipe = "demo"\n[axes]\npack = ["a/pack", "b/pack"]\noptim.lr = [0.1, 0.10000001]'
    )
    names = [make_trial(found, "pack", values).name for values in points(found)]
    assert len(set(names)) == 4 and all("pack=pack,lr=0.1-" in name for name in names)


def test_a_random_search_draws_within_its_ranges_and_the_same_again(sweep):
    axes = (
        "silence = [0, 1]\noptim.lr = {low = 0.01, high = 1.0, log = true}\nimages = {low = 1, "
        "high = 3, whole = true}"
    )
    text = f'recipe = "demo"\n[axes]\n{axes}\n'
    found = sweep(text + '[search]\nkind = "random"\ntrials = 30')
    values = points(found)
    assert values == points(found) and len(values) == 30
    assert all(
        0.01 <= v["optim.lr"] <= 1 and v["images"] in (1, 2, 3) and v["silence"] in (0, 1)
        for v in values
    )
    assert 8 < sum(v["optim.lr"] < 0.1 for v in values) < 22  # half of them, on a log scale
    few = sweep('recipe = "demo"\n[axes]\nsilence = [0, 1]\n[search]\nkind = "random"\ntrials = 30')
    assert len(points(few)) == 2  # there are no more


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("recipe = ", r"sweep\.toml is not valid TOML"),
        ('recipe = "demo"', r"axes: Field required"),
        ('recipe = "demo"\n[axes]\nsilence = []', "the axis silence has no values"),
        (
            'recipe = "demo"\n[axes]\noptim.lr = {low = 0.1, high = 1}',
            "the axis optim.lr is a range: list its values",
        ),
        (
            'recipe = "demo"\n[axes]\noptim.lr = {low = 2, high = 1}',
            r"low = 2 must be less than high = 1",
        ),
        (
            'recipe = "demo"\n[axes]\nsilence = [1]\n[search]\nkind = "optuna"',
            "needs search.trials",
        ),
        (
            'recipe = "demo"\n[axes]\nsilence = [1]\n[baseline]\nsilense = 1',
            r"names 'silense' \(did you mean 'silence'\?\)|names 'silense'",
        ),
        ('recipe = "demo"\n[axes]\nsilence = [1]\n[resources]\ncpu = 1', r"resources\.cpu"),
    ],
)
def test_what_is_wrong_is_named(sweep, text, said):
    with pytest.raises(UserError, match=said):
        sweep(text)


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ("silence = [2]", r"loss\.silence"),
        ("neighbors = [1]", "there is no axis 'neighbors'"),
        ("optim.rate = [1]", r"optim\.rate"),
        ('control = ["some"]', "the axis control has 'some'"),
        ("silence = [1]\n[baseline]\nsilence = 0.5", "none of the axis' values"),
    ],
)
def test_values_are_checked_before_anything_is_trained(sweep, axes, said):
    with pytest.raises(UserError, match=said):
        check_axes(sweep(f'recipe = "demo"\n[axes]\n{axes}'), "pack", [])
