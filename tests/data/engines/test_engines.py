"""All engines and ways to decode, side by side on photographs that others trip over: one order, and
nearly the same pixels.
"""

import gc
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers.scenes import by_pillow, saved, scene
from rich.console import Console

from fastlt.data.engines import torch as torch_engine
from fastlt.data.engines.dali import has_dali
from fastlt.data.engines.ffcv.beton import write_beton
from fastlt.data.engines.ffcv.native import has_ffcv
from fastlt.data.engines.gpu import GpuEngine
from fastlt.data.engines.interface import Options
from fastlt.data.geometry import Geometry
from fastlt.data.loader import Loader
from fastlt.data.plan import Batch, Plan, Sampling, evaluation_batches
from fastlt.decode.images import fill_box
from fastlt.decode.region import has_region, has_transcoder
from fastlt.errors import UserError
from fastlt.packing.reader import Pack, open_pack
from fastlt.packing.sources import read_collection
from fastlt.packing.writer import PackOptions, write_pack

SIZE = 96
# grey levels on average, of any image; dali shrinks with other weights
NEAR = {
    "exact": 0.3,
    "region": 1.0,
    "dali": 8.0,
}


@pytest.fixture(scope="module", params=["as they are", "transcoded"])
def edge_pack(request, shared_data: Path, tmp_path_factory) -> Pack:
    transcode = request.param == "transcoded"
    if transcode and not has_transcoder():
        pytest.skip("no libjpeg here")
    folder = tmp_path_factory.mktemp("edge")
    (folder / "images/all").mkdir(parents=True)
    for source in sorted((shared_data / "photos/edge_cases").iterdir()):
        (folder / "images/all" / source.name).symlink_to(source)
    collection = read_collection(folder / "images", None, folder / "images", None, None, None)
    options = PackOptions(folder / "pack", workers=1, transcode=transcode)
    write_pack(collection, options, Console(quiet=True), write_beton if has_ffcv() else None)
    return open_pack(folder / "pack")


def batches_of(pack: Pack, crop: str) -> list[Batch]:
    geometry = {
        "random-resized-crop": Geometry("random-resized-crop", SIZE, flip=True),
        "centre-crop": Geometry("centre-crop", SIZE, resize=110),
    }[crop]
    plan = Plan(pack.train, 1, 1, geometry, Sampling(), 5, seed=3, drop_last=False)
    return [batch for epoch in range(2) for batch in plan.epoch(epoch)]


@pytest.mark.parametrize("crop", ["random-resized-crop", "centre-crop"])
@pytest.mark.parametrize(
    "way", ["torch exact", "torch region", "ffcv exact", "ffcv region", "dali region"]
)
def test_edge_cases_are_near_to_pillows_in_every_engine(edge_pack, way, crop):
    engine, decode = way.split()
    if (
        (engine == "ffcv" and not has_ffcv())
        or (engine == "dali" and not has_dali())
        or (decode == "region" and not has_region())
    ):
        pytest.skip(f"{way} is not to be had here")
    batches = batches_of(edge_pack, crop)
    reference = Loader(edge_pack.train, SIZE, "torch", 0, decode="exact").iterate(batches)
    loader = Loader(edge_pack.train, SIZE, engine, 2, edge_pack.betons("train"), decode=decode)
    made = list(loader.iterate(batches))
    loader.close()
    near = NEAR["dali" if engine == "dali" else decode]
    for (batch, images), (planned, wanted) in zip(made, reference, strict=True):
        assert batch is planned
        assert ((images.int() - wanted.int()).abs().float().mean(dim=(1, 2, 3)) < near).all()
    assert not loader.damaged
    assert sum(len(images) for _, images in made) == 2 * len(edge_pack.train) == 24


def test_engines_that_decode_regions_agree(edge_pack):
    if not (has_ffcv() and has_region()):
        pytest.skip("no FFCV, or no region decoder here")
    batches = batches_of(edge_pack, "random-resized-crop")
    loaders = [
        Loader(edge_pack.train, SIZE, e, 2, edge_pack.betons("train"), decode="region")
        for e in ("torch", "ffcv")
    ]
    ours, theirs = ([images for _, images in loader.iterate(batches)] for loader in loaders)
    difference = torch.cat(
        [(a.int() - b.int()).abs().flatten() for a, b in zip(ours, theirs, strict=True)]
    )
    # progressive ones are decoded whole: see test_ffcv.py
    assert difference.max() <= 1 and difference.float().mean() < 0.05
    for loader in loaders:
        loader.close()


# --- damage, such as libjpeg conceals


