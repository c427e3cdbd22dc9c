"""The torch engine, images kept in memory, and the choice between engines."""

import io
import multiprocessing
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.scenes import ORIENTATION, mixed_images, scene
from PIL import Image

from fastlt.data.engines import dali as dali_engine
from fastlt.data.engines import gpu as gpu_engine
from fastlt.data.engines import resident
from fastlt.data.engines.choice import choose
from fastlt.data.engines.dali import DaliEngine
from fastlt.data.engines.ffcv import engine as ffcv_engine
from fastlt.data.engines.gpu import GpuEngine
from fastlt.data.engines.interface import Options
from fastlt.data.engines.resident import ResidentEngine
from fastlt.data.engines.torch import TorchEngine
from fastlt.data.geometry import Geometry
from fastlt.data.loader import Loader
from fastlt.data.plan import Batch, Plan, Sampling, evaluation_batches
from fastlt.decode.images import decode, fill_box
from fastlt.decode.region import has_region
from fastlt.errors import UserError
from fastlt.packing.reader import open_pack

CROPS = {
    "random-resized-crop": Geometry("random-resized-crop", 24, flip=True),
    "pad-crop": Geometry("pad-crop", 16, flip=True, padding=4),
    "pad-crop, other size": Geometry("pad-crop", 24, flip=True, padding=6),
    "centre-crop": Geometry("centre-crop", 16, resize=20),
}


class OnDevice(ResidentEngine):
    """As a GPU's, but that the device is the CPU."""

    def _send(self) -> None:
        self._there = torch.from_numpy(self._images)


MAKERS = {
    "torch": lambda split, size: TorchEngine(split, Options(size, 0)),
    "resident": lambda split, size: ResidentEngine(split, Options(size)),
    "resident, on the device": lambda split, size: OnDevice(split, Options(size)),
}


@pytest.fixture
def pack(small_pack):
    return open_pack(small_pack)


def plan_of(pack, geometry: Geometry, batch: int = 8) -> Plan:
    return Plan(
        pack.train,
        pack.space.num_targets,
        pack.space.num_classes,
        geometry,
        Sampling(budget=6),
        batch,
        seed=5,
    )


def reference(split, batch: Batch, size: int) -> torch.Tensor:
    """Image by image, straight from the bytes."""
    made = [
        fill_box(Image.fromarray(decode(split.read(image))), box, flip, size)
        for image, box, flip in zip(batch.images, batch.boxes, batch.flips, strict=True)
    ]
    return torch.from_numpy(np.stack(made))


@pytest.mark.parametrize("geometry", CROPS.values(), ids=CROPS)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_an_engine_gives_each_batch_as_the_reference(pack, make, geometry):
    engine, batches = make(pack.train, geometry.size), list(plan_of(pack, geometry).epoch(0))
    made = list(engine.batches(batches))
    assert len(made) == len(batches)
    for images, batch in zip(made, batches, strict=True):
        assert images.dtype == torch.uint8
        assert torch.equal(images, reference(pack.train, batch, geometry.size))


def test_workers_give_the_same_in_the_same_order_and_live_through_epochs(pack):
    plan = plan_of(pack, CROPS["random-resized-crop"])
    alone, shared = TorchEngine(pack.train, Options(24, 0)), TorchEngine(pack.train, Options(24, 2))
    pids = []
    for epoch in range(2):
        made = list(shared.batches(plan.epoch(epoch)))
        assert all(
            torch.equal(a, b) for a, b in zip(made, alone.batches(plan.epoch(epoch)), strict=True)
        )
        pids.append({child.pid for child in multiprocessing.active_children()})
    assert pids[0] == pids[1] and len(pids[0]) == 2
    shared.close()
    assert not multiprocessing.active_children()


def test_leaving_early_leaves_an_engine_that_starts_anew(pack):
    plan = plan_of(pack, CROPS["pad-crop"])
    engine = TorchEngine(pack.train, Options(16, 2))
    early = engine.batches(plan.epoch(0))
    next(early)
    with pytest.raises(RuntimeError, match="another epoch"):
        next(engine.batches(plan.epoch(0)))
    early.close()
    made = list(engine.batches(plan.epoch(1)))
    assert all(
        torch.equal(a, reference(pack.train, b, 16))
        for a, b in zip(made, plan.epoch(1), strict=True)
    )
    engine.close()
    assert not multiprocessing.active_children()


