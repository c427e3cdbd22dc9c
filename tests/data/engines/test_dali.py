"""The dali engine on a CPU: the plan's images, near to the other engines', whatever is left early
or damaged.
"""

import shutil

import numpy as np
import pytest
import torch

from fastlt.data.engines.interface import Options
from fastlt.data.engines.torch import TorchEngine
from fastlt.data.geometry import Geometry
from fastlt.data.plan import Batch, Plan, Sampling
from fastlt.errors import UserError
from fastlt.packing.reader import Pack, open_pack

pytest.importorskip("nvidia.dali", reason="no DALI here: it comes with the extra `dali`")

from fastlt.data.engines.dali import DaliEngine

CPU = torch.device("cpu")
CROPS = {
    "random-resized-crop": Geometry("random-resized-crop", 24, flip=True),
    "enlarged": Geometry("random-resized-crop", 24, flip=True, scale=(0.01, 0.05)),
    "pad-crop": Geometry("pad-crop", 24, flip=True, padding=8),
    "centre-crop": Geometry("centre-crop", 24, resize=30),
}
# grey levels on average: a triangle of weights where the other engines average over areas
DIFFERENCE = 4


def batches_of(pack: Pack, crop: str, epochs: int = 2) -> list[Batch]:
    plan = Plan(pack.train, 1, 1, CROPS[crop], Sampling(), 5, seed=1)
    return [batch for epoch in range(epochs) for batch in plan.epoch(epoch)]


@pytest.fixture(scope="module")
def engine(mixed_pack):
    made = DaliEngine(mixed_pack.train, Options(24, 2))
    yield made
    made.close()


@pytest.mark.parametrize("crop", CROPS)
def test_every_kind_of_image_is_near_to_the_reference(mixed_pack, engine, crop):
    batches = batches_of(mixed_pack, crop)
    wanted = TorchEngine(mixed_pack.train, Options(24, 0)).batches(batches)
    # 3 by 5: a pixel is a quarter
    tiny = next(i for i in range(len(mixed_pack.train)) if mixed_pack.train.key(i) == "a/tiny.jpg")
    for batch, made, reference in zip(batches, engine.batches(batches), wanted, strict=True):
        assert made.shape == (len(batch.images), 24, 24, 3) and made.dtype == torch.uint8
        difference = (made.int() - reference.int()).abs().float().mean((1, 2, 3)).numpy()
        assert (difference[batch.images != tiny] < DIFFERENCE).all() and (difference < 12).all()
    assert not engine.damaged


def test_photos_are_near_to_the_reference(shared_data, tmp_path):
    from helpers.scenes import pack_folders

    folder = tmp_path / "photos" / "images"
    folder.mkdir(parents=True)
    for source in sorted((shared_data / "photos/images").glob("*/*"))[::10]:
        (folder / source.name).symlink_to(source)
    pack = pack_folders(tmp_path / "photos", tmp_path / "photos", tmp_path / "pack")
    plan = Plan(
        pack.train, 1, 1, Geometry("random-resized-crop", 224, flip=True), Sampling(), 16, 0
    )
    made = torch.cat(list(DaliEngine(pack.train, Options(224, 2)).batches(plan.epoch(0)))).int()
    wanted = torch.cat(list(TorchEngine(pack.train, Options(224, 0)).batches(plan.epoch(0)))).int()
    assert (made - wanted).abs().float().mean() < 3  # grey levels


def test_batches_are_the_callers_to_keep(mixed_pack, engine):
    batches = batches_of(mixed_pack, "pad-crop", 6)
    kept = [(images, images.clone()) for images in engine.batches(batches)]
    assert all(torch.equal(a, b) for a, b in kept)


def test_an_epoch_may_be_left_early_and_the_next_one_is_whole(mixed_pack, engine):
    batches = batches_of(mixed_pack, "centre-crop")
    whole = list(engine.batches(batches))
    for stop in (1, 2):
        reading = engine.batches(batches)
        for _ in range(stop):
            next(reading)
        with pytest.raises(RuntimeError, match="another epoch"):
            next(engine.batches(batches))
        reading.close()
        again = list(engine.batches(batches[1:]))
        assert len(again) == len(batches) - 1
        assert all(torch.equal(a, b) for a, b in zip(again, whole[1:], strict=True))


def test_nothing_to_read(engine):
    assert list(engine.batches([])) == []


@pytest.fixture
def damaged(mixed_pack, tmp_path) -> tuple[Pack, int]:
    """A copy of the pack in which one JPEG has lost its data."""
    shutil.copytree(mixed_pack.path, tmp_path / "pack")
    pack = open_pack(tmp_path / "pack")
    image = next(i for i in range(len(pack.train)) if pack.train.key(i) == "a/large.jpg")
    with (pack.train.folder / pack.train.shards[0]).open("r+b") as file:
        file.seek(int(pack.train.offset[image]) + 300)
        file.write(b"\xff\xd9" * 200)
    return open_pack(tmp_path / "pack"), image


def test_a_damaged_image_is_replaced_and_the_rest_goes_on(damaged):
    pack, image = damaged
    batches = batches_of(pack, "centre-crop")
    engine, reference = (
        make(pack.train)
        for make in (
            lambda split: DaliEngine(split, Options(24, 2, strict=False)),
            lambda split: TorchEngine(split, Options(24, 0, strict=False)),
        )
    )
    for batch, made, wanted in zip(
        batches, engine.batches(batches), reference.batches(batches), strict=True
    ):
        replaced = torch.from_numpy(batch.images == image)
        assert torch.equal(made[replaced], wanted[replaced])
        assert (
            made[~replaced].int() - wanted[~replaced].int()
        ).abs().float().mean() < 8  # DALI's own weights
    assert list(engine.damaged) == list(reference.damaged) == [image]


def test_strict_names_a_damaged_image(damaged):
    pack, _ = damaged
    with pytest.raises(UserError, match=r"a/large\.jpg"):
        list(DaliEngine(pack.train, Options(24, 2)).batches(batches_of(pack, "centre-crop")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_the_gpu_is_refused(mixed_pack):
    with pytest.raises(UserError, match="DALI cannot use cuda"):
        DaliEngine(mixed_pack.train, Options(24, 2, device=torch.device("cuda")))


def test_flips_are_the_plans(mixed_pack, engine):
    images = np.arange(4)
    boxes = np.tile(np.array([0, 0, 40, 40], np.int32), (4, 1))
    plain, flipped = engine.batches(
        [Batch(images, images * 0, boxes, np.full(4, flip)) for flip in (False, True)]
    )
    assert torch.equal(plain.flip(2), flipped) and not torch.equal(plain, flipped)
