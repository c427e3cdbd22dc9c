"""Tables of paths and labels, COCO's JSON, and labels with gaps."""

import csv
import json
from pathlib import Path

import pytest
from helpers.scenes import saved, scene

from fastlt.errors import DataError, UserError
from fastlt.packing.sources import read_collection

NAMES = ["cat/a.jpg", "cat/b, c.jpg", 'dog/"d".png', "dog/größe.png"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number, name in enumerate(NAMES):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(saved(scene(10 + number, 12), "JPEG"))
    return tmp_path / "images"


def table(path: Path, rows: list[list[str]], dialect: str = "excel") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, dialect).writerows(rows)
    return path


def read(target: Path, root: Path, val: Path | None = None, **others):
    return read_collection(target, None, val or target, None, root, None, None, **others)


@pytest.mark.parametrize("ending", ["csv", "tsv", "txt"])
@pytest.mark.parametrize("header", [["path", "label"], ["Class", "Filename"], None])
def test_tables_of_names(images, tmp_path, ending, header):
    labels = ["cat", "cat", "dog", "dog"]
    rows = [list(pair) for pair in zip(NAMES, labels, strict=True)]
    if header is None and ending == "txt":
        pytest.skip("without a header that is a split file")
    if header and header[0] == "Class":
        rows = [row[::-1] for row in rows]
    dialect = "excel-tab" if ending == "tsv" else "excel"
    file = table(tmp_path / f"list.{ending}", ([header] if header else []) + rows, dialect)
    found = read(file, images)
    assert found.target_names == ["cat", "dog"]
    assert [ref.label for ref in found.train] == [0, 0, 1, 1]
    assert [ref.path for ref in found.train] == [f"{images}/{name}" for name in NAMES]


