"""Parquet files, and folders that `datasets` saved."""

import io
import json
import sys
from pathlib import Path

import pytest
from helpers.scenes import saved, scene
from rich.console import Console

from fastlt.decode.images import BadImage, decode_pil
from fastlt.errors import DataError, MissingExtra
from fastlt.packing.collection import ImageRef
from fastlt.packing.encode import read_bytes
from fastlt.packing.parquet import ROWS_AT_ONCE
from fastlt.packing.reader import open_pack, picture
from fastlt.packing.sources import read_collection
from fastlt.packing.writer import PackOptions, write_pack

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

COUNT = 3 * ROWS_AT_ONCE + 5
IMAGES = [saved(scene(8 + i % 7, 9), "PNG" if i % 3 else "JPEG") for i in range(COUNT)]
LABELS = [i % 2 for i in range(COUNT)]
FEATURES = {
    "image": {"_type": "Image"},
    "label": {"names": ["cat", "dog"], "_type": "ClassLabel"},
}


def of_datasets(images: list[bytes] = IMAGES, labels: list[int] = LABELS) -> "pa.Table":
    """As `datasets` writes images: structs of bytes and path, names in the schema's metadata."""
    structs = [{"bytes": data, "path": f"{i}.jpg"} for i, data in enumerate(images)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", kind), ("label", pa.int64())])
    described = {b"huggingface": json.dumps({"info": {"features": FEATURES}}).encode()}
    columns = {"image": pa.array(structs, kind), "label": pa.array(labels, pa.int64())}
    return pa.table(columns, schema.with_metadata(described))


def read(path: Path, **keys: str):
    return read_collection(path, None, path, None, None, None, None, **keys)


@pytest.mark.parametrize("group", [7, 20, 10_000])
def test_a_parquet_file_of_datasets(tmp_path, group):
    pq.write_table(of_datasets(), tmp_path / "train.parquet", row_group_size=group)
    found = read(tmp_path / "train.parquet")
    assert found.target_names == ["cat", "dog"]
    assert [ref.label for ref in found.train] == LABELS
    assert [read_bytes(ref) for ref in found.train] == IMAGES
    for row in (5, 40, 3, 0, COUNT - 1, 17):  # in any order
        assert read_bytes(found.train[row]) == IMAGES[row]


def test_it_is_packed_by_workers(tmp_path):
    (tmp_path / "data").mkdir()
    for part in range(2):
        pq.write_table(
            of_datasets(), tmp_path / f"data/train-0000{part}-of-00002.parquet", row_group_size=9
        )
    collection = read_collection(tmp_path / "data", None, tmp_path / "data", None, None, None)
    write_pack(collection, PackOptions(tmp_path / "pack", workers=2), Console(file=io.StringIO()))
    pack = open_pack(tmp_path / "pack")
    assert len(pack.train) == 2 * COUNT and pack.space.target_names == ["cat", "dog"]
    for image in (0, 20, COUNT, 2 * COUNT - 1):
        wanted = decode_pil(IMAGES[image % COUNT])
        assert picture(pack.train, image).tobytes() == wanted.tobytes()


@pytest.mark.parametrize("kind", ["binary", "large_binary"])
def test_plain_bytes_and_names(tmp_path, kind):
    table = pa.table(
        {
            "id": pa.array(range(COUNT)),
            "jpg": pa.array(IMAGES, getattr(pa, kind)()),
            "species": pa.array(["x y" if label else "z" for label in LABELS]).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    found = read(tmp_path / "a.parquet")
    assert found.target_names == ["x y", "z"] and [r.label for r in found.train] == [
        1 - label for label in LABELS
    ]
    assert read_bytes(found.train[4]) == IMAGES[4]


def test_columns_are_named_where_several_are_likely(tmp_path):
    image = of_datasets().column("image")
    table = pa.table({"left": image, "right": image, "kind": LABELS})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(
        DataError, match=r"several columns of bytes: .* left, right, kind; name that"
    ):
        read(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no column that is known to hold labels: .* --label-key"):
        read(tmp_path / "a.parquet", image_key="right")
    with pytest.raises(DataError, match="no column 'kind' of bytes"):
        read(tmp_path / "a.parquet", image_key="kind")
    with pytest.raises(DataError, match="no column 'other'"):
        read(tmp_path / "a.parquet", image_key="right", label_key="other")
    found = read(tmp_path / "a.parquet", image_key="right", label_key="kind")
    assert found.train[0].column == "right" and found.target_names == ["0", "1"]


def test_several_splits_are_told_apart(tmp_path):
    for name in ("train", "test"):
        pq.write_table(of_datasets(), tmp_path / f"{name}-00000-of-00001.parquet")
    with pytest.raises(
        DataError, match=r"several splits, test, train: name those of one by a patt"
    ):
        read(tmp_path)
    assert len(read(tmp_path / "train-*.parquet").train) == COUNT
    with pytest.raises(DataError, match="no file matches"):
        read(tmp_path / "dev-*.parquet")


def saved_to_disk(folder: Path) -> Path:
    """As Dataset.save_to_disk writes it: streams of Arrow and a state that names them."""
    folder.mkdir(parents=True)
    table = of_datasets()
    files = []
    for part, start in enumerate((0, 30)):
        name = f"data-0000{part}-of-00002.arrow"
        rows = table.slice(start, 30)
        with (
            pa.OSFile(str(folder / name), "wb") as sink,
            pa.ipc.new_stream(sink, table.schema) as out,
        ):
            out.write_table(rows, max_chunksize=8)
        files.append({"filename": name})
    state = {"_data_files": files, "_fingerprint": "0", "_split": "train"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text(json.dumps({"features": FEATURES}))
    return folder


def test_a_folder_that_datasets_saved(tmp_path):
    folder = saved_to_disk(tmp_path / "all/train")
    found = read(folder)
    assert found.target_names == ["cat", "dog"] and [r.label for r in found.train] == LABELS
    assert [read_bytes(ref) for ref in found.train] == IMAGES
    (tmp_path / "all/dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(DataError, match=r"several splits, train: name one, such as .*all/train"):
        read(tmp_path / "all")
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps(state | {"_indices_files": ["x"]}))
    with pytest.raises(DataError, match=r"save it after flatten_indices\(\)"):
        read(folder)
    (folder / "state.json").write_text("{")
    with pytest.raises(DataError, match=r"is damaged: state\.json cannot be read"):
        read(folder)


def test_what_datasets_itself_writes(tmp_path):
    datasets = pytest.importorskip("datasets")
    images = [{"bytes": data, "path": None} for data in IMAGES]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    made = datasets.Dataset.from_dict({"image": images, "label": LABELS}, features)
    made.to_parquet(tmp_path / "a.parquet")
    made.save_to_disk(tmp_path / "saved")
    for place in ("a.parquet", "saved"):
        found = read(tmp_path / place)
        assert found.target_names == ["cat", "dog"] and [r.label for r in found.train] == LABELS
        assert [read_bytes(ref) for ref in found.train] == IMAGES


@pytest.mark.parametrize("label", [None, 0.5, True, [0, 1], ""])
def test_what_is_no_class_is_named_by_row(tmp_path, label):
    table = pa.table({"image": pa.array(IMAGES[:1], pa.binary()), "label": [label]})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row 0: the label is .* no class"):
        read(tmp_path / "a.parquet")


def test_labels_beyond_the_names_are_named(tmp_path):
    pq.write_table(of_datasets(IMAGES[:2], [0, 2]), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="row 1: label 2 is out of range"):
        read(tmp_path / "a.parquet")


def test_damage_is_one_sentence(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(of_datasets(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot read"):
        read(path)
    with pytest.raises(BadImage, match="its row cannot be read"):
        read_bytes(ImageRef("a", 0, str(path), 3, column="image"))
    empty = [{"bytes": None, "path": "x.jpg"}]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(empty, kind), "label": [0]}), tmp_path / "b.parquet")
    (ref,) = read(tmp_path / "b.parquet").train
    with pytest.raises(BadImage, match="its row holds no bytes"):
        read_bytes(ref)


def test_pyarrow_is_an_extra(tmp_path, monkeypatch):
    pq.write_table(of_datasets(), tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtra, match=r'pip install "fastlt\[parquet\]"'):
        read(tmp_path / "a.parquet")


def test_the_name_of_a_data_set_of_a_hub_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="a data set of a hub is saved first, with `datasets`"):
        read(Path("uoft-cs/cifar10"))
