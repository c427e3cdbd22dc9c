"""Nothing grows: memory and threads stay as they are, however many epochs there are and however
they end.
"""

import gc
from pathlib import Path

import pytest
import torch
from helpers.scenes import pack_folders, saved, scene

from fastlt.data.engines.dali import has_dali
from fastlt.data.engines.ffcv.native import has_ffcv
from fastlt.data.geometry import Geometry
from fastlt.data.loader import Loader
from fastlt.data.plan import Plan, Sampling
from fastlt.decode.region import has_region
from fastlt.packing.reader import Pack

SIZE = 224
ENGINES = {"torch": True, "ffcv": has_ffcv(), "dali": has_dali()}

pytestmark = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Pack:
    """64 photos: an epoch is 9.6 MB of pixels."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "images/a").mkdir(parents=True)
    for i in range(64):
        (folder / "images/a" / f"{i}.jpg").write_bytes(saved(scene(240 + i, 320), "JPEG"))
    pack = pack_folders(folder / "images", folder / "images", folder / "pack")
    if has_ffcv():
        from fastlt.data.engines.ffcv.engine import write_beton

        write_beton(pack.train, folder / "pack/train.beton", 1)
    return pack


@pytest.fixture(params=[name for name, is_there in ENGINES.items() if is_there])
def loader(request, photos):
    decode = "region" if request.param == "dali" or has_region() else "exact"
    beton = photos.path / "train.beton"
    workers = 0 if request.param == "torch" else 2  # in this process, where its memory can be seen
    made = Loader(
        photos.train,
        SIZE,
        request.param,
        workers,
        [beton] if beton.is_file() else [],
        decode=decode,
    )
    yield made
    made.close()


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def thread_count() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def epoch_of(pack: Pack, loader: Loader, epoch: int, steps: int | None = None) -> int:
    plan = Plan(
        pack.train, 1, 1, Geometry("random-resized-crop", SIZE, flip=True), Sampling(), 16, seed=0
    )
    reading = loader.iterate(plan.epoch(epoch))
    seen = 0
    for _, images in reading:
        seen += len(images)
        if steps is not None and seen >= 16 * steps:
            break
    reading.close()
    return seen


@pytest.mark.slow
def test_memory_is_flat_over_20_epochs(photos, loader):
    for epoch in range(5):
        assert epoch_of(photos, loader, epoch) == 64
    gc.collect()
    before = resident_bytes()
    for epoch in range(5, 20):
        epoch_of(photos, loader, epoch)
    gc.collect()
    # a batch an epoch that is not let go would be 36 MB, an epoch 144
    assert resident_bytes() - before < 120e6  # of the 540 that a batch an epoch would add up to


def test_threads_do_not_pile_up_where_epochs_are_left_early(photos, loader):
    for epoch in range(3):
        epoch_of(photos, loader, epoch, steps=1)
    before = thread_count()
    for epoch in range(3, 10):
        assert epoch_of(photos, loader, epoch, steps=1 + epoch % 3) >= 16
    assert thread_count() <= before + 1


def test_batches_that_are_kept_stay_as_they_were(photos, loader):
    plan = Plan(
        photos.train, 1, 1, Geometry("random-resized-crop", SIZE, flip=True), Sampling(), 16, seed=0
    )
    kept = [
        (images, images.clone())
        for epoch in range(2)
        for _, images in loader.iterate(plan.epoch(epoch))
    ]
    assert len(kept) == 8 and all(torch.equal(now, then) for now, then in kept)
