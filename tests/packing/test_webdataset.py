"""Shards that other tools wrote."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from helpers.scenes import saved, scene

from fastlt.errors import DataError
from fastlt.packing.encode import read_bytes
from fastlt.packing.sources import read_collection

IMAGES = [saved(scene(10 + i, 14), "JPEG") for i in range(4)]


def shard(path: Path, members: list[tuple[str, bytes]], form: int) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            header.mtime = 1700000000.5  # not an integer: in a header of PAX alone
            tar.addfile(header, io.BytesIO(data))
    return path


def read(path: Path, **keys: str):
    return read_collection(path, None, path, None, None, None, None, **keys)


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_long_and_foreign_names(tmp_path, form):
    folder = "größe" if form == tarfile.USTAR_FORMAT else "größe/" + "long" * 60
    members = [
        (f"{folder}/{i:04}.{end}", data)
        for i, image in enumerate(IMAGES)
        for end, data in (("jpg", image), ("cls", str(i % 2).encode()))
    ]
    found = read(shard(tmp_path / "0.tar", members, form))
    assert [read_bytes(ref) for ref in found.train] == IMAGES
    assert [ref.label for ref in found.train] == [0, 1, 0, 1]
    assert found.train[3].key == f"{folder}/0003"


def compound(tmp_path: Path) -> Path:
    members = [
        (f"{i:04}.{end}", data)
        for i, image in enumerate(IMAGES)
        for end, data in (
            ("input.jpg", image),
            ("mask.png", b"not this one"),
            ("label.cls", b"ab"[i % 2 : i % 2 + 1]),
        )
    ]
    return shard(tmp_path / "0.tar", members, tarfile.PAX_FORMAT)


def test_compound_keys_are_named_by_the_user(tmp_path):
    found = read(compound(tmp_path), image_key="input.jpg", label_key="label.cls")
    assert found.target_names == ["a", "b"] and [r.label for r in found.train] == [0, 1, 0, 1]
    assert [read_bytes(ref) for ref in found.train] == IMAGES


def test_compound_keys_are_told_where_nothing_was_found(tmp_path):
    path = compound(tmp_path)
    seen = "what follows the keys is 4 x input.jpg, 4 x mask.png, 4 x label.cls: name it with"
    with pytest.raises(DataError, match=rf"holds no images; {seen} --image-key, such as input.jpg"):
        read(path)
    with pytest.raises(DataError, match=rf"has no 0000.cls that names its class; {seen} --label-k"):
        read(path, image_key="input.jpg")
    with pytest.raises(DataError, match=r"holds no images that end in x\.jpg"):
        read(path, image_key="x.jpg")


def img2dataset(tmp_path: Path, **changes: object) -> Path:
    """As img2dataset writes it: jpg, txt with the caption, json with all that it knows."""
    members = []
    for i, image in enumerate(IMAGES):
        key = f"{i:09}"
        fields = {
            "url": f"https://example.org/{i}.jpg",
            "caption": ["a sleeping cat", "a barking dog"][i % 2],
            "species": ["cat", "dog"][i % 2],
            "key": key,
            "status": "success",
            "error_message": None,
            "width": 14,
            "height": 10 + i,
            "sha256": "0" * 64,
        }
        members += [
            (f"{key}.jpg", image),
            (f"{key}.json", json.dumps(fields | changes, indent=4).encode()),
            (f"{key}.txt", str(fields["caption"]).encode()),
        ]
    return shard(tmp_path / "00000.tar", members, tarfile.GNU_FORMAT)


def test_shards_of_img2dataset(tmp_path):
    path = img2dataset(tmp_path)
    with pytest.raises(DataError, match=r"4 x jpg, 4 x json, 4 x txt: name it with --label-key"):
        read(path)
    assert read(path, label_key="json:species").target_names == ["cat", "dog"]
    assert read(path, label_key="txt").target_names == ["a barking dog", "a sleeping cat"]
    with pytest.raises(DataError, match=r"no class in the field 'kind'; its fields are url, capt"):
        read(path, label_key="json:kind")


@pytest.mark.parametrize("value", [None, True, 1.5, ["a"], "  ", {}])
def test_what_is_no_class_in_json_is_refused(tmp_path, value):
    with pytest.raises(DataError, match="has no class in the field 'species'"):
        read(img2dataset(tmp_path, species=value), label_key="json:species")


def test_numbers_in_json_are_labels(tmp_path):
    found = read(img2dataset(tmp_path, species=0), label_key="json:species")
    assert found.target_names == ["0"] and {ref.label for ref in found.train} == {0}


def test_broken_json_is_named(tmp_path):
    path = shard(tmp_path / "0.tar", [("a.jpg", IMAGES[0]), ("a.json", b"{")], tarfile.PAX_FORMAT)
    with pytest.raises(DataError, match=r"a\.json is no JSON"):
        read(path, label_key="json:label")
