"""Sources: folders, split files, shards and CIFAR-100 give the classes and images that they should,
and bad input is named.
"""

import io
import os
import pickle
import struct
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastlt.decode.images import decode
from fastlt.errors import UserError
from fastlt.packing.cifar import png_bytes
from fastlt.packing.encode import read_bytes
from fastlt.packing.sources import Collection, read_cifar100, read_collection, read_pairs


def image_bytes(kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, kind)
    return buffer.getvalue()


def folders(root: Path, classes: dict[str, list[str]]) -> Path:
    for name, files in classes.items():
        (root / name).mkdir(parents=True)
        for file in files:
            (root / name / file).parent.mkdir(exist_ok=True)
            (root / name / file).write_bytes(image_bytes())
    return root


def shard(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def text(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def read(target: Path, val: Path, **others: Path) -> Collection:
    names = ("auxiliary", "pairs", "root", "class_names")
    auxiliary, pairs, root, class_names = (others.get(name) for name in names)
    return read_collection(target, auxiliary, val, pairs, root, class_names)


@pytest.fixture
def pets(tmp_path: Path) -> dict[str, Path]:
    return {
        "target": folders(
            tmp_path / "target", {"dog": ["1.png", "2.JPEG"], "cat": ["b/x.png", "a.webp"]}
        ),
        "val": folders(tmp_path / "val", {"cat": ["1.png"], "dog": ["1.png"]}),
        "auxiliary": folders(
            tmp_path / "auxiliary", {"wolf": ["1.png"], "lynx": ["1.png", "2.png"]}
        ),
        "pairs": text(tmp_path / "pairs.csv", "target,auxiliary\ndog,wolf\ncat,lynx\ndog,lynx\n"),
    }


def test_class_folders(pets: dict[str, Path]) -> None:
    found = read(**pets)
    assert (found.target_names, found.auxiliary_names) == (["cat", "dog"], ["lynx", "wolf"])
    assert found.pairs == [(0, 2), (1, 2), (1, 3)]
    assert [(ref.key, ref.label) for ref in found.train] == [
        ("cat/a", 0),
        ("cat/b/x", 0),
        ("dog/1", 1),
        ("dog/2", 1),
        ("lynx/1", 2),
        ("lynx/2", 2),
        ("wolf/1", 3),
    ]
    assert [(ref.key, ref.label) for ref in found.val] == [("cat/1", 0), ("dog/1", 1)]
    assert found.origins == {"lynx": str(pets["auxiliary"]), "wolf": str(pets["auxiliary"])}
    assert all(read_bytes(ref) == image_bytes() for ref in found.train)
    assert found.warnings == []


def test_hidden_and_other_files_are_left_out_and_counted(pets: dict[str, Path]) -> None:
    for name in (".DS_Store", "._1.png", "notes.txt", "film.mp4", "more.txt", "LICENCE"):
        (pets["target"] / "cat" / name).write_bytes(b"")
    (pets["target"] / ".git").mkdir()
    found = read(**pets)
    assert found.target_names == ["cat", "dog"] and len(found.train) == 7
    assert (
        len(found.warnings) == 1
        and "4 files left out" in found.warnings[0]
        and "2 x .txt" in found.warnings[0]
    )


def test_linked_class_folders_are_followed(pets: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "cat").symlink_to(pets["target"] / "cat")
    assert [ref.key for ref in read(tmp_path / "links", tmp_path / "links").train] == [
        "cat/a",
        "cat/b/x",
    ]


def test_val_may_lack_a_class(pets: dict[str, Path], tmp_path: Path) -> None:
    val = folders(tmp_path / "val2", {"cat": [], "dog": ["1.png"]})
    assert [ref.label for ref in read(pets["target"], val).val] == [1]


def test_split_files_take_names_from_the_folders_and_numbers_from_the_file(
    pets: dict[str, Path], tmp_path: Path
) -> None:
    target = text(
        tmp_path / "train.txt", "target/dog/1.png 0\ntarget/dog/2.JPEG\t0\n\ntarget/cat/a.webp 1\n"
    )
    val = text(tmp_path / "test.txt", "val/cat/1.png 1\nval/dog/1.png 0\n")
    found = read(target, val)
    assert found.target_names == ["dog", "cat"]
    assert [(ref.key, ref.label, Path(ref.path).is_file()) for ref in found.train] == [
        ("target/dog/1", 0, True),
        ("target/dog/2", 0, True),
        ("target/cat/a", 1, True),
    ]
    assert [ref.label for ref in found.val] == [1, 0]
    moved = text(pets["val"] / "train.txt", target.read_text())
    assert [ref.path for ref in read(moved, val, root=tmp_path).train] == [
        ref.path for ref in found.train
    ]


def test_split_file_names_fall_back_to_given_names_and_then_to_numbers(
    pets: dict[str, Path], tmp_path: Path
) -> None:
    mixed = text(
        tmp_path / "train.txt", "target/dog/1.png 0\ntarget/cat/a.webp 0\ntarget/dog/2.JPEG 1\n"
    )
    val = text(tmp_path / "val.txt", "val/dog/1.png 1\n")
    assert read(mixed, val).target_names == ["0", "1"]
    names = text(tmp_path / "names.txt", "pet\nhound\n")
    assert read(mixed, val, class_names=names).target_names == ["pet", "hound"]
    auxiliary = text(tmp_path / "auxiliary.txt", "auxiliary/wolf/1.png 0\nauxiliary/lynx/1.png 0\n")
    pairs = text(tmp_path / "numbers.csv", "target,auxiliary\n1,auxiliary_0\n")
    assert read(mixed, val, auxiliary=auxiliary, pairs=pairs).pairs == [(1, 2)]


def test_a_path_with_spaces_in_a_split_file(tmp_path: Path) -> None:
    folders(tmp_path, {"sea lion": ["a b.png"]})
    target = text(tmp_path / "train.txt", "sea lion/a b.png 0\n")
    assert [ref.key for ref in read(target, target).train] == ["sea lion/a b"]


def test_split_file_and_folder_go_together(pets: dict[str, Path], tmp_path: Path) -> None:
    target = text(tmp_path / "train.txt", "target/dog/1.png 0\ntarget/cat/a.webp 1\n")
    assert [(ref.key, ref.label) for ref in read(target, pets["val"]).val] == [
        ("cat/1", 1),
        ("dog/1", 0),
    ]
    val = text(tmp_path / "val.txt", "val/dog/1.png 1\n")
    assert [ref.label for ref in read(pets["target"], val).val] == [1]


def test_real_split_files_of_places_lt(shared_data: Path, tmp_path: Path) -> None:
    """The published lists; the images, which are elsewhere, stand in as empty files for a few of
    the classes.
    """
    lists = shared_data / "labels" / "longtail_splits"
    parts = {}
    for split, name in (("train", "Places_LT_train.txt"), ("val", "Places_LT_val.txt")):
        lines = [
            line for line in (lists / name).read_text().splitlines() if int(line.split()[1]) < 5
        ]
        for line in lines:
            file = tmp_path / "places" / line.split()[0]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        parts[split] = text(tmp_path / name, "\n".join(lines))
    found = read(parts["train"], parts["val"], root=tmp_path / "places")
    assert found.target_names == [
        "airfield",
        "airplane_cabin",
        "airport_terminal",
        "alcove",
        "alley",
    ]
    counts = Counter(
        int(line.split()[1]) for line in (lists / "Places_LT_train.txt").read_text().splitlines()
    )
    assert Counter(ref.label for ref in found.train) == {label: counts[label] for label in range(5)}
    assert Counter(ref.label for ref in found.val) == dict.fromkeys(range(5), 20)


def test_shards_with_names_and_with_numbers(tmp_path: Path) -> None:
    png, jpg = image_bytes(), image_bytes("JPEG")
    named = shard(
        tmp_path / "named" / "0.tar",
        {"a/1.png": png, "a/1.cls": b"owl\n", "a/2.v2.png": png, "2.jpg": jpg, "2.cls": b"ant"},
    )
    found = read(named, tmp_path / "named")
    assert found.target_names == ["ant", "owl"]
    assert [(ref.key, ref.label) for ref in found.train] == [("a/1", 1), ("2", 0)]
    assert [read_bytes(ref) for ref in found.train] == [png, jpg]
    for number in range(2):
        shard(
            tmp_path / "numbered" / f"{number}.tar",
            {f"{number}.cls": str(number).encode(), f"{number}.png": png},
        )
    names = text(tmp_path / "names.txt", "ant\nowl\n")
    found = read(tmp_path / "numbered", named, class_names=names)
    assert [(ref.key, ref.label) for ref in found.train] == [("0", 0), ("1", 1)]
    assert found.target_names == ["ant", "owl"] and [ref.label for ref in found.val] == [1, 0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("target/dog/1.png\n", r"train\.txt, line 1: 'target/dog/1.png' is not of the form"),
        (
            "target/dog/1.png 0\ntarget/dog/2.JPEG zero\n",
            r"train\.txt, line 2: .* is not of the form 'relative/path label'",
        ),
        ("target/dog/1.png 0\ntarget/dog/2.JPEG 1.5\n", r"train\.txt, line 2: .* is a soft label"),
        ("target/dog/1.png -1\n", r"train\.txt, line 1: label -1 is out of range"),
        (
            "target/dog/1.png 0\n../secret/1.png 0\n",
            r"train\.txt, line 2: \.\./secret/1\.png leaves the root folder",
        ),
        ("/etc/1.png 0\n", r"train\.txt, line 1: /etc/1\.png leaves the root folder"),
        (
            "target/dog/1.png 0\n\ntarget/dog/9.png 0\n",
            r"train\.txt, line 3: there is no image .*target/dog/9\.png: .*--root",
        ),
        ("nowhere/9.png 0\n", r"train\.txt, line 1: there is no image .*nowhere/9\.png"),
        ("target/dog/1.png 0\ntarget/cat/a.webp 2\n", r"train\.txt: class 1 has no images"),
        ("target/dog/1.png 1999999999\n", r"train\.txt: class 0 has no images"),
        ("\n\n", r"train\.txt lists no images"),
    ],
)
def test_bad_split_files(pets: dict[str, Path], tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read(text(tmp_path / "train.txt", content), pets["val"])


def test_val_labels_must_be_the_targets(pets: dict[str, Path], tmp_path: Path) -> None:
    target = text(tmp_path / "train.txt", "target/dog/1.png 0\ntarget/cat/a.webp 1\n")
    with pytest.raises(
        UserError,
        match=r"val\.txt, line 2: label 2 is out of range: there are 2 target classes, 0 to 1",
    ):
        read(target, text(tmp_path / "val.txt", "val/dog/1.png 0\nval/cat/1.png 2\n"))
    with pytest.raises(
        UserError, match=r"val\.txt: label 1 is 'dog' here but 'cat' in .*train\.txt"
    ):
        read(target, text(tmp_path / "val.txt", "val/dog/1.png 1\n"))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("dog\n", r"train\.txt, line 2: label 1 is out of range: there are 1 target classes"),
        ("dog\ncat\nowl\n", r"train\.txt: class 2 \('owl'\) has no images"),
        ("dog\ndog\n", r"names\.txt, line 1: the class name 'dog' stands there more than once"),
        ("dog\n\ncat\n", r"names\.txt, line 2: there is no class name"),
        ("", r"names\.txt holds no class names"),
    ],
)
def test_bad_class_names(pets: dict[str, Path], tmp_path: Path, names: str, message: str) -> None:
    target = text(tmp_path / "train.txt", "target/dog/1.png 0\ntarget/cat/a.webp 1\n")
    with pytest.raises(UserError, match=message):
        read(target, pets["val"], class_names=text(tmp_path / "names.txt", names))