class Deadly:
    """Kills the worker that looks at it, as a lack of memory would."""

    @property
    def images(self):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_dead_worker_is_told_and_not_waited_for(pack):
    engine, plan = TorchEngine(pack.train, Options(16, 1)), plan_of(pack, CROPS["pad-crop"])
    with pytest.raises(UserError, match="a worker of the torch engine failed"):
        list(engine.batches([next(plan.epoch(0)), Deadly()]))
    assert len(list(engine.batches(plan.epoch(0)))) == plan.steps_per_epoch  # new workers
    engine.close()
    assert not multiprocessing.active_children()


def test_a_temporary_folder_too_long_for_sockets_is_refused(pack, tmp_path, monkeypatch):
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    plan = plan_of(pack, CROPS["pad-crop"])
    with pytest.raises(UserError, match="set TMPDIR to a shorter one"):
        next(TorchEngine(pack.train, Options(16, 1)).batches(plan.epoch(0)))
    made = list(TorchEngine(pack.train, Options(16, 0)).batches(plan.epoch(0)))
    assert len(made) == plan.steps_per_epoch


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_two_views_of_an_image_are_cut_anew(pack, make):
    plan = plan_of(pack, CROPS["pad-crop"])
    plan = replace(plan, sampling=replace(plan.sampling, views=2))
    for images, batch in zip(
        make(pack.train, 16).batches(plan.epoch(0)), plan.epoch(0), strict=True
    ):
        assert torch.equal(images, reference(pack.train, batch, 16))
        first, second = images.chunk(2)
        assert not torch.equal(first, second)


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_kept_batches_are_not_overwritten(pack, make):
    batches = [
        batch for epoch in range(4) for batch in plan_of(pack, CROPS["pad-crop"]).epoch(epoch)
    ][:16]
    kept = list(make(pack.train, 16).batches(batches))
    assert len(kept) == 16
    assert all(
        torch.equal(a, reference(pack.train, b, 16)) for a, b in zip(kept, batches, strict=True)
    )


@pytest.mark.parametrize("make", [ResidentEngine, OnDevice])
@pytest.mark.parametrize("padding", [0, 1, 4, 40])
def test_resident_crops_reach_over_the_edge_as_far_as_asked(pack, padding, make):
    geometry = Geometry("pad-crop", 16, flip=True, padding=padding)
    engine = make(pack.train, Options(16))
    for size in (padding, 2, padding):  # the margin grows and stays
        batches = list(plan_of(pack, replace(geometry, padding=size)).epoch(0))
        made = list(engine.batches(batches))
        assert all(
            torch.equal(a, reference(pack.train, b, 16)) for a, b in zip(made, batches, strict=True)
        )
    resized = next(plan_of(pack, CROPS["random-resized-crop"]).epoch(0))
    small = replace(resized, boxes=np.minimum(resized.boxes, 3) + np.array([0, 0, 1, 2]))
    assert torch.equal(next(engine.batches([small])), reference(pack.train, small, 16))


