"""Images that stand in training more than once."""

import io
from pathlib import Path

import pytest
from helpers.scenes import saved, scene
from rich.console import Console

from fastlt.errors import UserError
from fastlt.packing.reader import open_pack
from fastlt.packing.sources import read_collection
from fastlt.packing.writer import PackOptions, write_pack


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`a/0` stands twice in its class, `a/1` in b and, as an auxiliary, in x too."""
    one, two, *others = (saved(scene(20 + i, 20), "PNG") for i in range(8))
    files = {
        "train/a/0.png": one,
        "train/a/again.png": one,
        "train/a/1.png": two,
        "train/a/2.png": others[0],
        "train/b/1.png": two,
        "train/b/2.png": others[1],
        "extra/x/1.png": two,
        "extra/x/2.png": others[2],
        "val/a/v.png": others[3],
        "val/b/v.png": others[3],
    }
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "pairs.csv").write_text("target,auxiliary\na,x\n")
    return tmp_path


def packed(folder: Path, **options):
    shown = io.StringIO()
    collection = read_collection(
        folder / "train", folder / "extra", folder / "val", folder / "pairs.csv", None, None
    )
    place = PackOptions(folder / "pack", **{"workers": 1, **options})
    write_pack(collection, place, Console(file=shown, width=200))
    return open_pack(folder / "pack"), shown.getvalue()


def test_they_are_reported(folder):
    pack, shown = packed(folder)
    assert len(pack.train) == 8
    assert pack.manifest["duplicates"] == [{"split": "train", "key": "a/again", "first": "a/0"}]
    train = [entry for entry in pack.manifest["conflicts"] if entry["split"] == "train"]
    assert [entry["classes"] for entry in train] == [["a", "b"], ["a", "x"]]
    assert all(not entry["dropped"] for entry in train)
    (val,) = [entry for entry in pack.manifest["conflicts"] if entry["split"] == "val"]
    assert val["classes"] == ["a", "b"]
    assert "1 images stand twice in their class: a/again = a/0" in shown
    assert "3 images stand under several classes (--drop-conflicts leaves those of" in shown


@pytest.mark.parametrize("workers", [1, 2])
def test_conflicts_are_left_out_with_all_their_copies(folder, workers):
    pack, shown = packed(folder, drop_conflicts=True, workers=workers)
    keys = {pack.train.key(image).partition(".")[0] for image in range(len(pack.train))}
    assert keys == {"a/0", "a/again", "a/2", "b/2", "x/2"}
    dropped = [entry for entry in pack.manifest["conflicts"] if entry["dropped"]]
    assert [entry["key"] for entry in dropped] == ["a/1", "b/1", "x/1"]
    assert all(entry["classes"] == ["a", "b", "x"] for entry in dropped)
    assert "3 images stand under several classes and were left out" in shown
    assert pack.space.train_counts == [3, 1, 1]


def test_a_class_that_would_be_empty_is_named(folder):
    (folder / "train/b/2.png").unlink()
    with pytest.raises(UserError, match="all training images of class 'b' stand under other"):
        packed(folder, drop_conflicts=True)
    assert not (folder / "pack").exists()


def test_folders_of_systems_are_no_classes(folder):
    for name in ("__MACOSX", "@eaDir", "lost+found", "$RECYCLE.BIN"):
        (folder / "train" / name).mkdir()
        (folder / "train" / name / "0.png").write_bytes(saved(scene(9, 9), "PNG"))
    (folder / "train/a/@eaDir").mkdir()
    (folder / "train/a/@eaDir/0.png").write_bytes(saved(scene(9, 9), "PNG"))
    pack, shown = packed(folder)
    assert pack.space.target_names == ["a", "b"] and len(pack.train) == 8
    assert "no classes, as systems make such folders: $RECYCLE.BIN, @eaDir, __MACOSX, lo" in shown