def test_class_names_are_refused_where_classes_have_names(
    pets: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="--class-names is for integer labels"):
        read(pets["target"], pets["val"], class_names=text(tmp_path / "names.txt", "a\nb\n"))


def test_bad_folders(pets: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no folder or file .*nothing"):
        read(tmp_path / "nothing", pets["val"])
    with pytest.raises(UserError, match=r"target/dog has no class sub-folders"):
        read(pets["target"] / "dog", pets["val"])
    empty = folders(tmp_path / "empty", {"cat": ["1.png"], "dog": []})
    with pytest.raises(UserError, match=r"the class folder .*empty/dog holds no images"):
        read(empty, pets["val"])
    with pytest.raises(UserError, match=r"none holds no validation images"):
        read(pets["target"], folders(tmp_path / "none", {"cat": []}))
    with pytest.raises(
        UserError, match=r"the validation class 'owl' is no class of the training set .*target"
    ):
        read(pets["target"], folders(tmp_path / "owls", {"owl": ["1.png"]}))


def test_a_folder_name_that_is_not_text(pets: dict[str, Path]) -> None:
    try:
        Path(os.fsdecode(bytes(pets["target"]) + b"/\xff")).mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    with pytest.raises(UserError, match=r"'\\udcff' is not valid UTF-8"):
        read(pets["target"], pets["val"])


def test_auxiliaries_need_pairs_and_names_of_their_own(
    pets: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="--auxiliary needs --pairs"):
        read(pets["target"], pets["val"], auxiliary=pets["auxiliary"])
    with pytest.raises(UserError, match="--pairs needs --auxiliary"):
        read(pets["target"], pets["val"], pairs=pets["pairs"])
    doubled = folders(tmp_path / "doubled", {"dog": ["1.png"], "wolf": ["1.png"]})
    with pytest.raises(
        UserError, match=r"doubled: the auxiliary class 'dog' is a target class as well"
    ):
        read(**(pets | {"auxiliary": doubled}))
    empty = folders(tmp_path / "empty", {"wolf": []})
    with pytest.raises(UserError, match=r"the class folder .*empty/wolf holds no images"):
        read(**(pets | {"auxiliary": empty}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "target,auxiliary\ndog,wolf\nemu,lynx\n",
            r"pairs\.csv, line 3: there is no target class 'emu'",
        ),
        ("target,auxiliary\ndog,emu\n", r"pairs\.csv, line 2: there is no auxiliary class 'emu'"),
        (
            "target,auxiliary\ndog;wolf\n",
            r"pairs\.csv, line 2: 'dog;wolf' is not of the form 'target,auxiliary'",
        ),
        ("target,auxiliary\ndog,wolf\n\ncat,lynx\n", r"pairs\.csv, line 3: '' is not of the form"),
        (
            "target,auxiliary\ndog,wolf,lynx\n",
            r"pairs\.csv, line 2: 'dog,wolf,lynx' is not of the form",
        ),
        ("target,auxiliary\n,wolf\n", r"pairs\.csv, line 2: ',wolf' is not of the form"),
        ("dog,wolf\n", r"pairs\.csv, line 1: the header must be 'target,auxiliary'"),
        ("", r"pairs\.csv, line 1: the header must be"),
        ("target,auxiliary\n", r"pairs\.csv holds no pairs"),
    ],
)
def test_bad_pairs(pets: dict[str, Path], content: str, message: str) -> None:
    text(pets["pairs"], content)
    with pytest.raises(UserError, match=message):
        read(**pets)


