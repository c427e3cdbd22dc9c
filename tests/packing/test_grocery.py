"""The grocery task: which images of which classes, by its list."""

import csv
import shutil

import pytest
from PIL import Image

from fastlt.errors import DataError, UserError
from fastlt.packing.collect import collect

ROWS = [
    ("cox", "target", "2", ""),
    ("pear", "target", "1", ""),
    ("gala", "auxiliary", "9", "cox|pear"),
    ("lime", "random", "9", ""),
]


@pytest.fixture
def folder(tmp_path):
    """Four classes of three training images and two test images, and one with a val image."""
    for split, count in (("train", 3), ("test", 2)):
        for name, *_ in ROWS:
            (tmp_path / split / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (4, 4)).save(tmp_path / split / name / f"{name}_{number}.jpg")
    (tmp_path / "val" / "cox").mkdir(parents=True)
    shutil.copy(tmp_path / "train/cox/cox_0.jpg", tmp_path / "val/cox/v.jpg")
    write_task(tmp_path, ROWS)
    return tmp_path


def write_task(folder, rows, header="class,role,train_images,targets"):
    lines = [header, *(",".join(row) for row in rows)]
    (folder / "task.csv").write_text("\n".join(lines) + "\n")


def keys(refs):
    return [ref.key for ref in refs]


def test_targets_keep_their_first_images_and_the_others_are_for_validation(folder):
    found = collect(f"grocery:{folder}", task="grocery")
    assert found.target_names == ["cox", "pear"] and found.auxiliary_names == ["gala"]
    assert found.pairs == [(0, 2), (1, 2)]
    trained = ["cox/cox_0", "cox/cox_1", "pear/pear_0", "gala/gala_0", "gala/gala_1", "gala/gala_2"]
    assert keys(found.train) == trained
    assert keys(found.val) == ["cox/cox_2", "cox/v", "pear/pear_1", "pear/pear_2"]
    assert keys(found.test) == ["cox/cox_0", "cox/cox_1", "pear/pear_0", "pear/pear_1"]


def test_controls(folder):
    found = collect(f"grocery:{folder}", task="grocery", auxiliary="random")
    assert found.auxiliary_names == ["lime"] and found.pairs == []
    found = collect(f"grocery:{folder}", task="grocery", auxiliary="none")
    assert found.auxiliary_names == [] and len(found.train) == 3


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("cox", "tree", "2", "")], "line 2: a class needs a name, a role"),
        ([("cox", "target", "x", "")], "line 2: a class needs a name, a role"),
        ([*ROWS[:2], ("gala", "auxiliary", "9", "kiwi")], "line 4: 'kiwi' is no target"),
        (ROWS[2:3], "names no target"),
        ([("fig", "target", "1", "")], "holds no photographs"),
    ],
)
def test_a_damaged_list_is_named_by_its_line(folder, rows, message):
    write_task(folder, rows)
    with pytest.raises(DataError, match=message):
        collect(f"grocery:{folder}", task="grocery")


def test_what_does_not_go_together_is_refused(folder):
    for arguments, message in (
        ({"task": "cifar100-lt"}, "grocery needs --task grocery"),
        ({"task": "grocery", "holdout": 0.1}, "leave out --holdout and --imbalance"),
        ({"task": "grocery", "auxiliary": "both"}, "it is one of siblings, random, none"),
    ):
        with pytest.raises(UserError, match=message):
            collect(f"grocery:{folder}", **arguments)
    (folder / "task.csv").unlink()
    with pytest.raises(UserError, match="which lists the role of each class"):
        collect(f"grocery:{folder}", task="grocery")
    write_task(folder, ROWS, "class,kind,train_images,targets")
    with pytest.raises(DataError, match="its columns must be"):
        collect(f"grocery:{folder}", task="grocery")


def test_the_real_list(shared_data):
    place = shared_data / "grocery"
    if not (place / "task.csv").is_file():
        pytest.skip("the grocery photographs are not here")
    found = collect(f"grocery:{place}", task="grocery")
    with (place / "task.csv").open() as file:
        listed = [row for row in csv.DictReader(file) if row["role"] == "target"]
    counts = [sum(ref.label == i for ref in found.train) for i in range(len(listed))]
    assert counts == [int(row["train_images"]) for row in listed]
    assert (len(found.target_names), len(found.auxiliary_names), len(found.pairs)) == (23, 27, 66)
    assert len(found.test) == 658