def test_tables_of_numbers_take_the_names_of_folders(images, tmp_path):
    rows = [
        ["image_path", "other", "class_id"],
        *([n, "x", str(i // 2)] for i, n in enumerate(NAMES)),
    ]
    found = read(table(tmp_path / "list.csv", rows), images)
    assert found.target_names == ["cat", "dog"] and [r.label for r in found.train] == [0, 0, 1, 1]


def test_columns_may_be_named(images, tmp_path):
    rows = [["wo", "was", "label"], *([name, name[:3], "1"] for name in NAMES)]
    file = table(tmp_path / "list.csv", rows)
    with pytest.raises(DataError, match=r"no column that is known to hold paths: name one of wo, "):
        read(file, images)
    found = read(file, images, image_key="wo", label_key="was")
    assert found.target_names == ["cat", "dog"]
    with pytest.raises(DataError, match="no column 'wer': name one of wo, was, label"):
        read(file, images, image_key="wer")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["path", "label"]], "lists no images below its header"),
        ([["path", "label"], ["cat/a.jpg"]], "line 2: it has 1 values, too few"),
        ([["path", "label"], ["cat/a.jpg", ""]], "line 2: it has no label"),
        ([["path", "label"], ["", "cat"]], "line 2: it has no path"),
        ([["path", "label"], ["../a.jpg", "cat"]], "line 2: ../a.jpg leaves the root"),
        ([["path", "label"], ["cat/a.jpg", "1"], ["cat/z.jpg", "1"]], "line 3: there is no image"),
        ([["path", "label"], ["cat/a.jpg", "-1"]], "line 2: label -1 is out of range"),
        ([["path", "label"], ["cat/a.jpg", "1;2"]], "line 2: '1;2' are several labels"),
    ],
)
def test_bad_tables_are_named_by_line(images, tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        read(table(tmp_path / "list.csv", rows), images)


# --- labels with gaps


def test_gaps_are_refused_and_numbered_anew(images, tmp_path):
    rows = [["path", "label"], *([name, str(3 + 4 * (i // 2))] for i, name in enumerate(NAMES))]
    file = table(tmp_path / "list.csv", rows)
    with pytest.raises(DataError, match=r"labels must run from 0 .* --relabel numbers them anew"):
        read(file, images)
    val = table(tmp_path / "val.csv", [rows[0], rows[3]])
    found = read(file, images, val, relabel=True)
    assert [ref.label for ref in found.train] == [0, 0, 1, 1]
    assert [ref.label for ref in found.val] == [1]
    assert found.target_names == ["cat", "dog"]


def test_without_names_classes_keep_their_numbers(images, tmp_path):
    rows = [
        ["path", "label"],
        [NAMES[0], "30"],
        [NAMES[1], "7"],
        [NAMES[2], "7"],
        [NAMES[3], "100"],
    ]
    found = read(table(tmp_path / "list.csv", rows), images, relabel=True)
    assert found.target_names == ["7", "30", "100"]
    assert [ref.label for ref in found.train] == [1, 0, 0, 2]
    stranger = table(tmp_path / "val.csv", [["path", "label"], [NAMES[0], "8"]])
    with pytest.raises(DataError, match=r"val\.csv: label 8 is no class of the training set"):
        read(tmp_path / "list.csv", images, stranger, relabel=True)


def test_class_names_go_by_the_old_numbers(images, tmp_path):
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\ndog\n")
    rows = [["path", "label"], *([name, str(2 * (i // 2) + 1)] for i, name in enumerate(NAMES))]
    file = table(tmp_path / "list.csv", rows)
    found = read_collection(
        file, None, file, None, images, tmp_path / "names.txt", None, relabel=True
    )
    assert found.target_names == ["bee", "dog"]


def test_names_need_no_relabelling(images, tmp_path):
    file = table(tmp_path / "list.csv", [["path", "label"], *([name, name[:3]] for name in NAMES)])
    with pytest.raises(UserError, match="--relabel is for integer labels, but the classes of"):
        read(file, images, relabel=True)


# --- COCO


def coco(path: Path, **changes) -> Path:
    content = {
        "info": {"year": 2018},
        "images": [{"id": 10 + i, "file_name": name, "width": 12} for i, name in enumerate(NAMES)],
        "annotations": [
            {"id": i, "image_id": 10 + i, "category_id": 90 - i // 2} for i in range(4)
        ],
        "categories": [
            {"id": 89, "name": "dog"},
            {"id": 90, "name": "cat"},
            {"id": 3, "name": "cow"},
        ],
    }
    path.write_text(json.dumps(content | changes))
    return path


def test_coco_as_inaturalist_has_it(images, tmp_path):
    found = read(coco(tmp_path / "train2018.json"), images)
    assert found.target_names == ["dog", "cat"]  # in the order of the file; none without images
    assert [ref.label for ref in found.train] == [1, 1, 0, 0]
    assert found.train[1].path == f"{images}/cat/b, c.jpg" and not found.warnings


def test_coco_says_what_it_leaves_out(images, tmp_path):
    annotations = [
        {"image_id": 10, "category_id": 90, "bbox": [0, 0, 1, 1]},
        {"image_id": 10, "category_id": 90, "bbox": [1, 1, 1, 1]},
        {"image_id": 11, "category_id": 90},
        {"image_id": 11, "category_id": 89},
        {"image_id": 12, "category_id": 89},
    ]
    found = read(coco(tmp_path / "a.json", annotations=annotations), images)
    assert [ref.label for ref in found.train] == [1, 0]
    said = "\n".join(found.warnings)
    assert "1 images left out that show several categories" in said
    assert "1 images left out that have no category" in said and "boxes are not cut out" in said


def test_names_that_are_not_unique_get_their_numbers(images, tmp_path):
    same = [{"id": 89, "name": "x"}, {"id": 90, "name": "x"}]
    assert read(coco(tmp_path / "a.json", categories=same), images).target_names == ["x 89", "x 90"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": [{"id": 1}]}, "is not of COCO's form"),
        ({"categories": None}, "is not of COCO's form"),
        ({"categories": []}, "category 89 is annotated, but not listed"),
        ({"annotations": []}, "lists no images that show one category"),
        ({"images": [{"id": 10, "file_name": "gone.jpg"}]}, "there is no image .*gone.jpg"),
        ({"images": [{"id": 10, "file_name": "/etc/passwd"}]}, "leaves the root folder"),
    ],
)
def test_bad_coco_is_refused(images, tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        read(coco(tmp_path / "a.json", **changes), images)
    (tmp_path / "b.json").write_text("[" * 100_000)
    with pytest.raises(DataError, match="is not of COCO's form"):
        read(tmp_path / "b.json", images)
