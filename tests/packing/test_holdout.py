"""Validation images that are taken out of training, and test images that training never reads."""

from pathlib import Path

import numpy as np
import pytest
from helpers.scenes import saved, scene
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from fastlt.cli import app
from fastlt.errors import UserError
from fastlt.packing.collect import collect
from fastlt.packing.collection import Collection, ImageRef
from fastlt.packing.concat import concat_packs
from fastlt.packing.holdout import Together, hold_out
from fastlt.packing.reader import Pack, open_pack
from fastlt.packing.relabel import Selection, derive_pack
from fastlt.packing.sources import read_collection
from fastlt.packing.writer import PackOptions, verify_pack, write_pack

QUIET = Console(quiet=True)
SIBLINGS = ("--task", "cifar100-siblings", "--auxiliary", "none", "--workers", 1)


def images(root: Path, counts: dict[str, int], start: int) -> Path:
    """Class folders of images that are all different."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            start += 1
            (root / name / f"{i:02}.png").write_bytes(saved(scene(20 + start, 20), "PNG"))
    return root


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("holdout")
    images(root / "train", {"a": 20, "b": 5, "c": 2, "d": 1}, 0)
    images(root / "extra", {"x": 6}, 50)
    images(root / "val", {"a": 1, "b": 1}, 70)
    images(root / "test", {"a": 2, "c": 1}, 80)
    (root / "pairs.csv").write_text("target,auxiliary\na,x\n")
    return root


def held_out(folders: Path, share: float) -> Collection:
    collection = read_collection(folders / "train", folders / "extra", None, folders / "pairs.csv")
    hold_out(collection, share)
    return collection


def counts(refs: list[ImageRef]) -> list[int]:
    return np.bincount([ref.label for ref in refs], minlength=5).tolist()


def test_a_share_of_each_class_is_held_out(folders):
    collection = held_out(folders, 0.2)
    assert counts(collection.val) == [4, 1, 1, 0, 0]
    assert counts(collection.train) == [16, 4, 1, 1, 6]
    assert {ref.path for ref in collection.val}.isdisjoint(ref.path for ref in collection.train)
    assert held_out(folders, 0.2) == collection


def test_every_class_keeps_a_training_image(folders):
    collection = held_out(folders, 0.9)
    assert counts(collection.val) == [18, 4, 1, 0, 0]
    assert counts(collection.train) == [2, 1, 1, 1, 6]


def write(path: Path, number: int) -> ImageRef:
    path.write_bytes(saved(scene(20 + number, 20), "PNG"))
    return ImageRef(path.stem, 0, str(path))


def test_images_with_the_same_bytes_stay_together(tmp_path):
    same = [write(tmp_path / f"{i}.png", i // 2) for i in range(20)]
    for share in (0.1, 0.2, 0.5, 0.7):
        collection = Collection(["a"], list(same), [])
        hold_out(collection, share)
        train, val = (
            {Path(ref.path).read_bytes() for ref in part}
            for part in (collection.train, collection.val)
        )
        assert train and val and not train & val


def test_images_of_two_classes_stay_in_train(tmp_path):
    names = ["a", "b"]
    refs = [write(tmp_path / f"{i}.png", i % 3) for i in range(6)]
    labels = [0, 0, 1, 0, 2, 1]  # image 1 is also an auxiliary one
    collection = Collection(
        names,
        [ImageRef(r.key, label, r.path) for r, label in zip(refs, labels, strict=True)],
        [],
        ["x"],
    )
    hold_out(collection, 0.5)
    assert [ref.key for ref in collection.val] == ["0", "3"]
    collection = Collection(["b"], [refs[2], refs[5]], [])
    with pytest.raises(UserError, match="no class with two different images"):
        hold_out(collection, 0.5)


@pytest.mark.parametrize("share", [-0.1, 0, 1, float("nan")])
def test_a_share_outside_its_range_is_refused(share):
    with pytest.raises(UserError, match="--holdout is"):
        hold_out(Collection(["a"], [], []), share)


# --- the pack


def packed(folders: Path, out: Path, **options) -> Pack:
    collection = read_collection(folders / "train", None, folders / "val", test=folders / "test")
    return open_pack(write_pack(collection, PackOptions(out, workers=1, **options), QUIET))


def test_a_pack_has_its_test_images(folders, tmp_path):
    pack = packed(folders, tmp_path / "pack")
    assert pack.test is not None and pack.test.label.tolist() == [0, 0, 2]
    assert pack.test.name == "test" and pack.test.folder == pack.path / "test"
    first = folders / "test/a/00.png"
    assert bytes(pack.test.read(0)) == first.read_bytes()
    counts = pack.manifest["counts"]
    assert (counts["train"], counts["val"], counts["test"]) == (28, 2, 3)
    assert pack.manifest["shards"]["test"] == ["test-000000.tar"]
    assert verify_pack(pack.path) == 5
    with np.load(pack.path / "index.npz") as index:
        assert index["test_label"].tolist() == [0, 0, 2]


def test_a_damaged_test_shard_is_found(folders, tmp_path):
    pack = packed(folders, tmp_path / "pack")
    shard = pack.path / "test/test-000000.tar"
    data = bytearray(shard.read_bytes())
    data[600] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"test-000000\.tar is damaged"):
        verify_pack(pack.path)
    shard.write_bytes(data[:-10])
    with pytest.raises(UserError, match=r"test-000000\.tar is damaged"):
        open_pack(pack.path)


def test_a_pack_without_test_images_has_none(folders, tmp_path):
    collection = read_collection(folders / "train", None, folders / "val")
    pack = open_pack(write_pack(collection, PackOptions(tmp_path / "pack", workers=1), QUIET))
    assert pack.test is None and "test" not in pack.manifest["counts"]
    with pytest.raises(UserError, match="has no test images"):
        read_collection(folders / "train", None, folders / "val", test=pack.path)


@pytest.mark.parametrize("drop", [False, True])
def test_test_images_in_train_and_val_are_reported(folders, tmp_path, drop):
    for name in ("train", "val", "test"):
        (tmp_path / name).symlink_to(folders / name)
    (tmp_path / "leaky/a").mkdir(parents=True)
    for i, source in enumerate(("train/a/03.png", "val/a/00.png", "test/a/01.png")):
        (tmp_path / f"leaky/a/{i}.png").write_bytes((folders / source).read_bytes())
    collection = read_collection(folders / "train", None, folders / "val", test=tmp_path / "leaky")
    console = Console(record=True, width=200)
    options = PackOptions(tmp_path / "pack", workers=1, drop_leaks=drop)
    pack = open_pack(write_pack(collection, options, console))
    assert pack.manifest["leaks"] == [
        {"train": "a/03", "test": "a/0", "dropped": drop},
        {"test": "a/1", "val": "a/00-1", "dropped": False},
    ]
    assert len(pack.train) == 28 - drop and pack.test is not None and len(pack.test) == 3
    text = console.export_text()
    assert "1 test images are validation images too: a/1 = a/00-1" in text
    assert ("1 training images are test images too (--drop-leaks" in text) is not drop


def test_tables_made_from_a_pack_with_test_images(folders, tmp_path):
    pack = packed(folders, tmp_path / "pack")
    mixed = concat_packs(pack, {"again": pack}, {"again": 1.0})
    assert mixed.test is pack.test
    again = read_collection(pack.path, None, pack.path, test=pack.path)
    assert [ref.label for ref in again.test] == [0, 0, 2]
    chosen = Selection(np.arange(2), np.zeros(2, np.int64))
    derived = open_pack(derive_pack(pack, tmp_path / "derived", ["all"], chosen, chosen))
    assert derived.test is None and verify_pack(derived.path) == 4


# --- the command


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["pack", *map(str, arguments)], catch_exceptions=True)
    return str(result.exception) if isinstance(result.exception, UserError) else result.output


def test_the_command_packs_a_holdout_and_test_images(folders, tmp_path):
    run(
        *("--target", folders / "train", "--test", folders / "test", "--holdout", 0.2),
        *("--out", tmp_path / "pack", "--workers", 1, "--max-side", 12),
    )
    pack = open_pack(tmp_path / "pack")
    assert (len(pack.train), len(pack.val)) == (22, 6) and pack.test is not None
    assert pack.manifest["images"]["max_side"] == 12 and pack.train.height.max() <= 12


def test_what_does_not_go_with_a_holdout(folders, tmp_path):
    target = ("--target", folders / "train")
    assert "--holdout takes the place of --val" in run(
        *target, "--holdout", 0.1, "--val", folders / "val"
    )
    assert "--val (or --holdout)" in run(*target)
    assert "do not go with cifar100:DIR" in run("cifar100:x", "--test", folders / "test")


@pytest.fixture(scope="module")
def plain(shared_data, tmp_path_factory) -> Pack:
    out = tmp_path_factory.mktemp("cifar") / "plain"
    run(f"cifar100:{shared_data / 'cifar100'}", *SIBLINGS, "--out", out)
    return open_pack(out)


def test_cifar_keeps_its_test_images_with_a_holdout(shared_data, plain, tmp_path):
    source = f"cifar100:{shared_data / 'cifar100'}"
    run(source, *SIBLINGS, "--holdout", 0.1, "--out", tmp_path / "held")
    held = open_pack(tmp_path / "held")
    assert plain.test is None and held.test is not None
    assert (held.test.label == plain.val.label).all()
    assert all(held.test.read(i) == plain.val.read(i) for i in range(0, len(plain.val), 97))
    assert len(held.train) + len(held.val) == len(plain.train)
    assert (np.bincount(held.val.label, minlength=20) > 0).all()


def test_what_a_task_leaves_out_can_validate(shared_data, plain, tmp_path):
    source = f"cifar100:{shared_data / 'cifar100'}"
    run(source, *SIBLINGS, "--val", "unused", "--out", tmp_path / "unused")
    unused = open_pack(tmp_path / "unused")
    assert (unused.train.label == plain.train.label).all()
    assert (unused.test.label == plain.val.label).all()
    counts = np.bincount(unused.val.label, minlength=20)
    assert (counts + plain.space.train_counts == 500).all()
    assert {unused.val.key(i) for i in range(len(unused.val))}.isdisjoint(
        unused.train.key(i) for i in range(len(unused.train))
    )
    whole = run(source, "--task", "cifar100-lt", "--val", "unused", "--out", tmp_path / "whole")
    assert "--val unused: cifar100-lt leaves no training images out" in whole
    assert "do not go with grocery:DIR" in run("grocery:x", "--task", "grocery", "--val", "unused")


# --- what stays together


def photographs(folder, classes=("a", "b"), each=10):
    """Write smooth images that are all different, `each` a class; return their folder."""
    rng = np.random.default_rng(5)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for i in range(each):
            small = Image.fromarray(rng.integers(0, 256, (6, 6, 3)).astype(np.uint8))
            small.resize((96, 96), Image.Resampling.BICUBIC).save(folder / name / f"{i}.png")
    return folder


def test_resized_and_recompressed_images_stay_on_one_side(tmp_path):
    folder = photographs(tmp_path / "images")
    for i in range(8):
        image = Image.open(folder / "a" / f"{i}.png")
        image.resize((70, 70)).save(folder / "a" / f"{i}-copy.jpg", quality=60)
    for share in (0.2, 0.4):
        collection = collect(target=folder, holdout=share, together=Together(near=True))
        train, val = (
            {ref.key.removesuffix("-copy") for ref in refs if ref.key.startswith("a/")}
            for refs in (collection.train, collection.val)
        )
        assert not train & val and val


def test_what_cannot_be_read_is_no_image_to_keep(tmp_path):
    """Of a class with one good image that one stays in training, whatever else lies there."""
    folder = photographs(tmp_path / "images", each=2)
    (folder / "a" / "1.png").write_bytes((folder / "a" / "0.png").read_bytes()[:20])
    for near in (False, True):
        collection = collect(target=folder, holdout=0.4, together=Together(near=near))
        assert [ref.key[0] for ref in collection.val] == ["b"]
    (folder / "a" / "1.png").write_bytes((folder / "a" / "0.png").read_bytes()[:-400])
    collection = collect(target=folder, holdout=0.4, together=Together(near=True))
    assert [ref.key[0] for ref in collection.val] == ["b"]  # its pixels are cut off


def table(path, rows):
    path.write_text("image,group\n" + "".join(f"{image},{group}\n" for image, group in rows))
    return path


def test_named_groups_stay_on_one_side_across_classes(tmp_path):
    folder = photographs(tmp_path / "images", each=12)
    rows = [(f"{name}/{i}.png", f"patient{i // 3}") for name in "ab" for i in range(12)]
    groups = table(tmp_path / "groups.csv", rows)
    collection = collect(target=folder, holdout=0.25, together=Together(groups))
    of = {f"{name.split('/')[0]}/{name.split('/')[1][:-4]}": group for name, group in rows}
    train, val = ({of[ref.key] for ref in refs} for refs in (collection.train, collection.val))
    assert not train & val and len(val) == 1
    assert {ref.label for ref in collection.val} == {0, 1}
    assert len(collection.train) + len(collection.val) == 24


def test_a_table_of_groups_that_does_not_fit_is_refused(tmp_path):
    folder = photographs(tmp_path / "images", each=3)
    for rows, message in (
        ([("a/9.png", 1)], r"line 2: 'a/9\.png' names no training image"),
        ([("a/1.png", 1), ("1.png", 2)], r"line 3: '1\.png' names 2 training images"),
    ):
        groups = table(tmp_path / "groups.csv", rows)
        with pytest.raises(UserError, match=message):
            collect(target=folder, holdout=0.3, together=Together(groups))
    (tmp_path / "groups.csv").write_text("file,group\n")
    with pytest.raises(UserError, match="no column 'image'"):
        collect(target=folder, holdout=0.3, together=Together(tmp_path / "groups.csv"))
    with pytest.raises(UserError, match="--groups is for --holdout"):
        collect(target=folder, val=folder, together=Together(tmp_path / "groups.csv"))