def test_pairs_may_have_more_columns_quotes_and_a_byte_order_mark(tmp_path: Path) -> None:
    file = tmp_path / "pairs.csv"
    file.write_text(
        'target,auxiliary,similarity\n"dog, small",wolf,0.8\r\ncat , lynx,0.7\n\n',
        encoding="utf-8-sig",
    )
    assert read_pairs(file) == [("dog, small", "wolf"), ("cat", "lynx")]


def test_files_that_cannot_be_read(pets: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read .*none\.csv: No such file"):
        read(**(pets | {"pairs": tmp_path / "none.csv"}))
    (tmp_path / "train.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"train\.txt is not UTF-8 text"):
        read(tmp_path / "train.txt", pets["val"])


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"1.png": b"x"}, r"0\.tar: the image 1 has no 1\.cls"),
        ({"1.png": b"x", "1.cls": b""}, r"0\.tar: 1\.cls must hold a class as text"),
        (
            {"1.png": b"x", "1.cls": b"\x07\0\0\0\0\0\0\0"},
            r"0\.tar: 1\.cls must hold a class as text",
        ),
        ({"1.txt": b"x"}, r"holds no images"),
        ({"1.png": b"x", "1.cls": b"-3"}, r"0\.tar, 1\.cls: label -3 is out of range"),
        ({"1.png": b"x", "1.cls": b"3"}, r"class 0 has no images"),
    ],
)
def test_bad_shards(
    pets: dict[str, Path], tmp_path: Path, members: dict[str, bytes], message: str
) -> None:
    shard(tmp_path / "shards" / "0.tar", members)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "shards", pets["val"])


