"""One class an image: several labels, and shares of classes, are refused in words."""

import pytest

from fastlt.errors import DataError
from fastlt.packing.labels import check_single
from fastlt.packing.sources import read_collection


@pytest.mark.parametrize("label", ["0", "17", "-1", "otter", "3 toed sloth", "1st", ""])
def test_one_class_is_one_class(label):
    check_single(label, "here")


@pytest.mark.parametrize("label", ["1 2", "0,3,5", "[1, 2]", "4|7", "1;2", "(3 4)"])
def test_several_labels_are_told(label):
    with pytest.raises(DataError, match=r"here: .* are several labels"):
        check_single(label, "here")


@pytest.mark.parametrize("label", ["0.7", "0.7 0.3", "1:0.5,2:0.5", "[0.1, 0.9]", "3:1", ".1 .9"])
def test_soft_labels_are_told(label):
    with pytest.raises(DataError, match=r"here: .* is a soft label"):
        check_single(label, "here")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("a/0.png 0 1", "several labels"),
        ("a/0.png 0.25", "soft label"),
        ("b c/0.png 1,0", "several"),
    ],
)
def test_lists_are_refused(image_folders, tmp_path, line, message):
    (tmp_path / "train.txt").write_text(f"a/1.png 0\n{line}\n")
    with pytest.raises(DataError, match=rf"train\.txt, line 2: .*{message}"):
        read_collection(tmp_path / "train.txt", None, tmp_path / "train.txt", None)
