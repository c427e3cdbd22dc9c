"""Packing: what is stored and how, what is refused, and that no half pack is ever left behind."""

import hashlib
import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fastlt.data.engines.ffcv.beton import write_beton
from fastlt.data.engines.ffcv.native import has_ffcv
from fastlt.decode.images import MAX_PIXELS, decode
from fastlt.errors import UserError
from fastlt.packing.cifar import open_cifar
from fastlt.packing.collection import Collection, ImageRef
from fastlt.packing.encode import ImageSettings, encode
from fastlt.packing.reader import Pack, open_pack
from fastlt.packing.shards import ShardWriter, member_keys
from fastlt.packing.sources import read_cifar100, read_collection
from fastlt.packing.writer import PackOptions, WriteBeton, verify_pack, write_pack

AS_THEY_ARE = ImageSettings(max_side=0, quality=0, max_pixels=MAX_PIXELS)
ORIENTATION = 0x0112


def picture(seed: int, height: int = 24, width: int = 32) -> Image.Image:
    """Smooth random colours."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def data_set(root: Path, train: int = 3, val: int = 1) -> Path:
    """Targets cat and dog, auxiliary wolf, all images different."""
    seed = 0
    for split, classes, images in (
        ("train", ("cat", "dog"), train),
        ("val", ("cat", "dog"), val),
        ("extra", ("wolf",), train),
    ):
        for name in classes:
            (root / split / name).mkdir(parents=True)
            for i in range(images):
                (root / split / name / f"{i}.jpg").write_bytes(encoded(picture(seed := seed + 1)))
    (root / "pairs.csv").write_text("target,auxiliary\ndog,wolf\n")
    return root


def collect(root: Path) -> Collection:
    return read_collection(
        root / "train", root / "extra", root / "val", root / "pairs.csv", None, None
    )


def pack(
    collection: Collection,
    out: Path,
    workers: int = 1,
    console: Console | None = None,
    write_beton: WriteBeton | None = None,
    **options: Any,
) -> Pack:
    write_pack(
        collection,
        PackOptions(out, workers=workers, **options),
        console or Console(quiet=True),
        write_beton,
    )
    return open_pack(out)


def refs(files: list[Path], label: int = 0) -> list[ImageRef]:
    return [ImageRef(f"class{label}/{file.stem}", label, str(file)) for file in files]


def no_trace_of(out: Path) -> bool:
    return not any(out.name in path.name for path in out.parent.iterdir())


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    return data_set(tmp_path / "pets")


# What a pack holds


def test_pack_holds_the_images_untouched_and_in_order(pets: Path, tmp_path: Path) -> None:
    collection = collect(pets)
    found = pack(collection, tmp_path / "pack")
    for split, sources in ((found.train, collection.train), (found.val, collection.val)):
        assert [bytes(split.read(i)) for i in range(len(split))] == [
            Path(ref.path).read_bytes() for ref in sources
        ]
        assert split.label.tolist() == [ref.label for ref in sources]
        assert set(zip(split.height.tolist(), split.width.tolist(), strict=True)) == {(24, 32)}
    assert [found.train.key(i) for i in (0, 3, 6)] == ["cat/0.jpg", "dog/0.jpg", "wolf/0.jpg"]
    assert found.val.key(0) == "cat/0-1.jpg"  # a key is unique in the pack
    assert found.space.names == ["cat", "dog", "wolf"]
    assert (found.space.train_counts, found.space.val_counts, found.space.pairs) == (
        [3, 3, 3],
        [1, 1],
        [(1, 2)],
    )
    assert found.space.origins == {"wolf": str(pets / "extra")}


def test_manifest_tells_everything(pets: Path, tmp_path: Path) -> None:
    manifest = pack(collect(pets), tmp_path / "pack", max_side=512).manifest
    assert (
        manifest["format_version"] == 1
        and manifest["created"].endswith("+00:00")
        and manifest["fastlt"]
    )
    assert manifest["counts"] == {"train": 9, "val": 2, "targets": 2, "auxiliaries": 1, "pairs": 1}
    assert manifest["images"] == {
        "scale": {},
        "max_side": 512,
        "quality": 0,
        "max_pixels": MAX_PIXELS,
        "transcode": False,
    }
    assert manifest["shards"] == {"train": ["train-000000.tar"], "val": ["val-000000.tar"]}
    assert (manifest["skipped"], manifest["leaks"]) == ([], [])
    on_disk = {
        str(path.relative_to(tmp_path / "pack")): path
        for path in (tmp_path / "pack").rglob("*")
        if path.is_file()
    }
    del on_disk["manifest.json"]
    assert set(manifest["files"]) == set(on_disk)
    for name, path in on_disk.items():
        data = path.read_bytes()
        assert manifest["files"][name] == {
            "size": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }


def test_shards_are_webdataset_tars_that_say_nothing_of_the_machine(
    pets: Path, tmp_path: Path
) -> None:
    found = pack(collect(pets), tmp_path / "pack")
    with tarfile.open(found.train.folder / "train-000000.tar") as tar:
        members = tar.getmembers()
        labels = [tar.extractfile(member).read() for member in members[1::2]]
    assert [member.name for member in members[:4]] == [
        "cat/0.jpg",
        "cat/0.cls",
        "cat/1.jpg",
        "cat/1.cls",
    ]
    assert labels == [str(label).encode() for label in found.train.label]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {
        (0, 0, 0, "", "", 0o644)
    }
    assert [member.offset_data for member in members[::2]] == found.train.offset.tolist()


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar command on this machine")
def test_plain_tar_extracts_a_shard(pets: Path, tmp_path: Path) -> None:
    found = pack(collect(pets), tmp_path / "pack")
    subprocess.run(
        ["tar", "xf", found.train.folder / "train-000000.tar", "-C", tmp_path], check=True
    )
    assert (tmp_path / "wolf" / "2.jpg").read_bytes() == (
        pets / "extra" / "wolf" / "2.jpg"
    ).read_bytes()


def test_a_pack_is_a_source_again(pets: Path, tmp_path: Path) -> None:
    found = pack(collect(pets), tmp_path / "pack")
    again = read_collection(
        tmp_path / "pack" / "val", None, tmp_path / "pack" / "val", None, None, None
    )
    assert [ref.label for ref in again.train] == found.val.label.tolist()


def test_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    collection = collect(data_set(tmp_path / "pets", train=25))
    folders = [
        pack(collection, tmp_path / f"pack{workers}", workers, shard_size=20_000).path
        for workers in (1, 2)
    ]
    one, two = (
        {str(p.relative_to(f)): p.read_bytes() for p in f.rglob("*") if p.is_file()}
        for f in folders
    )
    manifests = [json.loads(files.pop("manifest.json")) for files in (one, two)]
    assert one == two and len(one) > 5
    assert (
        len({manifest.pop("created") for manifest in manifests}) >= 1
        and manifests[0] == manifests[1]
    )


def test_shards_keep_to_their_size(tmp_path: Path) -> None:
    found = pack(
        collect(data_set(tmp_path / "pets", train=20)), tmp_path / "pack", shard_size=16_384
    )
    sizes = [(found.train.folder / name).stat().st_size for name in found.train.shards]
    assert len(sizes) > 3 and max(sizes) <= 16_384
    assert (
        found.train.shard.tolist() == sorted(found.train.shard.tolist())
        and found.train.shard.max() == len(sizes) - 1
    )
    assert all(decode(found.train.read(i)).shape == (24, 32, 3) for i in range(len(found.train)))
    alone = pack(collect(tmp_path / "pets"), tmp_path / "alone", shard_size=1)
    assert len(alone.train.shards) == len(alone.train) == 60


def test_shard_writer_aligns_members_of_any_size(tmp_path: Path) -> None:
    contents = [bytes([1]) * size for size in (0, 1, 511, 512, 513, 1024)]
    with ShardWriter(tmp_path / "odd", 2**20) as shards:
        places = [shards.add(str(i), ".jpg", data, i) for i, data in enumerate(contents)]
    stored = (tmp_path / "odd" / "odd-000000.tar").read_bytes()
    assert [
        stored[offset : offset + len(data)]
        for (_, offset), data in zip(places, contents, strict=True)
    ] == contents


def test_member_keys() -> None:
    assert member_keys(
        ["a/b", "a/b", "a/b-1", "a.b/c.d", "a b/../é", "__meta__/x", "", "/root"]
    ) == [
        "a/b",
        "a/b-1",
        "a/b-1-1",
        "a_b/c_d",
        "a_b/x/é",
        "meta/x",
        "x",
        "root",
    ]
    long = member_keys(["ü" * 200 + f"/{i}" for i in range(20)] + ["y" * 300] * 20)
    assert len(set(long)) == 40 and all(len(f"{key}.webp".encode()) <= 100 for key in long)


def test_beton_files_belong_to_the_pack(pets: Path, tmp_path: Path) -> None:
    if not has_ffcv():
        pytest.skip("FFCV is not installed")
    found = pack(collect(pets), tmp_path / "pack", write_beton=write_beton)
    assert found.betons("train") == (found.path / "train.beton",) and found.betons("val") == (
        found.path / "val.beton",
    )
    assert {"train.beton", "val.beton"} <= set(found.manifest["files"])
    assert verify_pack(tmp_path / "pack") == 6


# What is stored of an image


def stored_like(data: bytes, **settings: int) -> tuple[bytes, str, tuple[int, int]]:
    stored, extension, height, width = encode(
        data, ImageSettings(**({"max_side": 0, "quality": 0, "max_pixels": MAX_PIXELS} | settings))
    )
    return stored, extension, (height, width)


@pytest.mark.parametrize(
    ("image", "kind", "options"),
    [
        (picture(1), "JPEG", {}),
        (picture(1), "JPEG", {"progressive": True}),
        (picture(1).convert("L"), "JPEG", {}),
        (picture(1).convert("CMYK"), "JPEG", {}),
        (picture(1), "PNG", {}),
        (picture(1).convert("L"), "PNG", {}),
        (picture(1), "WEBP", {}),
        (picture(1), "WEBP", {"lossless": True}),
    ],
)
def test_plain_images_are_stored_untouched(
    image: Image.Image, kind: str, options: dict[str, Any]
) -> None:
    data = encoded(image, kind, **options)
    assert stored_like(data) == (
        data,
        {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp"}[kind],
        (24, 32),
    )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("number", [3, 6])
def test_rotated_images_have_the_size_of_the_upright_one(kind: str, number: int) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = number
    data = encoded(picture(1), kind, exif=exif)
    stored, extension, size = stored_like(data)
    assert size == ((24, 32) if number == 3 else (32, 24)) and np.array_equal(
        decode(stored), decode(data)
    )
    assert (stored == data, extension) == ((True, ".jpg") if kind == "JPEG" else (False, ".png"))


@pytest.mark.parametrize(
    "data",
    [
        encoded(picture(2).convert("RGBA"), "PNG"),
        encoded(picture(2).quantize(8), "PNG"),
        encoded(picture(2), "PNG", transparency=(1, 2, 3)),
        encoded(picture(2), "PNG", save_all=True, append_images=[picture(3)]),
        encoded(picture(2), "WEBP", save_all=True, append_images=[picture(3)]),
        encoded(Image.merge("RGBA", [*picture(2).split(), picture(3).convert("L")]), "WEBP"),
    ],
    ids=[
        "RGBA",
        "palette",
        "colour key",
        "animated PNG",
        "animated WebP",
        "WebP with alpha",
    ],
)
def test_odd_images_become_lossless_rgb_png(data: bytes) -> None:
    stored, extension, _ = stored_like(data)
    assert extension == ".png" and stored != data
    assert Image.open(io.BytesIO(stored)).mode == "RGB"
    assert np.array_equal(decode(stored), decode(data))


def test_max_side_shrinks_larger_images_only() -> None:
    small, large = encoded(picture(1, 60, 100), "PNG"), encoded(picture(1, 120, 200), "PNG")
    assert stored_like(small, max_side=100) == (small, ".png", (60, 100))
    stored, extension, size = stored_like(large, max_side=100)
    assert (extension, size) == (".jpg", (60, 100)) and decode(stored).shape == (60, 100, 3)
    halved = np.asarray(Image.open(io.BytesIO(large)).reduce(2)).astype(int)
    assert np.abs(decode(stored) - halved).mean() < 2
    rough = stored_like(large, max_side=100, quality=30)[0]
    assert len(rough) < len(stored) and stored_like(small, max_side=100, quality=30)[0] == small
    assert stored_like(encoded(picture(1, 2, 900)), max_side=100)[2] == (1, 100)


def test_max_side_turns_images_upright_first() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    stored, _, size = stored_like(encoded(picture(1, 120, 200), exif=exif), max_side=100)
    assert size == (100, 60) and decode(stored).shape == (100, 60, 3)


def test_quality_alone_makes_jpeg_of_all() -> None:
    stored, extension, size = stored_like(encoded(picture(1).convert("RGBA"), "PNG"), quality=90)
    assert (extension, size, stored[:2]) == (".jpg", (24, 32), b"\xff\xd8")
    assert np.abs(decode(stored).astype(int) - np.asarray(picture(1))).mean() < 4


# Images that cannot be used


@pytest.fixture
def damaged(pets: Path) -> Path:
    """One bad image of each kind among the dogs, which have three good ones."""
    dogs = pets / "train" / "dog"
    whole = encoded(picture(99, 200, 300))
    half = encoded(picture(98, 100, 100))
    (dogs / "empty.jpg").write_bytes(b"")
    (dogs / "page.png").write_bytes(b"<html>404 Not Found</html>")
    (dogs / "truncated.jpg").write_bytes(half[: len(half) // 2])
    (dogs / "bomb.jpg").write_bytes(whole)
    (dogs / "gone.jpg").symlink_to(pets / "nowhere.jpg")
    os.mkfifo(dogs / "pipe.jpg")
    return pets


def test_bad_images_are_skipped_and_listed(damaged: Path, tmp_path: Path) -> None:
    console = Console(record=True, file=io.StringIO(), width=300)
    found = pack(collect(damaged), tmp_path / "pack", console=console, max_pixels=59_999)
    reasons = {Path(entry["path"]).name: entry["reason"] for entry in found.manifest["skipped"]}
    assert set(reasons) == {
        "empty.jpg",
        "page.png",
        "truncated.jpg",
        "bomb.jpg",
        "gone.jpg",
        "pipe.jpg",
    }
    assert reasons["empty.jpg"] == "empty file"
    assert reasons["page.png"] == "not an image (JPEG, PNG, WebP, GIF, AVIF, BMP, TIFF or PPM)"
    assert "truncated" in reasons["truncated.jpg"]
    assert reasons["bomb.jpg"] == "300 x 200 pixels are more than the limit of 59999"
    assert reasons["gone.jpg"] == "cannot be read: No such file or directory"
    assert reasons["pipe.jpg"] == "not a regular file"
    assert {
        (entry["split"], entry["key"].split("/")[0]) for entry in found.manifest["skipped"]
    } == {("train", "dog")}
    assert (
        found.space.train_counts == [3, 3, 3]
        and len(found.train) == found.manifest["counts"]["train"] == 9
    )
    shown = console.export_text()
    assert (
        "6 images were skipped" in shown and "not an image (JPEG" not in shown.split("skipped")[0]
    )


def test_file_names_that_are_not_text(pets: Path, tmp_path: Path) -> None:
    odd = Path(os.fsdecode(bytes(pets / "train" / "dog") + b"/\xff"))
    try:
        odd.with_suffix(".jpg").write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    odd.with_suffix(".png").write_bytes(encoded(picture(88), "PNG"))
    screen = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    found = pack(collect(pets), tmp_path / "pack", console=Console(file=screen))
    assert found.space.train_counts == [3, 4, 3] and found.train.key(6).startswith("dog/x")
    assert [os.fsencode(entry["path"])[-5:] for entry in found.manifest["skipped"]] == [b"\xff.jpg"]


def test_strict_stops_at_the_first_bad_image(damaged: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dog/empty\.jpg \(dog/empty\): empty file; .*--strict"):
        pack(collect(damaged), tmp_path / "pack", strict=True)
    assert no_trace_of(tmp_path / "pack")


def test_a_class_that_loses_all_its_images_is_an_error(pets: Path, tmp_path: Path) -> None:
    for file in (pets / "extra" / "wolf").iterdir():
        file.write_bytes(b"rubbish")
    with pytest.raises(
        UserError,
        match=r"no training image of class 'wolf' can be used.*wolf/2\.jpg: not an image",
    ):
        pack(collect(pets), tmp_path / "pack")
    assert no_trace_of(tmp_path / "pack")


def test_val_that_loses_all_its_images_is_an_error(pets: Path, tmp_path: Path) -> None:
    for file in (pets / "val").rglob("*.jpg"):
        file.write_bytes(b"")
    with pytest.raises(
        UserError,
        match=r"none of the validation images can be used; the first, .*val/cat/0\.jpg .*: empty "
        r"file",
    ):
        pack(collect(pets), tmp_path / "pack")


# Images that are in train and in val


@pytest.fixture
def leaking(pets: Path) -> Path:
    shutil.copy(pets / "val" / "dog" / "0.jpg", pets / "train" / "cat" / "leak.jpg")
    shutil.copy(pets / "val" / "dog" / "0.jpg", pets / "extra" / "wolf" / "leak.jpg")
    return pets


def test_leaks_are_reported(leaking: Path, tmp_path: Path) -> None:
    console = Console(record=True, file=io.StringIO(), width=300)
    found = pack(collect(leaking), tmp_path / "pack", console=console)
    assert found.manifest["leaks"] == [
        {"train": "cat/leak", "val": "dog/0-1", "dropped": False},
        {"train": "wolf/leak", "val": "dog/0-1", "dropped": False},
    ]
    assert len(found.train) == 11
    assert (
        "2 training images are validation images too (--drop-leaks leaves them out)"
        in console.export_text()
    )


def test_leaks_are_found_when_images_are_re_encoded_and_dropped_when_asked(
    leaking: Path, tmp_path: Path
) -> None:
    found = pack(collect(leaking), tmp_path / "pack", drop_leaks=True, quality=50)
    assert [leak["dropped"] for leak in found.manifest["leaks"]] == [True, True]
    assert found.space.train_counts == [3, 3, 3]
    assert not any("leak" in found.train.key(i) for i in range(len(found.train)))


def test_dropping_all_of_a_class_is_an_error(pets: Path, tmp_path: Path) -> None:
    shutil.rmtree(pets / "extra" / "wolf")
    shutil.copytree(pets / "val" / "dog", pets / "extra" / "wolf")
    with pytest.raises(
        UserError,
        match=r"no training image of class 'wolf' can be used; .*: it is a validation image too",
    ):
        pack(collect(pets), tmp_path / "pack", drop_leaks=True)


def test_duplicates_of_cifar_100_are_found(shared_data: Path, tmp_path: Path) -> None:
    """cifar100/SOURCE.txt: 10 training images are pixel for pixel test images.

    Packed are those and ten others.
    """
    cifar = open_cifar(shared_data / "cifar100")
    pixels = {}
    for split, files in (("train", cifar.train), ("test", cifar.test)):
        strips = (
            np.asarray(Image.open(places[0][0]).convert("RGB")).reshape(len(places), -1)
            for places in files
        )
        pixels[split] = [[row.tobytes() for row in strip] for strip in strips]
    tests = {row for rows in pixels["test"] for row in rows}
    trains = {row for rows in pixels["train"] for row in rows}
    shared = [[i for i, row in enumerate(rows) if row in tests] for rows in pixels["train"]]
    assert sum(map(len, shared)) == 10
    train = [
        ref for fine in range(100) for ref in cifar.refs("train", fine, 0, shared[fine])
    ] + cifar.refs("train", 0, 0, range(10))
    val = [
        ref
        for fine, rows in enumerate(pixels["test"])
        for ref in cifar.refs("test", fine, 0, [i for i, row in enumerate(rows) if row in trains])
    ]
    found = pack(Collection(["any"], train, val), tmp_path / "pack")
    assert len(found.manifest["leaks"]) == 10
    for leak in found.manifest["leaks"]:
        assert leak["train"] != leak["val"]


# Small real data


def test_cifar_images_are_packed_losslessly(shared_data: Path, tmp_path: Path) -> None:
    collection = read_cifar100(shared_data / "cifar100", "cifar100-siblings")
    collection.train = [
        ref for label in range(50) for ref in [r for r in collection.train if r.label == label][:2]
    ]
    collection.val = collection.val[::50]
    found = pack(collection, tmp_path / "pack")
    assert found.space.num_auxiliaries == 30 and len(found.space.pairs) == 60
    for i in range(0, 100, 9):
        ref = collection.train[i]
        strip = np.asarray(Image.open(ref.path).convert("RGB")).reshape(-1, 32, 32, 3)
        assert np.array_equal(decode(found.train.read(i)), strip[ref.part])
        assert found.train.key(i).endswith(".png")


def test_real_photos(shared_data: Path, tmp_path: Path) -> None:
    files = sorted((shared_data / "photos" / "edge_cases").iterdir())
    found = pack(Collection(["photo"], refs(files), refs(files[:1])), tmp_path / "pack")
    assert [bytes(found.train.read(i)) for i in range(12)] == [file.read_bytes() for file in files]
    sizes = [Image.open(file).size for file in files]
    assert list(zip(found.train.width.tolist(), found.train.height.tolist(), strict=True)) == sizes


# Bad input and bad luck


def test_an_existing_output_is_refused_and_an_empty_one_taken(pets: Path, tmp_path: Path) -> None:
    out = tmp_path / "pack"
    out.mkdir()
    pack(collect(pets), out)
    before = (out / "manifest.json").read_bytes()
    with pytest.raises(UserError, match=r"pack exists already: remove it or choose another --out"):
        pack(collect(pets), out)
    assert (out / "manifest.json").read_bytes() == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"file exists already"):
        pack(collect(pets), tmp_path / "file")
    with pytest.raises(UserError, match=r"cannot write .*file/pack: .*file is not a folder"):
        pack(collect(pets), tmp_path / "file" / "pack")


def test_nothing_to_pack(pets: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="there are no images to pack: 0 for training, 2 for validation"
    ):
        pack(Collection(["cat"], [], collect(pets).val), tmp_path / "pack")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quality": 101}, "--quality is 101"),
        ({"max_side": -1}, "--max-side is -1"),
        ({"workers": -2}, "--workers is -2"),
    ],
)
def test_bad_options(pets: Path, tmp_path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pack(collect(pets), tmp_path / "pack", **options)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("only root can mount a small disk")
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True, check=False
    ).returncode:
        pytest.skip("mounting is not permitted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_one_clear_sentence_and_leaves_nothing(
    tiny_disk: Path, tmp_path: Path, workers: int
) -> None:
    collection = collect(data_set(tmp_path / "pets"))
    collection.train *= 200
    with pytest.raises(
        UserError,
        match=r"^the disk is full, so .*/pack was not written: free some space or choose another "
        r"--out$",
    ):
        pack(collection, tiny_disk / "pack", workers)
    assert list(tiny_disk.iterdir()) == []


def test_a_worker_that_dies_is_an_error_not_a_hang(pets: Path, tmp_path: Path) -> None:
    def kill_the_first() -> None:
        while not (children := multiprocessing.active_children()):
            time.sleep(0.001)
        os.kill(children[0].pid, signal.SIGKILL)

    collection = collect(pets)
    collection.train *= 300
    killer = threading.Thread(target=kill_the_first)
    killer.start()
    with pytest.raises(UserError, match="a worker process died"):
        pack(collection, tmp_path / "pack", workers=2)
    killer.join()
    assert no_trace_of(tmp_path / "pack")


def packing_in_a_child(collection: Collection, out: Path) -> int:
    """Forks a packing process that stops itself amid the training images, and returns its id once
    it stands still there.
    """
    child = os.fork()
    if child == 0:
        # a shell's background job starts with Ctrl-C ignored
        signal.signal(signal.SIGINT, signal.default_int_handler)
        stop_at_image(len(collection.val) + 100)
        try:
            write_pack(collection, PackOptions(out, workers=1), Console(quiet=True))
        except KeyboardInterrupt:
            os._exit(3)
        except SystemExit as stop:
            os._exit(int(str(stop.code)))
        os._exit(0)
    assert os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1]), "it ended before it stopped"
    return child


def stop_at_image(number: int) -> None:
    """Makes this process stop, as with Ctrl-Z, where it writes that image: no test need hope that a
    signal comes in time.
    """
    write, written = ShardWriter.add, itertools.count(1)

    def add(*arguments: Any) -> tuple[int, int]:
        if next(written) == number:
            os.kill(os.getpid(), signal.SIGSTOP)
        return write(*arguments)

    ShardWriter.add = add  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 3), (signal.SIGTERM, 128 + signal.SIGTERM)]
)
def test_an_interrupted_pack_leaves_nothing(
    pets: Path, tmp_path: Path, number: int, code: int
) -> None:
    collection = collect(pets)
    collection.train *= 100
    child = packing_in_a_child(collection, tmp_path / "pack")
    os.kill(child, number)
    os.kill(child, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == code
    assert no_trace_of(tmp_path / "pack")


def test_a_killed_pack_is_no_pack_and_its_remains_go_with_the_next(
    pets: Path, tmp_path: Path
) -> None:
    out = tmp_path / "pack"
    collection = collect(pets)
    long = Collection(
        collection.target_names, collection.train * 100, collection.val, collection.auxiliary_names
    )
    child = packing_in_a_child(long, out)
    with pytest.raises(UserError, match=r"another process is writing .*pack now"):
        pack(collection, out)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not out.exists() and [path.name[:6] for path in tmp_path.glob(".*")] == [".pack."]
    with pytest.raises(UserError, match="there is no pack at"):
        open_pack(out)
    (tmp_path / ".pack.v2.12345678.partial").mkdir()  # of another pack
    pack(collection, out)
    assert [path.name for path in tmp_path.glob(".*")] == [".pack.v2.12345678.partial"]


KILLED = """
import sys
from pathlib import Path
from rich.console import Console
from fastlt.packing.writer import PackOptions, write_pack
from fastlt.packing.sources import read_collection
root, out = map(Path, sys.argv[1:])
collection = read_collection(root / "train", None, root / "val", None, None, None)
collection.train *= 20_000
write_pack(collection, PackOptions(out, workers=2), Console(quiet=True))
"""


@pytest.mark.skipif(
    not Path("/proc/self/task").exists(),
    reason="needs /proc to find the workers of another process",
)
def test_workers_of_a_killed_pack_end_too(pets: Path, tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", KILLED, pets, tmp_path / "pack"])
    while not list(tmp_path.glob(".pack.*.partial/train/*.tar")):
        assert process.poll() is None
        time.sleep(0.005)
    workers = [
        int(child)
        for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]
    assert len(workers) >= 2
    process.kill()
    process.wait()
    deadline = time.monotonic() + 60
    while any(is_running(worker) for worker in workers):
        assert time.monotonic() < deadline, "workers outlived their parent"
        time.sleep(0.005)


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_workers_do_not_import_torch() -> None:
    code = "import sys, fastlt.packing.encode, fastlt.utils.pool; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Damaged packs


def test_verify_reads_every_byte(pets: Path, tmp_path: Path) -> None:
    found = pack(collect(pets), tmp_path / "pack")
    assert verify_pack(tmp_path / "pack") == 4 == len(found.manifest["files"])
    for name in found.manifest["files"]:
        file = tmp_path / "pack" / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(
            UserError, match=f"{name} is damaged: its bytes do not match the manifest"
        ):
            verify_pack(tmp_path / "pack", Console(quiet=True))
        file.write_bytes(whole)
    assert verify_pack(tmp_path / "pack") == 4


def test_truncated_and_missing_files_are_named_at_every_start(pets: Path, tmp_path: Path) -> None:
    found = pack(collect(pets), tmp_path / "pack")
    for name in found.manifest["files"]:
        file = tmp_path / "pack" / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-1])
        for opened in (open_pack, verify_pack):
            with pytest.raises(
                UserError,
                match=rf"{name} is damaged: it has {len(whole) - 1} bytes, the manifest says "
                rf"{len(whole)}",
            ):
                opened(tmp_path / "pack")
        file.unlink()
        with pytest.raises(UserError, match=f"{name} is missing from the pack"):
            open_pack(tmp_path / "pack")
        file.write_bytes(whole)


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("[]", "is not a pack: its manifest.json is of something else"),
        ('{"name": "web app"}', "is not a pack: its manifest.json is of something else"),
        ('{"format_version": 99}', "has pack format 99, this version reads 1"),
        ("{", "is not a pack: it has no readable manifest.json"),
    ],
)
def test_what_is_no_pack_says_so(tmp_path: Path, manifest: str, message: str) -> None:
    (tmp_path / "manifest.json").write_text(manifest)
    for opened in (open_pack, verify_pack):
        with pytest.raises(UserError, match=message):
            opened(tmp_path)
    with pytest.raises(UserError, match="there is no pack at"):
        verify_pack(tmp_path / "nothing")


def test_a_damaged_index_of_the_right_size_is_named(pets: Path, tmp_path: Path) -> None:
    found = pack(collect(pets), tmp_path / "pack")
    index = found.path / "index.npz"
    index.write_bytes(bytes(index.stat().st_size))
    with pytest.raises(UserError, match=r"index\.npz is damaged"):
        open_pack(found.path)


# On screen


def test_summary(pets: Path, tmp_path: Path) -> None:
    (pets / "train" / "owl").mkdir()
    (pets / "train" / "owl" / "1.jpg").write_bytes(encoded(picture(77)))
    (pets / "extra" / "fox").mkdir()
    (pets / "extra" / "fox" / "1.jpg").write_bytes(encoded(picture(78)))
    console = Console(record=True, file=io.StringIO(), width=300)
    pack(collect(pets), tmp_path / "pack", console=console)
    shown = " ".join(console.export_text().split())
    assert "3: no many, no medium, 3 few" in shown
    assert "2 in 1 pairs" in shown
    assert "1 target classes have no validation images: owl" in shown
    assert "1 auxiliary classes neighbour no target: fox" in shown
    assert "images/s" in shown