def test_every_stored_kind_of_image_comes_upright(mixed_pack):
    split = mixed_pack.train
    batches = list(evaluation_batches(split, Geometry("centre-crop", 32, resize=32), 5))
    made = torch.cat(list(TorchEngine(split, Options(32, 0)).batches(batches)))
    keys = [split.key(image).rsplit("/", 1)[-1] for image in range(len(split))]
    assert sorted(keys) == sorted(mixed_images())
    turns = {turn: made[keys.index(f"turned{turn}.jpg")] for turn in range(1, 9)}
    upright = np.asarray(scene(60, 90))
    for turn, image in turns.items():
        shown = turned(upright, turn)
        top, left = ((shown.shape[0] - 60) // 2, (shown.shape[1] - 60) // 2)
        expected = fill_box(Image.fromarray(shown), np.array([top, left, 60, 60]), False, 32)
        # JPEG loss; a wrong turn is off by 50 and more
        assert np.abs(image.numpy().astype(int) - expected).mean() < 8


def turned(stored: np.ndarray, turn: int) -> np.ndarray:
    """What EXIF says: turn 6 means that the first row is the right side, and so on (Exif 2.32, tag
    0x0112).
    """
    first_row_is = {1: "tl", 2: "tr", 3: "br", 4: "bl", 5: "lt", 6: "rt", 7: "rb", 8: "lb"}[turn]
    image = stored.transpose(1, 0, 2) if first_row_is[0] in "lr" else stored
    image = image[::-1] if "b" in first_row_is else image
    return np.ascontiguousarray(image[:, ::-1] if "r" in first_row_is else image)


def test_the_turned_images_of_these_tests_carry_their_turn():
    for turn in range(2, 9):
        with Image.open(io.BytesIO(mixed_images()[f"turned{turn}.jpg"])) as image:
            assert image.getexif()[ORIENTATION] == turn


# --- damage


@pytest.fixture
def damaged_pack(image_folders, tmp_path):
    """A pack of its own to damage."""
    from helpers.scenes import pack_folders

    return pack_folders(image_folders / "target", image_folders / "val", tmp_path / "pack")


@pytest.mark.parametrize("engine", ["auto", "torch"])
def test_a_truncated_shard_is_refused_by_name(damaged_pack, engine):
    split = damaged_pack.train
    shard = split.folder / split.shards[0]
    shard.write_bytes(shard.read_bytes()[: int(split.offset[-1])])
    with pytest.raises(UserError, match=f"{shard.name} is damaged: it has .* bytes"):
        open_pack(damaged_pack.path)
    with pytest.raises(UserError, match=f"{shard.name} is damaged: it has .* bytes"):
        Loader(split, 16, engine, 0)


def test_a_missing_shard_is_named(damaged_pack):
    shard = damaged_pack.train.folder / damaged_pack.train.shards[0]
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} is missing"):
        TorchEngine(damaged_pack.train, Options(16, 0))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named_whatever_reads_it(damaged_pack, workers):
    split = damaged_pack.train
    overwrite(split, 3, b"\0" * 40)
    name = f"{split.shards[0]}:{split.key(3)}: .* pack again"
    with pytest.raises(UserError, match=name):
        ResidentEngine(split, Options(16))
    engine = TorchEngine(split, Options(16, workers))
    batches = list(evaluation_batches(split, CROPS["pad-crop"], 3))
    images = engine.batches(batches)
    next(images)  # 0, 1, 2 are sound
    with pytest.raises(UserError, match=name):
        next(images)
    assert torch.equal(next(engine.batches(batches[:1])), reference(split, batches[0], 16))
    engine.close()


def test_an_index_of_other_sizes_is_told(damaged_pack):
    split = replace(damaged_pack.train, width=damaged_pack.train.width + 1, _maps={})
    with pytest.raises(UserError, match=r"16 x 16 pixels, the index says 17 x 16: pack again"):
        list(
            TorchEngine(split, Options(16, 0)).batches(
                evaluation_batches(split, CROPS["pad-crop"], 3)
            )
        )


def overwrite(split, image: int, data: bytes) -> None:
    with (split.folder / split.shards[split.shard[image]]).open("r+b") as file:
        file.seek(int(split.offset[image]))
        file.write(data)


# --- the front


def chosen(split, name="auto", **options):
    return choose(split, Options(16, **options), name)


@pytest.mark.parametrize("name", ["auto", "resident"])
def test_small_images_of_one_size_stay_in_memory(pack, name):
    assert chosen(pack.train, name) is chosen(pack.val, name) is ResidentEngine


def test_the_torch_engine_is_the_torch_engine(pack, mixed_pack):
    assert chosen(pack.train, "torch") is TorchEngine
    assert chosen(mixed_pack.train, "torch") is chosen(mixed_pack.train) is TorchEngine
    front = Loader(pack.train, 16, "torch", 0)
    assert front.engine_name == "torch"


def test_images_of_several_sizes_cannot_be_resident(mixed_pack):
    assert ResidentEngine.obstacle(mixed_pack.train, Options(16))
    with pytest.raises(UserError, match=r"the resident engine keeps images of one size"):
        chosen(mixed_pack.train, "resident")


