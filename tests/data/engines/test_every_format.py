"""One folder of everything that people have, through packing and every engine."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.deep_files import netpbm, png16, rgb_tiff, tiff
from helpers.scenes import saved, scene
from PIL import Image
from rich.console import Console

from fastlt.data.engines.dali import has_dali
from fastlt.data.engines.ffcv.beton import write_beton
from fastlt.data.engines.ffcv.native import has_ffcv
from fastlt.data.geometry import Geometry
from fastlt.data.loader import Loader
from fastlt.data.plan import evaluation_batches
from fastlt.decode.images import decode_pil, fill_box
from fastlt.decode.region import has_region
from fastlt.packing.reader import Pack, open_pack
from fastlt.packing.sources import read_collection
from fastlt.packing.writer import PackOptions, write_pack

SIZE = 64
# grey levels, on average over all images
NEAR = {"exact": 1.0, "region": 1.0, "dali": 3.0}


def everything(height: int, width: int) -> dict[str, bytes]:
    """Names and bytes; what cannot be used begins with `bad`."""
    image = scene(height, width)
    twelve_bits = np.asarray(image, np.uint16) * 16
    grey = twelve_bits[..., :1]
    pages = io.BytesIO()
    image.save(pages, "TIFF", save_all=True, append_images=[scene(20, 20)])
    film = io.BytesIO()
    image.save(film, "GIF", save_all=True, append_images=[scene(20, 20)])
    files = {
        "bitmap.BMP": saved(image, "BMP"),
        "plain.ppm": saved(image, "PPM"),
        "grey.pgm": saved(image.convert("L"), "PPM"),
        "page.tiff": pages.getvalue(),
        "film.gif": film.getvalue(),
        "photo.jfif": saved(image, "JPEG", quality=95),
        "photo.JPG": saved(image, "JPEG", turn=6, quality=95),
        "two.jpg": saved(image, "MPO", save_all=True, append_images=[scene(30, 30)]),
        "new.avif": saved(image, "AVIF", quality=95),
        "no_extension": saved(image, "PNG"),
        "scan.0001": saved(image, "WEBP", quality=95),
        "palette.png": saved(image.quantize(64), "PNG"),
        "alpha.png": saved(Image.merge("RGBA", [*image.split(), image.getchannel(0)]), "PNG"),
        "x ray 12.png": png16(grey),
        "colour 16.png": png16(twelve_bits),
        "colour.tif": rgb_tiff(twelve_bits),
        "microscope.TIF": tiff(grey[..., 0]),
        "lzw.tif": tiff(grey[..., 0], "tiff_lzw"),
        "grey 16.pgm": netpbm(grey[..., 0]),
        "heights.tif": tiff(grey[..., 0].astype(np.float32) / 1000),
        "größe ñ 猫.png": saved(image, "PNG"),
        "bad_cut.tif": tiff(grey[..., 0])[:2000],
        "bad_empty.png": b"",
        "bad_words.bmp": b"no image at all",
    }
    for module, kind, name in (("pillow_heif", "HEIF", "a.heic"), ("pillow_jxl", "JXL", "a.jxl")):
        try:
            plugin = __import__(module)
        except ImportError:
            continue
        getattr(plugin, "register_heif_opener", lambda: None)()
        buffer = io.BytesIO()
        image.save(buffer, kind, quality=95)
        files[name] = buffer.getvalue()
    return files


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("all"), 90, 120)


@pytest.fixture(scope="module")
def pack(folder, tmp_path_factory) -> Pack:
    return packed(folder, tmp_path_factory.mktemp("packed") / "pack")


def written(folder: Path, height: int, width: int) -> Path:
    for part in ("train", "val"):
        (folder / part / "things").mkdir(parents=True)
        for name, data in everything(height, width).items():
            (folder / part / "things" / name).write_bytes(data)
        (folder / part / "things" / "notes.txt").write_text("no image")
    return folder


def packed(folder: Path, place: Path) -> Pack:
    collection = read_collection(folder / "train", None, folder / "val", None, None, None)
    console = Console(file=io.StringIO(), width=300)
    write_beton_where_possible = write_beton if has_ffcv() else None
    write_pack(collection, PackOptions(place, workers=1), console, write_beton_where_possible)
    (place.parent / "shown").write_text(console.file.getvalue())
    return open_pack(place)


def test_each_file_is_taken_or_listed(pack, folder):
    files = everything(90, 120)
    listed = {Path(entry["path"]).name for entry in pack.manifest["skipped"]}
    assert listed == {name for name in files if name.startswith("bad")}
    assert len(pack.train) == len(files) - 3
    assert all(entry["reason"] for entry in pack.manifest["skipped"])
    shown = (pack.path.parent / "shown").read_text()
    assert "1 files left out that are no images (1 x .txt)" in shown
    assert "have several pages or frames, of which the first was taken" in shown
    several = {Path(entry["path"]).name for entry in pack.manifest["first_frames"]}
    assert several == {"page.tiff", "film.gif"}
    for kind in ("16-bit", "floating-point"):
        assert f"{kind} images: values from" in shown
    ends = {pack.train.key(image).rpartition(".")[2] for image in range(len(pack.train))}
    assert ends == {"jpg", "png", "webp"}


@pytest.mark.parametrize(
    "way",
    ["torch exact", "torch region", "ffcv exact", "ffcv region", "dali region"],
)
def test_every_engine_is_near_to_pillow(pack, folder, way):
    engine, decode = way.split()
    missing = {"ffcv": not has_ffcv(), "dali": not has_dali()}.get(engine, False)
    if missing or (decode == "region" and not has_region()):
        pytest.skip(f"{way} is not to be had here")
    check(pack, folder, engine, decode)


def test_the_resident_engine_is_near_too(tmp_path):
    folder = written(tmp_path, 48, 48)  # it keeps small images of one size alone
    check(packed(folder, tmp_path / "pack"), folder, "resident", "exact")


def check(pack: Pack, folder: Path, engine: str, decode: str) -> None:
    """Hold the images of an engine to Pillow's of the sources."""
    (batch,) = evaluation_batches(pack.train, Geometry("centre-crop", SIZE, resize=72), 100)
    loader = Loader(pack.train, SIZE, engine, 2, pack.betons("train"), decode=decode)
    ((_, made),) = loader.iterate([batch])
    loader.close()
    assert not loader.damaged
    sources = sorted(p for p in (folder / "train/things").iterdir())
    wanted = []
    usable = [p for p in sources if not p.name.startswith("bad") and p.suffix != ".txt"]
    for path, box in zip(usable, batch.boxes, strict=True):
        image = decode_pil(path.read_bytes(), scale=pack.scale)
        wanted.append(torch.from_numpy(fill_box(image, box, False, SIZE).copy()))
    difference = (made.int() - torch.stack(wanted).int()).abs().float().mean(dim=(1, 2, 3))
    assert difference.mean() < NEAR["dali" if engine == "dali" else decode]
    assert difference.max() < 12
    assert torch.stack(wanted).float().mean(dim=(1, 2, 3)).min() > 30  # none is black


def test_commands_work_on_it(pack, folder, tmp_path):
    from fastlt import evaluate, load, train

    settings = {"data.workers": 0, "train.epochs": 1, "data.size": 32, "data.batch": 8}
    settings |= {"model.name": "resnet20", "loss.name": "ce", "data.auxiliary": False}
    shutil.copytree(pack.path, tmp_path / "pack")
    train(
        "cifar100-lt", data=tmp_path / "pack", out=tmp_path / "run", settings=settings, quiet=True
    )
    assert 0 <= evaluate(tmp_path / "run")["top1"] <= 100
    model = load(tmp_path / "run")
    assert model.scale == pack.scale
    path = folder / "train/things/x ray 12.png"
    ours = model.transform(path)
    from_pack = decode_pil(path.read_bytes(), scale=pack.scale)
    assert torch.equal(ours, model.transform(np.array(from_pack)))
    whole = load(tmp_path / "run", range="full").transform(path)
    assert not torch.equal(ours, whole)