def test_truncated_and_compressed_shards(pets: dict[str, Path], tmp_path: Path) -> None:
    members = {"1.cls": b"cat", "1.png": bytes(5000), "2.cls": b"cat", "2.png": b"x"}
    whole = shard(tmp_path / "shards" / "0.tar", members).read_bytes()
    second = 4 * 512 + 5120 - 512  # where the header of 2.cls starts
    assert whole[second : second + 5] == b"2.cls"
    for data in (
        whole[:5000],
        whole[: second + 100],
        whole[:second],
        b"\x1f\x8b" + bytes(2000),
        b"",
    ):
        (tmp_path / "shards" / "0.tar").write_bytes(data)
        with pytest.raises(UserError, match=r"cannot read the shard .*0\.tar"):
            read(tmp_path / "shards", pets["val"])


# CIFAR-100


@pytest.fixture
def cifar(shared_data: Path) -> Path:
    return shared_data / "cifar100"


@pytest.mark.parametrize(("imbalance", "total"), [(100, 10_847), (50, 12_608), (10, 19_573)])
def test_cifar100_lt_has_the_published_counts(cifar: Path, imbalance: int, total: int) -> None:
    found = read_cifar100(cifar, "cifar100-lt", imbalance)
    counts = Counter(ref.label for ref in found.train)
    assert len(found.train) == total and len(set(found.train)) == total
    assert [counts[i] for i in range(100)] == [
        int(500 * (1 / imbalance) ** (i / 99)) for i in range(100)
    ]
    many, few = sum(n > 100 for n in counts.values()), sum(n < 20 for n in counts.values())
    assert imbalance != 100 or (many, 100 - many - few, few) == (35, 35, 30)
    assert imbalance != 10 or few == 0
    assert Counter(ref.label for ref in found.val) == dict.fromkeys(range(100), 100)
    assert (found.target_names[0], found.target_names[99], found.auxiliary_names, found.pairs) == (
        "apple",
        "worm",
        [],
        [],
    )


