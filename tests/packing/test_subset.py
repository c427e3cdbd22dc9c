"""Views of a pack: which auxiliary classes are left, that the others are in no batch, and that the
shards stay as they are.
"""

import numpy as np
import pytest
from rich.console import Console

from fastlt.config import DataConfig, load_config
from fastlt.errors import UserError
from fastlt.packing.reader import open_pack
from fastlt.packing.subset import subset
from fastlt.training.loop import train
from fastlt.training.setup import build_plan

# a - x, b - x, b - y; each test's own vectors say that y is nearer to b than x is.


def names_of(space):
    return [(space.names[target], space.names[auxiliary]) for target, auxiliary in space.pairs]


@pytest.fixture
def vectors(tmp_path):
    of = {"a": (1, 0, 0), "b": (0, 1, 0), "c": (0, 0, 1), "x": (0.8, 0.6, 0), "y": (0, 0.9, 0.4)}
    np.savez(tmp_path / "v.npz", names=list(of), v=np.array(list(of.values()), np.float32))
    return str(tmp_path / "v.npz")


def test_without_a_wish_nothing_changes(small_pack):
    pack = open_pack(small_pack)
    seen, space = subset(pack, DataConfig(), 0)
    assert seen is pack and space is pack.space
    for none in (DataConfig(auxiliary=False), DataConfig(neighbours=0)):
        assert subset(pack, none, 0) == (pack, pack.space.targets_only())


def test_the_first_neighbours_of_each_target(small_pack, vectors):
    pack = open_pack(small_pack)
    _, space = subset(pack, DataConfig(neighbours=1), 0)
    assert space.auxiliary_names == ["x"] and names_of(space) == [("a", "x"), ("b", "x")]
    _, space = subset(pack, DataConfig(neighbours=1, similarity=vectors), 0)
    assert space.auxiliary_names == ["x", "y"]  # for b, y is nearer
    assert set(names_of(space)) == {("a", "x"), ("b", "x"), ("b", "y")}


def test_a_band_of_similarities(small_pack, vectors):
    _, space = subset(open_pack(small_pack), DataConfig(band=(0.7, 1), similarity=vectors), 0)
    assert set(names_of(space)) == {("a", "x"), ("b", "y")}
    _, space = subset(open_pack(small_pack), DataConfig(band=(0.85, 1), similarity=vectors), 0)
    assert space.auxiliary_names == ["y"] and names_of(space) == [("b", "y")]
    with pytest.raises(UserError, match="no auxiliary class is left"):
        subset(open_pack(small_pack), DataConfig(band=(0.99, 1), similarity=vectors), 0)


@pytest.mark.parametrize("seed", range(4))
def test_a_view_has_the_images_of_its_classes_alone(small_pack, vectors, seed):
    pack = open_pack(small_pack)
    config = load_config(
        "demo",
        ["data.batch=4", "data.similarity=" + vectors, "data.band=[0.85, 1]", "data.budget=7"],
    )
    seen, space = subset(pack, config.data, seed)
    plan = build_plan(config, seen, space)
    stored = {
        name: np.flatnonzero(pack.train.label == i) for i, name in enumerate(pack.space.names)
    }
    counts = dict.fromkeys(space.names, 0)
    for batch in plan.epoch(seed):
        for image, label in zip(batch.images.tolist(), batch.labels.tolist(), strict=True):
            assert image in stored[space.names[label]]
            counts[space.names[label]] += 1
    assert counts == {"a": 12, "b": 6, "c": 3, "y": 7}
    assert space.train_counts == [12, 6, 3, 9] and seen.train.shards is pack.train.shards


def test_a_share_is_drawn_by_the_seed(small_pack):
    drawn = {
        tuple(
            subset(open_pack(small_pack), DataConfig(auxiliary_share=0.5), seed)[1].auxiliary_names
        )
        for seed in range(10)
    }
    assert drawn == {("x",), ("y",)}


def test_random_pairs_are_as_many_and_none_of_the_given_ones(small_pack):
    _, space = subset(open_pack(small_pack), DataConfig(pairs="random"), 0)
    assert names_of(space) == [("a", "y")]  # b has no other left
    assert space.auxiliary_names == ["x", "y"]


def test_what_has_no_vector_is_named(small_pack, tmp_path):
    np.savez(tmp_path / "v.npz", names=["a", "b"], v=np.eye(2))
    with pytest.raises(UserError, match=r"has no vectors for 3 pairs, the first is \(a, x\)"):
        subset(open_pack(small_pack), DataConfig(similarity=str(tmp_path / "v.npz")), 0)
    with pytest.raises(UserError, match=r"data\.band needs data\.similarity"):
        load_config("demo", ["data.band=[0, 1]"])


def test_a_view_is_trained_and_what_it_is_can_be_read(small_pack, tmp_path):
    config = load_config(
        "demo",
        [
            f"data.pack={small_pack}",
            "train.epochs=1",
            "data.neighbours=1",
            "data.size=16",
            "data.batch=8",
        ],
    )
    train(config, tmp_path / "run", Console(quiet=True))
    from fastlt.classes import ClassSpace

    assert ClassSpace.load(tmp_path / "run" / "classes.json").auxiliary_names == ["x"]


@pytest.mark.parametrize("seed", range(3))
def test_merged_auxiliaries_are_the_same_images_and_train_their_rarest_target(small_pack, seed):
    pack = open_pack(small_pack)
    settings = ["data.batch=4", "data.budget=7"]
    apart, together = (
        load_config("demo", [*settings, *extra]) for extra in ([], ["data.auxiliary=merged"])
    )
    drawn = build_plan(apart, *subset(pack, apart.data, seed))
    seen, space = subset(pack, together.data, seed)
    plan = build_plan(together, seen, space)
    assert space == pack.space.targets_only()
    # x neighbours a with 12 images and b with 6, y neighbours b
    assert plan.class_counts[: space.num_classes].tolist() == [12, 6 + 7 + 7, 3]
    instead = {"x": "b", "y": "b"}
    for ours, theirs in zip(plan.epoch(seed), drawn.epoch(seed), strict=True):
        assert (ours.images == theirs.images).all() and (ours.boxes == theirs.boxes).all()
        names = [pack.space.names[label] for label in theirs.labels]
        assert [space.names[t] for t in ours.labels] == [instead.get(n, n) for n in names]


def test_merged_goes_with_a_subset_and_is_trained(small_pack, tmp_path):
    settings = [
        f"data.pack={small_pack}",
        "train.epochs=1",
        "data.neighbours=1",
        "data.size=16",
        "data.batch=8",
        "data.auxiliary=merged",
        "loss.name=balanced-ce",
    ]
    config = load_config("demo", settings)
    seen, space = subset(open_pack(small_pack), config.data, 0)
    plan = build_plan(config, seen, space)
    assert seen.drawn.auxiliary_names == ["x"]
    assert plan.class_counts[:3].tolist() == [12, 6 + config.data.budget, 3]
    train(config, tmp_path / "run", Console(quiet=True))
    assert not (tmp_path / "run" / "classes.json").read_text().count('"x"')


def test_an_auxiliary_without_a_target_cannot_be_merged(small_pack):
    from dataclasses import replace

    pack = open_pack(small_pack)
    pairs = [pair for pair in pack.space.pairs if pack.space.names[pair[1]] != "y"]
    pack = replace(pack, space=pack.space.model_copy(update={"pairs": pairs}))
    with pytest.raises(UserError, match=r"data\.auxiliary=merged: 'y' has no target"):
        subset(pack, DataConfig(auxiliary="merged"), 0)
