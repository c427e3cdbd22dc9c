import io
from pathlib import Path

import numpy as np
import pytest
from helpers.deep_files import netpbm, png16, tiff
from helpers.scenes import saved, scene
from rich.console import Console

from fastlt.decode.deep import Range
from fastlt.decode.images import decode_pil
from fastlt.errors import UserError
from fastlt.packing.depth import check_range, find_scale, named_scale
from fastlt.packing.reader import Pack, open_pack, picture
from fastlt.packing.shards import ShardWriter
from fastlt.packing.sources import read_collection
from fastlt.packing.writer import PackOptions, write_pack
from fastlt.utils.pool import ordered_map


def xray(number: int, most: int = 4095) -> np.ndarray:
    """(H, W, 1) uint16, of which the largest value is `most`."""
    grey = np.asarray(scene(40 + number, 50).convert("L"), np.float64)[..., None]
    return np.rint(grey / grey.max() * most).astype(np.uint16)


@pytest.fixture
def xrays(tmp_path: Path) -> Path:
    """Images of twelve bits in files of sixteen, some photographs among them."""
    for part, count in (("train", 6), ("val", 2)):
        for name in ("healthy", "ill"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                (folder / f"{i}.png").write_bytes(png16(xray(i)))
            (folder / "photo.jpg").write_bytes(saved(scene(30, 30), "JPEG"))
    return tmp_path


def packed(folder: Path, out: Path, shown: io.StringIO | None = None, **options) -> Pack:
    console = Console(file=shown or io.StringIO(), width=200)
    collection = read_collection(folder / "train", None, folder / "val", None, None, None)
    write_pack(collection, PackOptions(out=out, workers=1, **options), console)
    return open_pack(out)


def test_auto_takes_the_percentiles_of_what_does_not_fill_its_bits(xrays, tmp_path):
    shown = io.StringIO()
    pack = packed(xrays, tmp_path / "pack", shown)
    pooled = np.concatenate([xray(i).ravel() for i in range(6)])
    chosen = pack.scale["16-bit"]
    assert chosen.low == pytest.approx(np.percentile(pooled, 0.1), abs=4)
    assert chosen.high == pytest.approx(np.percentile(pooled, 99.9), abs=4) and chosen.high > 3000
    said = f"16-bit images: values from {chosen} become black to white"
    assert said in shown.getvalue() and "--range LOW,HIGH" in shown.getvalue()
    assert "percentiles 0.1 and 99.9 of 12 images" in shown.getvalue()
    for image in range(len(pack.train)):
        if "photo" in pack.train.key(image):
            continue
        number = int(Path(pack.train.key(image)).stem)
        pixels = np.asarray(picture(pack.train, image), np.float64)
        wanted = (xray(number) - chosen.low) / (chosen.high - chosen.low) * 255
        assert np.abs(pixels - wanted.clip(0, 255)).max() <= 0.51
        assert pixels.mean() > 60  # not black


def test_what_fills_its_bits_keeps_the_whole_range(tmp_path):
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        (tmp_path / part / "a" / "0.pgm").write_bytes(netpbm(xray(3, 60000)[..., 0]))
    shown = io.StringIO()
    assert packed(tmp_path, tmp_path / "pack", shown).scale == {"16-bit": Range(0, 65535)}
    assert "the whole range, which 1 images fill" in shown.getvalue()


@pytest.mark.parametrize(
    ("option", "wanted"),
    [("full", Range(0, 65535)), ("0,4095", Range(0, 4095)), ("-1.5,1e4", Range(-1.5, 1e4))],
)
def test_the_range_may_be_named(xrays, tmp_path, option, wanted):
    pack = packed(xrays, tmp_path / "pack", range=option)
    assert pack.scale["16-bit"] == wanted
    first = decode_pil(png16(xray(0)), scale={"16-bit": wanted})
    keys = [pack.train.key(i) for i in range(len(pack.train))]
    assert picture(pack.train, keys.index("healthy/0.png")).tobytes() == first.tobytes()


@pytest.mark.parametrize("option", ["", "3", "5,5", "9,1", "0,inf", "a,b", "1,2,3", "AUTO"])
def test_what_is_no_range_is_refused(xrays, tmp_path, option):
    with pytest.raises(UserError, match=r"--range is '.*': it must be auto, full, or two numbers"):
        packed(xrays, tmp_path / "pack", range=option)
    assert not (tmp_path / "pack").exists()
    with pytest.raises(UserError, match="--range"):
        named_scale(option)


def test_auto_is_for_packing():
    assert check_range("auto") == "auto"
    with pytest.raises(UserError, match="--range auto is for packing"):
        named_scale("auto")


def test_each_kind_of_value_has_its_own_range(xrays, tmp_path):
    floats = np.random.default_rng(0).normal(40, 5, (30, 30)).astype(np.float32)
    (xrays / "train/ill/heights.tif").write_bytes(tiff(floats))
    scale = packed(xrays, tmp_path / "pack").scale
    assert set(scale) == {"16-bit", "floating-point"}
    assert scale["floating-point"].low == pytest.approx(np.percentile(floats, 0.1), abs=1e-3)


def test_a_deep_image_under_a_jpegs_name_is_listed_where_nothing_else_is_deep(tmp_path):
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        (tmp_path / part / "a" / "photo.jpg").write_bytes(saved(scene(30, 30), "JPEG"))
    (tmp_path / "train/a/odd.jpg").write_bytes(png16(xray(1)))
    pack = packed(tmp_path, tmp_path / "pack")
    (skipped,) = pack.manifest["skipped"]
    assert skipped["path"].endswith("odd.jpg") and "give --range" in skipped["reason"]
    assert pack.scale == {} and len(pack.train) == 1
    assert len(packed(tmp_path, tmp_path / "again", range="0,4095").train) == 2


def test_shards_are_looked_into(xrays, tmp_path):
    with ShardWriter(tmp_path / "shards", 2**20) as shards:
        for i in range(4):
            shards.add(f"healthy/{i}", ".png", png16(xray(i)), "healthy")
            shards.add(f"ill/{i}", ".jpg", saved(scene(30, 30 + i), "JPEG"), "ill")
    collection = read_collection(tmp_path / "shards", None, xrays / "val", None, None, None)
    with ordered_map(1) as apply:
        scale, sentences = find_scale("auto", collection.train, collection.val, apply)
    assert 3000 < scale["16-bit"].high <= 4095
    assert len(sentences) == 1 and "of 4 images" in sentences[0]


def test_packs_without_deep_images_have_no_range(tmp_path):
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        (tmp_path / part / "a" / "0.png").write_bytes(saved(scene(20, 20), "PNG"))
        (tmp_path / part / "a" / "1.bmp").write_bytes(saved(scene(21, 20), "BMP"))
    shown = io.StringIO()
    pack = packed(tmp_path, tmp_path / "pack", shown)
    assert pack.scale == {} and pack.manifest["images"]["scale"] == {}
    assert "black to white" not in shown.getvalue()
    for damaged in ({}, {"scale": 3}, {"scale": {"16-bit": "x"}}, None):
        pack.manifest["images"] = damaged
        assert pack.scale == {}