def test_cifar100_lt_draws_its_images_as_ldam_drw_does(cifar: Path) -> None:
    """The loop of LDAM-DRW's imbalance_cifar.py, on labels in the order that is stored here."""
    labels = np.repeat(np.arange(100), 500)
    np.random.seed(0)  # noqa: NPY002
    chosen = []
    for label in range(100):
        index = np.where(labels == label)[0]
        np.random.shuffle(index)  # noqa: NPY002
        chosen += index[: int(500 * 0.01 ** (label / 99.0))].tolist()
    found = read_cifar100(cifar, "cifar100-lt", 100)
    assert [500 * ref.label + ref.part for ref in found.train] == chosen


def test_cifar_images_are_the_rows_of_the_strips(cifar: Path) -> None:
    found = read_cifar100(cifar, "cifar100-lt", 100)
    strip = np.asarray(Image.open(cifar / "train" / "00_apple.webp").convert("RGB")).reshape(
        -1, 32, 32, 3
    )
    for ref in found.train[:500:99]:
        assert np.array_equal(decode(read_bytes(ref)), strip[ref.part])
    assert png_bytes(found.train[0].path, 7) == png_bytes(found.train[0].path, 7)


def test_cifar100_siblings(cifar: Path) -> None:
    found = read_cifar100(cifar, "cifar100-siblings", 100)
    # aquatic mammals, fish
    assert found.target_names[:4] == [
        "beaver",
        "dolphin",
        "aquarium_fish",
        "flatfish",
    ]
    # large man-made outdoor things, superclass 9
    assert found.target_names[-2:] == [
        "bridge",
        "castle",
    ]
    assert found.auxiliary_names[:6] == ["otter", "seal", "whale", "ray", "shark", "trout"]
    rank = np.random.RandomState(0).permutation(20)
    counts = Counter(ref.label for ref in found.train)
    assert [counts[i] for i in range(20)] == [int(500 * 0.01 ** (rank[i] / 19)) for i in range(20)]
    assert [counts[i] for i in range(20, 50)] == [500] * 30
    assert found.pairs == [(t, 20 + 3 * (t // 2) + i) for t in range(20) for i in range(3)]
    assert Counter(ref.label for ref in found.val) == dict.fromkeys(range(20), 100)
    assert found.origins["otter"] == "CIFAR-100, superclass aquatic_mammals"
    names = found.target_names + found.auxiliary_names
    assert all(ref.key.startswith(names[ref.label] + "/") for ref in found.train + found.val)
    assert {Path(ref.path).parent.name for ref in found.val} == {"test"}


def test_cifar100_siblings_controls(cifar: Path) -> None:
    siblings, random, none = (
        read_cifar100(cifar, "cifar100-siblings", 100, kind)
        for kind in ("siblings", "random", "none")
    )
    assert random.target_names == siblings.target_names == none.target_names
    assert random.pairs == siblings.pairs and none.pairs == []
    # superclass 10, large natural outdoor scenes
    assert random.auxiliary_names[:3] == [
        "cloud",
        "forest",
        "mountain",
    ]
    assert (
        not set(random.auxiliary_names) & set(siblings.auxiliary_names)
        and len(random.auxiliary_names) == 30
    )
    targets = [ref for ref in siblings.train if ref.label < 20]
    assert targets == none.train == [ref for ref in random.train if ref.label < 20]


def python2_pickle(fields: dict[str, object]) -> bytes:
    """As Python 2's cPickle with numpy 1 wrote the official archive: protocol 2, byte strings,
    numpy.core.multiarray.
    """

    def dump(value: object) -> bytes:
        if isinstance(value, np.ndarray):
            data = value.tobytes()
            return (
                b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
                b"(K\x01"
                + dump(value.shape[0])
                + dump(value.shape[1])
                + b"\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
                b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
                + struct.pack("<i", len(data))
                + data
                + b"tb"
            )
        if isinstance(value, int):
            return b"J" + struct.pack("<i", value)
        if isinstance(value, str):
            return b"U" + bytes([len(value)]) + value.encode()
        assert isinstance(value, list)
        return b"](" + b"".join(map(dump, value)) + b"e"

    return (
        b"\x80\x02}(" + b"".join(dump(key) + dump(value) for key, value in fields.items()) + b"u."
    )


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A small archive in the official form: 4 training images and 1 test image of each class,
    shuffled.
    """
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, each in (("train", 4), ("test", 1)):
        fine = rng.permutation(np.repeat(np.arange(100), each))
        pixels = rng.integers(0, 256, (len(fine), 3072), dtype=np.uint8)
        pixels[:, 0] = fine
        content = {
            "filenames": [],
            "fine_labels": fine.tolist(),
            "coarse_labels": (fine // 5).tolist(),
            "data": pixels,
        }
        (folder / name).write_bytes(python2_pickle(content))
    names = {
        "fine_label_names": [f"fine{i:02d}" for i in range(100)],
        "coarse_label_names": [f"coarse{i:02d}" for i in range(20)],
    }
    (folder / "meta").write_bytes(python2_pickle(names))
    return folder


@pytest.mark.parametrize("up", [False, True])
def test_official_archive(archive: Path, up: bool) -> None:
    found = read_cifar100(archive.parent if up else archive, "cifar100-lt", 4)
    assert (found.target_names[3], len(found.train), len(found.val)) == (
        "fine03",
        sum(int(4 * 0.25 ** (i / 99)) for i in range(100)),
        100,
    )
    rows = pickle.loads((archive / "train").read_bytes(), encoding="bytes")[b"data"]
    for ref in found.train[::40]:
        pixels = decode(read_bytes(ref))
        assert pixels[0, 0, 0] == ref.label
        assert np.array_equal(pixels.transpose(2, 0, 1).ravel(), rows[ref.part])  # stored as planes
    siblings = read_cifar100(archive, "cifar100-siblings", 1)
    assert (
        siblings.target_names[:3] == ["fine00", "fine01", "fine05"]
        and siblings.auxiliary_names[0] == "fine02"
    )


class Attack:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.file),)


def test_a_forged_archive_runs_no_code(archive: Path, tmp_path: Path) -> None:
    (archive / "train").write_bytes(pickle.dumps({"data": Attack(tmp_path / "attacked")}))
    with pytest.raises(
        UserError, match=r"train is not a file of the official CIFAR-100 archive: .*mkdir"
    ):
        read_cifar100(archive, "cifar100-lt")
    assert not (tmp_path / "attacked").exists()


@pytest.mark.parametrize(
    "damage",
    [b"", b"\x80\x02}", b"rubbish", pickle.dumps([1, 2]), pickle.dumps({"fine_labels": [1, 2]})],
)
def test_a_damaged_archive(archive: Path, damage: bytes) -> None:
    (archive / "test").write_bytes(damage)
    with pytest.raises(
        UserError,
        match=r"test (is not a file of the official CIFAR-100 archive|does not hold CIFAR-100 "
        r"images)",
    ):
        read_cifar100(archive, "cifar100-lt")


def test_bad_cifar_input(cifar: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"is not CIFAR-100: it must hold the files train, test and meta .* or meta\.json",
    ):
        read_cifar100(tmp_path, "cifar100-lt")
    with pytest.raises(UserError, match="there is no task 'cifar10'"):
        read_cifar100(cifar, "cifar10")
    with pytest.raises(UserError, match="in cifar100-lt all classes are targets"):
        read_cifar100(cifar, "cifar100-lt", 100, "siblings")
    with pytest.raises(UserError, match=r"the imbalance is 0\.5: it must be 1 or more"):
        read_cifar100(cifar, "cifar100-lt", 0.5)
    with pytest.raises(
        UserError, match="an imbalance of 501 leaves classes without images: it can be 500 at most"
    ):
        read_cifar100(cifar, "cifar100-lt", 501)
    (tmp_path / "meta.json").write_text("{}")
    with pytest.raises(UserError, match=r"meta\.json must hold fine_names"):
        read_cifar100(tmp_path, "cifar100-lt")
    (tmp_path / "meta.json").write_bytes((cifar / "meta.json").read_bytes())
    with pytest.raises(UserError, match=r"cannot read the CIFAR-100 strip .*00_apple\.webp"):
        read_cifar100(tmp_path, "cifar100-lt")