@pytest.mark.parametrize(
    ("device", "decode", "dali", "wanted"),
    [
        ("cuda", "auto", True, DaliEngine),
        ("cuda", "gpu", True, DaliEngine),
        ("cuda", "region", True, TorchEngine),
        ("cuda", "auto", False, TorchEngine),
        ("cuda", "gpu", False, GpuEngine),
        ("cpu", "auto", True, TorchEngine),
    ],
)
def test_auto_chooses_by_device_and_decode(mixed_pack, monkeypatch, device, decode, dali, wanted):
    if decode == "region" and not has_region():
        pytest.skip("fastlt's JPEG decoder is not compiled here")

    def missing():
        raise UserError("no DALI")

    monkeypatch.setattr(dali_engine, "import_dali", (lambda: None) if dali else missing)
    monkeypatch.setattr(gpu_engine, "torchvision_decoder", lambda device: None)
    assert chosen(mixed_pack.train, decode=decode, device=torch.device(device)) is wanted


@pytest.mark.parametrize("name", ["auto", "resident", "dali", "ffcv", "torch"])
def test_decoding_on_a_gpu_needs_one(pack, mixed_pack, monkeypatch, name):
    split = pack.train if name == "resident" else mixed_pack.train
    with pytest.raises(UserError, match=r"data\.decode=gpu needs an NVIDIA GPU"):
        chosen(split, name, decode="gpu", betons=(mixed_pack.path / "train.beton",))


def test_what_does_not_fit_is_not_kept_in_memory(pack, monkeypatch):
    split = pack.train
    assert resident.fits(split)
    assert not resident.fits(replace(split, height=split.height * 5, width=split.width * 5))
    monkeypatch.setattr(resident, "MAX_BYTES", 3 * 16 * 16 * len(split) - 1)
    assert not resident.fits(split)


def test_an_engine_that_cannot_be_had_is_refused(pack):
    with pytest.raises(
        UserError,
        match=r"there is no engine 'cv': data\.engine is one of auto, resident, dali, ffcv, torch",
    ):
        chosen(pack.train, "cv")


def test_ffcv_without_its_file_or_its_package_says_what_to_do(pack, monkeypatch):
    def missing():
        raise UserError("the ffcv engine cannot be loaded: pip install fastlt[ffcv]")

    monkeypatch.setattr(ffcv_engine, "import_ffcv", lambda: None)
    with pytest.raises(
        UserError, match=r"train\.beton: pack again with --beton, or set data\.engine=torch"
    ):
        chosen(pack.train, "ffcv")
    monkeypatch.setattr(ffcv_engine, "import_ffcv", missing)
    with pytest.raises(UserError, match=r"pip install fastlt\[ffcv\]"):
        chosen(pack.train, "ffcv", betons=(pack.path / "train.beton",))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["auto", "torch"])
def test_the_front_pairs_each_batch_with_its_images(mixed_pack, pack, workers, name):
    for opened in (mixed_pack, pack):
        plan = plan_of(opened, CROPS["random-resized-crop"], batch=3)
        front = Loader(opened.train, 24, name, workers)
        pairs = list(front.iterate(plan.epoch(0)))
        front.close()
        assert len(pairs) == plan.steps_per_epoch
        for (batch, images), planned in zip(pairs, plan.epoch(0), strict=True):
            assert np.array_equal(batch.images, planned.images) and np.array_equal(
                batch.labels, planned.labels
            )
            assert torch.equal(images, reference(opened.train, planned, 24))
    assert not multiprocessing.active_children()


def test_the_front_may_be_left_early_and_used_again(mixed_pack):
    plan = plan_of(mixed_pack, CROPS["random-resized-crop"], batch=2)
    front = Loader(mixed_pack.train, 24, "torch", 1)
    for _ in front.iterate(plan.epoch(0)):
        break
    (batch, images), *_ = front.iterate(plan.epoch(1, first_step=3))
    assert np.array_equal(batch.images, list(plan.epoch(1))[3].images)
    assert torch.equal(images, reference(mixed_pack.train, batch, 24))
    front.close()


def test_an_error_in_the_plan_reaches_the_caller(mixed_pack):
    def broken():
        yield next(plan_of(mixed_pack, CROPS["centre-crop"]).epoch(0))
        raise KeyError("from the plan")

    front = Loader(mixed_pack.train, 16, "torch", 1)
    with pytest.raises(KeyError, match="from the plan"):
        list(front.iterate(broken()))
    front.close()
