"""Packs that are trained on together."""

from pathlib import Path

import numpy as np
import pytest
from helpers.scenes import QUIET
from PIL import Image

from fastlt.data.geometry import Geometry
from fastlt.data.loader import Loader
from fastlt.data.plan import Plan, Sampling, shared_out
from fastlt.errors import UserError
from fastlt.packing.concat import concat_packs
from fastlt.packing.reader import Pack, open_pack
from fastlt.packing.sources import read_collection
from fastlt.packing.writer import PackOptions, write_pack


def pack_of(
    folder: Path, train: dict[str, int], auxiliary: dict[str, int], pairs: str, colour: int
) -> Pack:
    for split, classes in (
        ("train", train),
        ("val", dict.fromkeys(train, 1)),
        ("auxiliary", auxiliary),
    ):
        for name, count in classes.items():
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (20, 20), (colour, 10 * i, len(name))).save(
                    folder / split / name / f"{i}.png"
                )
    (folder / "pairs.csv").write_text("target,auxiliary\n" + pairs)
    places = (folder / "train", folder / "auxiliary" if auxiliary else None, folder / "val")
    collection = read_collection(*places, folder / "pairs.csv" if auxiliary else None, None, None)
    return open_pack(write_pack(collection, PackOptions(folder / "pack", workers=1), QUIET))


@pytest.fixture(scope="module")
def packs(tmp_path_factory) -> tuple[Pack, Pack]:
    root = tmp_path_factory.mktemp("mixed")
    first = pack_of(
        root / "first", {"cat": 6, "dog": 4}, {"fox": 5, "wolf": 3}, "cat,fox\ndog,wolf\n", 50
    )
    return first, pack_of(
        root / "second", {"dog": 8}, {"jackal": 4, "wolf": 6}, "dog,jackal\ndog,wolf\n", 200
    )


def mixed(packs, weight: float = 0.5) -> Pack:
    return concat_packs(packs[0], {"second": packs[1]}, {"second": weight})


def test_classes_go_by_their_names(packs):
    pack = mixed(packs)
    assert pack.space.names == ["cat", "dog", "fox", "wolf", "jackal"]
    assert pack.space.pairs == [(0, 2), (1, 3), (1, 4)]
    assert (
        pack.space.train_counts == [6, 12, 5, 9, 4]
        and pack.space.val_counts == packs[0].space.val_counts
    )
    assert pack.id != packs[0].id and pack.val is packs[0].val


@pytest.mark.parametrize("weight", [0.25, 0.5, 1.0, 2.0])
def test_images_count_by_their_packs_weight(packs, weight):
    pack = mixed(packs, weight)
    plan = Plan(pack.train, 2, 5, Geometry("pad-crop", 20), Sampling(budget=12), 8, seed=0)
    assert plan.class_counts.tolist() == [6, 4 + round(8 * weight), 12, 12, 12]
    order = plan.order(3)
    seen = np.bincount(pack.train.label[order] * 2 + pack.train.part[order], minlength=10).reshape(
        5, 2
    )
    assert seen.sum(axis=1).tolist() == plan.class_counts.tolist()
    assert seen[0].tolist() == [6, 0] and seen[1].tolist() == [4, round(8 * weight)]
    assert seen[3, 1] == pytest.approx(12 * 6 * weight / (3 + 6 * weight), abs=1)


def test_the_pixels_are_those_of_each_pack(packs):
    pack = mixed(packs, 1.0)
    plan = Plan(pack.train, 2, 5, Geometry("pad-crop", 20, padding=0), Sampling(), 8, seed=0)
    loader = Loader(pack.train, 20, "torch", 0)
    for batch, images in loader.iterate(plan.epoch(0)):
        assert [int(image[0, 0, 0]) for image in images] == [
            (50, 200)[part] for part in pack.train.part[batch.images]
        ]


def test_messages_name_the_pack_of_an_image(packs):
    train = mixed(packs).train
    last = len(train) - 1
    assert train.where(0) == packs[0].train.where(0)
    assert train.where(last) == packs[1].train.where(len(packs[1].train) - 1)


def test_classes_that_clash_are_refused(packs, tmp_path):
    strange = pack_of(tmp_path / "a", {"cow": 3}, {}, "", 1)
    with pytest.raises(UserError, match="target class 'cow' that the first lacks"):
        concat_packs(packs[0], {"strange": strange}, {"strange": 1.0})
    swapped = pack_of(tmp_path / "b", {"dog": 3}, {"cat": 2}, "dog,cat\n", 1)
    with pytest.raises(
        UserError, match="'cat' is a target class, and an auxiliary one in the pack swapped"
    ):
        concat_packs(packs[0], {"swapped": swapped}, {"swapped": 1.0})


def test_counts_are_shared_out_exactly():
    rng = np.random.default_rng(0)
    counts, shares = rng.integers(0, 50, 40), rng.random((40, 3)) * rng.integers(0, 2, (40, 3))
    shares[:, 0] += 0.1
    parts = shared_out(counts, shares)
    assert (parts.sum(axis=1) == counts).all() and (parts[shares == 0] == 0).all()
    assert np.abs(parts - counts[:, None] * shares / shares.sum(axis=1, keepdims=True)).max() < 1


def test_the_ffcv_engine_reads_several_packs_as_the_torch_engine_does(packs):
    pytest.importorskip("ffcv", reason="no ffcv here: it comes with the extra `ffcv`")
    from fastlt.data.engines.ffcv.engine import write_beton

    pack = mixed(packs, 0.3)
    with pytest.raises(UserError, match=r"the ffcv engine needs a \.beton of each pack"):
        Loader(pack.train, 16, "ffcv", 1, pack.betons("train"))
    for one in packs:
        write_beton(one.train, one.path / "train.beton", 1)
    plan = Plan(
        pack.train,
        2,
        5,
        Geometry("random-resized-crop", 16, flip=True),
        Sampling(budget=7),
        6,
        seed=1,
    )
    reference = Loader(pack.train, 16, "torch", 0, decode="exact")
    engine = Loader(pack.train, 16, "ffcv", 2, mixed(packs, 0.3).betons("train"), decode="exact")
    for epoch in range(2):
        expected, found = (
            list(loader.iterate(plan.epoch(epoch))) for loader in (reference, engine)
        )
        assert len(expected) == len(found) > 5
        for (batch, wanted), (other, images) in zip(expected, found, strict=True):
            assert (batch.images == other.images).all()
            assert (
                images.int() - wanted.int()
            ).abs().max() <= 1  # see test_ffcv.py: one grey level where sides round otherwise
    left_early = engine.iterate(plan.epoch(2))
    next(left_early)
    left_early.close()
    assert len(list(engine.iterate(plan.epoch(3)))) == len(found)
    engine.close()
    for one in packs:
        (one.path / "train.beton").unlink()
