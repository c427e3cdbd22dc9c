"""Weights of images: what files may say, and what the rows of a batch weigh by them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from fastlt.config import DataConfig, load_config
from fastlt.data.row_weights import (
    RowWeights,
    class_weights,
    mixed_weights,
    read_weights,
    row_weights,
    sample_weights,
)
from fastlt.errors import ConfigError
from fastlt.packing.concat import concat_packs
from fastlt.packing.reader import open_pack
from fastlt.packing.remote import Remote
from fastlt.packing.sources import read_collection
from fastlt.packing.writer import PackOptions, write_pack
from fastlt.training.setup import build_plan

NAMES = ["a", "b", "c", "x", "y"]


@pytest.fixture
def pack(small_pack):
    return open_pack(small_pack)


def written(folder, text):
    file = folder / "weights.csv"
    file.write_text(text, encoding="utf-8")
    return file


def plan_of(pack, *settings):
    config = load_config("cifar100-siblings", ["data.batch=8", "data.size=16", *settings])
    return build_plan(config, pack, pack.space)


def test_classes_that_are_not_named_weigh_1(tmp_path):
    wanted = [1, 2.5, 1, 1, 0.5]
    assert class_weights({"b": 2.5, "y": 0.5}, NAMES).tolist() == wanted
    file = written(tmp_path, "class,weight\nb,2.5\n y , 0.5\n")
    assert class_weights(str(file), NAMES).tolist() == wanted


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bb": 2.0}, "names the class 'bb', which is not in the pack, did you mean 'b'"),
        ({"q": 2.0, "a": 1.0, "r": 3.0}, "names 2 classes, 'q' first, which are not in the pack"),
    ],
)
def test_unknown_classes_are_named_and_counted(given, message):
    with pytest.raises(ConfigError, match=message):
        class_weights(given, NAMES)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: the header must be class,weight"),
        ("name,weight\na,1\n", "line 1: the header must be class,weight"),
        ("class,weight\na,1\nb\n", "line 3: .* must be a name and a weight"),
        ("class,weight\na,one\n", "line 2: 'a,one' must be a name and a weight"),
        ("class,weight\na,-1\n", "line 2: 'a,-1' must be a name and a weight"),
        ("class,weight\na,nan\n", "line 2: 'a,nan'"),
        ("class,weight\na,inf\n", "line 2: 'a,inf'"),
        ("class,weight\n,1\n", "line 2: ',1'"),
        ("class,weight\na,1\na,2\n", "line 3: 'a' is named a second time"),
        ("class,weight\na,0\n", "gives 'a' a weight of 0: a class's weight must be above 0"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        class_weights(str(written(tmp_path, text)), NAMES)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the weights .*none\.csv"):
        read_weights(tmp_path / "none.csv", "class")
    (tmp_path / "latin.csv").write_bytes("class,weight\né,1\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="are not UTF-8"):
        read_weights(tmp_path / "latin.csv", "class")


def test_images_go_by_their_path_or_their_name_in_the_shards(pack, tmp_path):
    file = written(tmp_path, "image,weight,why\na/3.png,0,blurred\nb/0,2.5,\ny/8.jpeg,4,\n")
    weights = sample_weights(file, pack.train)
    named = {pack.train.key(i): w for i, w in enumerate(weights) if w != 1}
    assert named == {"a/3.png": 0.0, "b/0.png": 2.5, "y/8.png": 4.0}


def test_names_that_shards_cannot_hold_go_by_their_path(image_folders, tmp_path):
    odd = tmp_path / "target" / "big cats" / "my photo 1.5.png"
    odd.parent.mkdir(parents=True)
    odd.write_bytes((image_folders / "target/a/0.png").read_bytes())
    (tmp_path / "val/big cats").mkdir(parents=True)
    (tmp_path / "val/big cats/0.png").write_bytes((image_folders / "val/a/0.png").read_bytes())
    collection = read_collection(tmp_path / "target", None, tmp_path / "val", None, None, None)
    out = write_pack(collection, PackOptions(out=tmp_path / "pack", workers=1), Console(quiet=True))
    file = written(tmp_path, "image,weight\nbig cats/my photo 1.5.png,3\n")
    assert sample_weights(file, open_pack(out).train).tolist() == [3.0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q/1.png,2\n", "names the image 'q/1.png', which is not among the training images"),
        (
            "q/1.png,2\na/0,1\nr/1.png,2\n",
            "names 2 images, 'q/1.png' first, which are not .*like 'a/0.png'",
        ),
        ("a/0.png,2\na/0,3\n", "names the image 'a/0' a second time"),
    ],
)
def test_unknown_and_repeated_images_are_named(pack, tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        sample_weights(written(tmp_path, "image,weight\n" + text), pack.train)


def test_a_pack_at_an_address_is_refused(pack, tmp_path):
    remote = Remote("s3://bucket/pack", tmp_path, 10, {})
    file = written(tmp_path, "image,weight\na/0,2\n")
    with pytest.raises(ConfigError, match="s3://bucket/pack: copy the pack to this machine"):
        sample_weights(file, replace(pack.train, remote=remote))


def test_of_mixed_packs_every_image_of_a_name_weighs_it(pack, small_pack, tmp_path):
    mixed = concat_packs(pack, {"again": open_pack(small_pack)}, {"again": 1.0})
    file = written(tmp_path, "image,weight\na/0,2\n")
    weights = sample_weights(file, mixed.train)
    assert np.flatnonzero(weights != 1).tolist() == [0, len(pack.train)]


def test_an_image_weighs_its_class_times_its_own(pack, tmp_path):
    file = written(tmp_path, "image,weight\na/0,0\nb/0,3\n")
    data = DataConfig(class_weights={"a": 5, "b": 2}, sample_weights=str(file))
    found = row_weights(data, pack, plan_of(pack))
    first = np.array(["abcxy".index(pack.train.key(i)[0]) for i in range(len(pack.train))])
    wanted = np.array([5.0, 2, 1, 1, 1])[first]
    wanted[[pack.train.key(i) == "a/0.png" for i in range(len(first))]] = 0
    wanted[[pack.train.key(i) == "b/0.png" for i in range(len(first))]] = 6
    assert found.of_image.tolist() == wanted.tolist()
    assert row_weights(DataConfig(), pack, plan_of(pack)) is None


def test_where_nothing_counts_training_is_refused(pack, tmp_path):
    keys = "".join(f"{pack.train.key(i)},0\n" for i in range(len(pack.train)))
    data = DataConfig(sample_weights=str(written(tmp_path, "image,weight\n" + keys)))
    with pytest.raises(ConfigError, match="all training images weigh 0"):
        row_weights(data, pack, plan_of(pack))


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("views", [1, 2])
def test_rows_are_over_the_mean_of_their_step(pack, accumulate, world, views):
    """Over all the batches and ranks of an optimiser step, the mean of the batches' means is 1."""
    whole = plan_of(pack, f"data.views={views}")
    weights = RowWeights(np.random.default_rng(0).random(len(pack.train)))
    plans = [replace(whole, rank=rank, world=world) for rank in range(world)]
    rows = []
    for plan in plans:
        batches = enumerate(plan.epoch(3))
        args = (plan, 3)
        rows.append([weights.of_rows(b.images, *args, s, accumulate) for s, b in batches])
    means = torch.stack([torch.cat(parts).mean() for parts in zip(*rows, strict=True)])
    for group in means.split(accumulate):
        torch.testing.assert_close(group.mean(), torch.tensor(1.0))
    first = next(plans[0].epoch(3)).images
    ratio = rows[0][0].double().numpy() / weights.of_image[first]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-6)


def test_equal_weights_are_ones(pack):
    plan = plan_of(pack)
    weights = RowWeights(np.full(len(pack.train), 0.3))
    for step, batch in enumerate(plan.epoch(0)):
        assert weights.of_rows(batch.images, plan, 0, step, 2).eq(1).all()


def test_a_step_of_nothing_but_zeros_weighs_nothing(pack):
    plan = plan_of(pack)
    batch = next(plan.epoch(0))
    of_image = np.ones(len(pack.train))
    of_image[batch.images] = 0
    assert RowWeights(of_image).of_rows(batch.images, plan, 0, 0, 1).eq(0).all()


def test_mixed_rows_weigh_what_both_images_do():
    weights = torch.tensor([1.0, 2.0, 4.0])
    assert mixed_weights(weights, None) is weights
    mixed = mixed_weights(weights, torch.tensor(0.25))
    torch.testing.assert_close(mixed, torch.tensor([3.25, 2.0, 1.75]))
