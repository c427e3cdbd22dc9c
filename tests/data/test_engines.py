"""All engines and ways to decode, side by side on photographs that others trip over: one order, and nearly the same pixels."""

from pathlib import Path

import pytest
import torch
from rich.console import Console

from fastlt.data.augment import Geometry
from fastlt.data.dali import has_dali
from fastlt.data.loader import Loader
from fastlt.data.native import has_ffcv
from fastlt.data.pack import PackOptions, write_pack
from fastlt.data.packed import Pack, open_pack
from fastlt.data.plan import Batch, Plan, Sampling
from fastlt.data.region import has_region, has_transcoder
from fastlt.data.source import read_collection

SIZE = 96
NEAR = {"exact": 0.3, "region": 1.0, "dali": 8.0}  # grey levels on average, of any image; dali shrinks with other weights


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
    options = PackOptions(folder / "pack", workers=1, transcode=transcode, beton=has_ffcv())
    write_pack(collection, options, Console(quiet=True))
    return open_pack(folder / "pack")


def batches_of(pack: Pack, crop: str) -> list[Batch]:
    geometry = {
        "random-resized-crop": Geometry("random-resized-crop", SIZE, flip=True),
        "centre-crop": Geometry("centre-crop", SIZE, resize=110),
    }[crop]
    plan = Plan(pack.train, 1, 1, geometry, Sampling(), 5, seed=3, drop_last=False)
    return [batch for epoch in range(2) for batch in plan.epoch(epoch)]


@pytest.mark.parametrize("crop", ["random-resized-crop", "centre-crop"])
@pytest.mark.parametrize("way", ["torch exact", "torch region", "ffcv exact", "ffcv region", "dali region"])
def test_edge_cases_are_near_to_pillows_in_every_engine(edge_pack, way, crop):
    engine, decode = way.split()
    if (engine == "ffcv" and not has_ffcv()) or (engine == "dali" and not has_dali()) or (decode == "region" and not has_region()):
        pytest.skip(f"{way} is not to be had here")
    batches = batches_of(edge_pack, crop)
    reference = Loader(edge_pack.train, SIZE, "torch", 0, decode="exact").iterate(batches)
    loader = Loader(edge_pack.train, SIZE, engine, 2, edge_pack.beton.get("train"), decode=decode)
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
    loaders = [Loader(edge_pack.train, SIZE, e, 2, edge_pack.beton.get("train"), decode="region") for e in ("torch", "ffcv")]
    ours, theirs = ([images for _, images in loader.iterate(batches)] for loader in loaders)
    difference = torch.cat([(a.int() - b.int()).abs().flatten() for a, b in zip(ours, theirs, strict=True)])
    assert difference.max() <= 1 and difference.float().mean() < 0.05  # progressive ones are decoded whole: see test_ffcv.py
    for loader in loaders:
        loader.close()