@pytest.fixture(scope="module")
def photo_pack(tmp_path_factory) -> tuple[Pack, Path]:
    """Twelve JPEGs of one class, every other with restart markers, and the folder that is theirs
    alone.
    """
    folder = tmp_path_factory.mktemp("photos")
    (folder / "images/a").mkdir(parents=True)
    for i in range(12):
        markers = {"restart_marker_rows": 1} if i % 2 else {}
        data = saved(scene(180 + i, 150), "JPEG", quality=90, subsampling=2, **markers)
        (folder / f"images/a/{i:02}.jpg").write_bytes(data)
    collection = read_collection(folder / "images", None, folder / "images", None, None, None)
    write_pack(
        collection,
        PackOptions(folder / "pack", workers=1),
        Console(quiet=True),
        write_beton if has_ffcv() else None,
    )
    return open_pack(folder / "pack"), folder


def overwrite(file: Path, start: int, written: bytes) -> None:
    with file.open("r+b") as opened:
        opened.seek(start)
        opened.write(written)


@pytest.fixture(params=["middle", "header"])
def hit_pack(request, photo_pack, tmp_path) -> tuple[Pack, list[int]]:
    """A copy of which some images are overwritten in the middle or at the start, and these."""
    shutil.copytree(photo_pack[0].path, tmp_path / "pack")
    pack = open_pack(tmp_path / "pack")
    split, hit = pack.train, [2, 5]
    shard = split.folder / split.shards[0]
    betons = pack.betons("train")
    for image in hit:
        data = bytes(split.read(image))
        place, written = (
            (len(data) // 2, b"\xff\xd9") if request.param == "middle" else (0, bytes(40))
        )
        overwrite(shard, int(split.offset[image]) + place, written)
        for path in betons:
            overwrite(path, path.read_bytes().index(data) + place, written)
    return open_pack(tmp_path / "pack"), hit


@pytest.mark.skipif(not has_region(), reason="fastlt's JPEG decoder is not compiled here")
@pytest.mark.parametrize(
    "way", ["torch exact", "torch region", "ffcv exact", "ffcv region", "dali region", "gpu"]
)
def test_damage_is_found_by_every_engine(hit_pack, way):
    pack, hit = hit_pack
    (batch,) = evaluation_batches(pack.train, Geometry("centre-crop", SIZE, resize=110), 12)

    def loader(strict: bool) -> Loader | GpuEngine:
        if way == "gpu":
            return GpuEngine(pack.train, Options(SIZE, 2, strict=strict), by_pillow)
        engine, decode = way.split()
        return Loader(
            pack.train, SIZE, engine, 2, pack.betons("train"), decode=decode, strict=strict
        )

    def images_of(made: Loader | GpuEngine) -> torch.Tensor:
        (only,) = (
            made.batches([batch])
            if isinstance(made, GpuEngine)
            else (images for _, images in made.iterate([batch]))
        )
        return only

    if ("ffcv" in way and not has_ffcv()) or ("dali" in way and not has_dali()):
        pytest.skip(f"{way} is not to be had here")
    lenient, strict = loader(False), loader(True)
    made = images_of(lenient)
    assert sorted(lenient.damaged) == hit
    for image in hit:
        assert (
            made[image].int() - made[image + 1].int()
        ).abs().float().mean() < 8  # the next one of the class, cut a little other
    with pytest.raises(UserError, match=r"a/02\.jpg"):
        images_of(strict)
    lenient.close()
    strict.close()


def test_workers_do_not_collect_what_the_process_before_them_left(
    photo_pack, tmp_path, monkeypatch
):
    class Library:
        """Ends its threads when it is collected, and leaves a note."""

        def __init__(self) -> None:
            self.cycle = self

        def __del__(self) -> None:
            (tmp_path / f"ended by {os.getpid()}").touch()

    def collecting(*arguments):
        gc.collect()
        return fill_box(*arguments)

    monkeypatch.setattr(torch_engine, "fill_box", collecting)
    (batch,) = evaluation_batches(
        photo_pack[0].train, Geometry("centre-crop", SIZE, resize=110), 12
    )
    gc.disable()
    try:
        Library()
        loader = Loader(photo_pack[0].train, SIZE, "torch", 2)
        assert len(list(loader.iterate([batch]))) == 1
        loader.close()
        assert not gc.isenabled()
    finally:
        gc.enable()
    gc.collect()
    assert [path.name for path in tmp_path.iterdir()] == [f"ended by {os.getpid()}"]


@pytest.mark.skipif(not has_region(), reason="fastlt's JPEG decoder is not compiled here")
def test_damage_that_libjpeg_conceals_is_found_when_packing(photo_pack, tmp_path):
    shutil.copytree(photo_pack[1] / "images", tmp_path / "images")
    broken = tmp_path / "images/a/03.jpg"
    overwrite(broken, broken.stat().st_size // 2, b"\xff\xd9")
    collection = read_collection(
        tmp_path / "images", None, photo_pack[1] / "images", None, None, None
    )
    write_pack(collection, PackOptions(tmp_path / "pack", workers=1), Console(quiet=True))
    (skipped,) = open_pack(tmp_path / "pack").manifest["skipped"]
    assert skipped["path"] == str(broken) and "its JPEG code is damaged" in skipped["reason"]
