"""The ffcv engine gives the pixels of the torch engine, and its files hold what the pack holds."""

import pickle
import subprocess
import sys
import threading
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.scenes import mixed_images, pack_folders
from PIL import Image

from fastlt.data.engines.choice import choose
from fastlt.data.engines.ffcv import native
from fastlt.data.engines.ffcv.engine import FfcvEngine, write_beton
from fastlt.data.engines.interface import Options
from fastlt.data.engines.torch import TorchEngine
from fastlt.data.geometry import Geometry
from fastlt.data.loader import Loader
from fastlt.data.plan import Batch, Plan, Sampling, evaluation_batches
from fastlt.decode.images import decode, fill_box
from fastlt.errors import UserError
from fastlt.packing.reader import Pack, open_pack

try:
    parts, jit = native.import_ffcv()
except UserError as missing:
    pytest.skip(f"no FFCV here: {missing}", allow_module_level=True)

# grey level: Pillow 13 resizes tall images vertically first, and the 8 bits between the passes
# round otherwise
TALL_DIFFERENCE = 1


@pytest.fixture(scope="module")
def mixed(mixed_pack, tmp_path_factory) -> tuple[Pack, Path]:
    """A pack with every kind of image, and its .beton."""
    path = tmp_path_factory.mktemp("beton") / "mixed.beton"
    write_beton(mixed_pack.train, path, 1)
    return mixed_pack, path


@pytest.fixture(scope="module")
def engine(mixed):
    made = FfcvEngine(mixed[0].train, Options(24, 2, (mixed[1],)))
    yield made
    made.close()


@pytest.fixture(scope="module")
def plan(mixed) -> Plan:
    geometry = Geometry("random-resized-crop", 24, flip=True)
    return Plan(mixed[0].train, 1, 1, geometry, Sampling(), 5, seed=1)


def reference(split, batches) -> list[torch.Tensor]:
    return list(TorchEngine(split, Options(24, 0)).batches(batches))


def assert_same(
    split, batches: list[Batch], made: list[torch.Tensor], wanted: list[torch.Tensor]
) -> None:
    """Bit for bit, but for tall images."""
    assert len(made) == len(wanted) == len(batches)
    for batch, ours, theirs in zip(batches, made, wanted, strict=True):
        difference = (ours.int() - theirs.int()).abs().flatten(1).amax(1).numpy()
        tall = split.height[batch.images] > split.width[batch.images]
        assert ours.dtype == torch.uint8 and ours.shape == theirs.shape
        assert (difference[~tall] == 0).all()
        assert (difference[tall] <= TALL_DIFFERENCE).all()


# --- pixels


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry("random-resized-crop", 24, flip=True),
        Geometry("random-resized-crop", 24, flip=True, scale=(0.001, 0.01)),  # enlarged
        Geometry("pad-crop", 24, flip=True, padding=8),  # resized and beyond the edge
        Geometry("centre-crop", 24, resize=30),
    ],
    ids=["crop", "enlarged", "shifted", "centre"],
)
def test_every_kind_of_image_is_as_the_torch_engine_has_it(mixed, engine, geometry):
    split = mixed[0].train
    batches = [
        b
        for epoch in range(3)
        for b in Plan(split, 1, 1, geometry, Sampling(), 5, seed=1).epoch(epoch)
    ]
    assert_same(split, batches, list(engine.batches(batches)), reference(split, batches))


def test_crops_of_the_output_size_are_copied_bit_for_bit(mixed, engine):
    split = mixed[0].train
    rng = np.random.default_rng(0)
    images = np.arange(len(split)).repeat(12)
    boxes = np.column_stack(
        [rng.integers(-30, 50, (len(images), 2)), np.full((len(images), 2), 24)]
    ).astype(np.int32)
    batch = Batch(images, images * 0, boxes, rng.random(len(images)) < 0.5)
    (made,), (wanted,) = engine.batches([batch]), reference(split, [batch])
    assert torch.equal(made, wanted)


def test_small_raw_images_are_bit_identical(small_pack, tmp_path):
    pack = open_pack(small_pack)
    write_beton(pack.train, tmp_path / "train.beton", 1)
    batches = list(
        Plan(pack.train, 3, 5, Geometry("pad-crop", 16, flip=True), Sampling(budget=9), 8, 2).epoch(
            0
        )
    )
    made = FfcvEngine(pack.train, Options(16, 2, (tmp_path / "train.beton",))).batches(batches)
    assert all(
        torch.equal(a, b)
        for a, b in zip(made, TorchEngine(pack.train, Options(16, 0)).batches(batches), strict=True)
    )


def test_photos_are_the_same_in_both_engines(shared_data, tmp_path):
    for name, sources in {
        "photos": sorted((shared_data / "photos/images").glob("*/*"))[::4],
        "edge": [],
    }.items():
        folder = tmp_path / name / "images"
        folder.mkdir(parents=True)
        for source in sources or sorted((shared_data / "photos/edge_cases").iterdir()):
            (folder / source.name).symlink_to(source)
    pack = pack_folders(tmp_path / "photos", tmp_path / "edge", tmp_path / "pack")
    assert len(pack.train) == 115 and len(pack.val) == 12
    for split in (pack.train, pack.val):
        beton = tmp_path / f"{split.name}.beton"
        write_beton(split, beton, 1)
        batches = list(
            Plan(
                split, 1, 1, Geometry("random-resized-crop", 224, flip=True), Sampling(), 32, 0
            ).epoch(0)
        )
        made, wanted = (
            list(FfcvEngine(split, Options(224, 2, (beton,))).batches(batches)),
            list(TorchEngine(split, Options(224, 0)).batches(batches)),
        )
        assert_same(split, batches, made, wanted)
        difference = torch.cat(
            [(a.int() - b.int()).abs().flatten() for a, b in zip(made, wanted, strict=True)]
        )
        assert difference.float().mean() < 0.05  # grey levels; measured: 0.01


@pytest.mark.parametrize(
    ("height", "width"), [(40, 60), (24, 24), (500, 511), (25, 1000), (13, 24), (7, 9), (1, 1)]
)
def test_the_compiled_resize_is_pillows(height, width):
    pixels = (
        np.random.default_rng(height)
        .integers(0, 256, (height + 3, max(width, height) + 5, 3))
        .astype(np.uint8)
    )
    out = np.empty((24, 24, 3), np.uint8)
    for box in (
        (0, 0, height, width),
        (2, 1, height, width),
        (-1, 4, height, width),
        (0, 0, height + 9, width),
    ):
        for flip in (False, True):
            jit.fill_box(pixels, *box, flip, out)
            assert np.array_equal(
                out, fill_box(Image.fromarray(pixels), np.array(box), flip, 24)
            ), (box, flip)


# --- iterating


def test_one_image_comes_as_often_and_as_differently_as_the_plan_has_it(mixed, engine):
    split = mixed[0].train
    image = int(np.argmax(split.width))
    boxes = np.array(
        [[0, 0, 100, 100], [10, 20, 24, 24], [50, 0, 200, 300], [0, 0, 100, 100]], np.int32
    )
    batch = Batch(
        np.full(4, image), np.zeros(4, np.int64), boxes, np.array([False, True, False, True])
    )
    (made,), (wanted,) = engine.batches([batch]), reference(split, [batch])
    assert torch.equal(made, wanted)
    assert torch.equal(made[0].flip(1), made[3]) and not torch.equal(made[0], made[2])


def test_one_engine_serves_many_epochs_and_batch_sizes(mixed, engine, plan):
    split = mixed[0].train
    for epoch, batch in ((0, 5), (1, 16), (2, 3)):
        batches = list(replace(plan, batch=batch).epoch(epoch))
        assert len(batches[-1].images) == 16 % batch or batch == 16
        assert_same(split, batches, list(engine.batches(batches)), reference(split, batches))
    growing = [next(replace(plan, batch=batch).epoch(0)) for batch in (1, 9, 4, 16)]
    assert_same(split, growing, list(engine.batches(growing)), reference(split, growing))


def test_kept_batches_are_not_overwritten(mixed, engine, plan):
    batches = [batch for epoch in range(4) for batch in plan.epoch(epoch)]
    assert len(batches) == 16
    assert_same(
        mixed[0].train, batches, list(engine.batches(batches)), reference(mixed[0].train, batches)
    )


def test_two_engines_run_at_once(mixed, engine, plan):
    other = FfcvEngine(mixed[0].train, Options(24, 2, (mixed[1],)))
    batches = list(plan.epoch(0))
    pairs = list(zip(engine.batches(batches), other.batches(batches), strict=True))
    assert len(pairs) == len(batches) and all(torch.equal(a, b) for a, b in pairs)
    other.close()


def test_leaving_early_ends_the_thread_and_close_ends_them_all(mixed, plan):
    before = set(threading.enumerate())
    engine = FfcvEngine(mixed[0].train, Options(24, 3, (mixed[1],)))
    forever = (batch for _ in iter(int, 1) for batch in plan.epoch(0))
    images = engine.batches(forever)
    next(images)
    images.close()
    left = set(threading.enumerate()) - before
    assert all(thread.name.startswith("fastlt-ffcv") for thread in left) and len(left) <= 3
    engine.close()
    assert set(threading.enumerate()) <= before


def test_the_plan_is_read_only_a_few_batches_ahead(engine, plan):
    taken, fourth = [], threading.Event()

    def noted():
        for batch in list(plan.epoch(0)) * 100:
            taken.append(batch)
            if len(taken) == 4:  # one delivered, two ready, one in work
                fourth.set()
            yield batch

    images = engine.batches(noted())
    next(images)
    assert fourth.wait(60)
    images.close()
    assert len(taken) <= 5


@pytest.mark.slow
def test_torch_keeps_its_threads(mixed, plan):
    code = (
        "import torch, sys, pickle; from pathlib import Path; torch.set_num_threads(3)\n"
        "from fastlt.data.engines.ffcv.engine import FfcvEngine\n"
        "from fastlt.data.engines.interface import Options\n"
        "split, batches, beton = pickle.load(open(sys.argv[1], 'rb'))\n"
        "engine = FfcvEngine(split, Options(24, 2, (beton,)))\n"
        "assert torch.get_num_threads() == 3\n"
        "count = 0\n"
        "for images in engine.batches(batches):\n"
        "    count += 1\n"
        "    assert torch.get_num_threads() == 3\n"
        "assert torch.get_num_threads() == 3 and count == 4\n"
    )
    job = mixed[1].with_name("job.pkl")
    job.write_bytes(pickle.dumps((mixed[0].train, list(plan.epoch(0)), mixed[1])))
    done = subprocess.run(
        [sys.executable, "-c", code, str(job)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_an_error_in_the_plan_reaches_the_caller(engine, plan):
    def broken():
        yield next(plan.epoch(0))
        raise KeyError("from the plan")

    images = engine.batches(broken())
    assert next(images).shape == (5, 24, 24, 3)
    with pytest.raises(KeyError, match="from the plan"):
        next(images)


def test_a_thread_that_ends_without_a_word_is_noticed(engine, plan, monkeypatch):
    monkeypatch.setattr(parts.Epoch, "_hand_over", lambda self, item: False)
    with pytest.raises(UserError, match="thread has ended without a word"):
        next(engine.batches(plan.epoch(0)))


def test_rows_that_would_read_beyond_the_table_are_refused(mixed, engine, plan):
    batch = next(plan.epoch(0))
    with pytest.raises(IndexError, match=r"batch\.images must lie in 0\.\.15"):
        next(engine.batches([replace(batch, images=batch.images + 16)]))
    with pytest.raises(ValueError, match=r"batch\.boxes must be at least one pixel"):
        next(engine.batches([replace(batch, boxes=batch.boxes * [1, 1, 0, 1])]))


# --- the file


def stored_records(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """What FFCV's own reader finds: the records, and the file's bytes."""
    from ffcv.reader import Reader

    reader = Reader(str(path), {parts.FIELD: parts.ImageField})
    return reader.metadata["f0"], np.fromfile(path, np.uint8)


def test_jpeg_bytes_are_stored_untouched_and_the_rest_without_loss(mixed):
    split = mixed[0].train
    records, file = stored_records(mixed[1])
    modes = defaultdict(set)
    for image, record in enumerate(records):
        stored = file[record["data_ptr"] :][: record["size"]]
        key = split.key(image)
        modes[int(record["mode"])].add(key.rsplit("/", 1)[-1])
        if record["mode"] == jit.JPEG:
            assert stored.tobytes() == bytes(split.read(image))
        else:
            assert np.array_equal(
                stored.reshape(split.height[image], split.width[image], 3),
                decode(split.read(image)),
            )
    assert modes[jit.RAW] == {"cmyk.jpg", "colour.png", "grey_png.png", "webp.webp"}
    assert len(modes[jit.JPEG]) == 12


def test_nothing_straddles_a_page(mixed, tmp_path, monkeypatch):
    from ffcv.reader import Reader

    from fastlt.data.engines.ffcv import beton

    monkeypatch.setattr(beton, "_page_size", lambda split: 2**14)
    write_beton(mixed[0].train, tmp_path / "paged.beton", 1)
    reader = Reader(str(tmp_path / "paged.beton"), {parts.FIELD: parts.ImageField})
    first, last = (
        reader.alloc_table["ptr"],
        reader.alloc_table["ptr"] + reader.alloc_table["size"] - 1,
    )
    assert reader.page_size == 2**14 and (first // 2**14 == last // 2**14).all()
    assert last.max() > 2**14
    batches = list(evaluation_batches(mixed[0].train, Geometry("centre-crop", 24), 7))
    made = FfcvEngine(mixed[0].train, Options(24, 1, (tmp_path / "paged.beton",))).batches(batches)
    assert_same(mixed[0].train, batches, list(made), reference(mixed[0].train, batches))


def test_the_page_holds_the_largest_image(mixed):
    from fastlt.data.engines.ffcv.beton import _page_size

    split = mixed[0].train
    assert _page_size(split) == 8 * 2**20
    # 3000 x 4100 pixels: 37 MB
    assert _page_size(replace(split, height=split.height * 10, width=split.width * 10)) == 2**26
    assert _page_size(replace(split, size=split.size + 2**23)) == 2**24
    with pytest.raises(UserError, match=r"larger than FFCV's file format can hold"):
        _page_size(replace(split, height=split.height * 100, width=split.width * 100))


@pytest.mark.slow
def test_workers_write_the_same_file(mixed, tmp_path):
    write_beton(mixed[0].train, tmp_path / "two.beton", 2)
    assert (tmp_path / "two.beton").read_bytes() == mixed[1].read_bytes()


def test_a_jpeg_that_libjpeg_only_warns_of_is_stored_as_pixels(tmp_path):
    """The engine could not tell a warning from damage; Pillow is silent about it."""
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    sound = mixed_images()["large.jpg"]
    (folder / "sound.jpg").write_bytes(sound)
    # extraneous bytes before the second marker
    (folder / "odd.jpg").write_bytes(sound[:20] + b"\xff\x00" + sound[20:])
    split = pack_folders(tmp_path / "images", tmp_path / "images", tmp_path / "pack").train
    write_beton(split, tmp_path / "odd.beton", 1)
    records = stored_records(tmp_path / "odd.beton")[0]
    modes = {
        split.key(image).rsplit("/", 1)[-1]: int(record["mode"])
        for image, record in enumerate(records)
    }
    assert modes == {"sound.jpg": jit.JPEG, "odd.jpg": jit.RAW}
    batches = list(evaluation_batches(split, Geometry("centre-crop", 24), 2))
    (images,) = FfcvEngine(split, Options(24, 1, (tmp_path / "odd.beton",))).batches(batches)
    assert torch.equal(images[0], images[1])


def test_a_damaged_image_stops_the_writer_by_name_and_leaves_no_file(image_folders, tmp_path):
    split = pack_folders(image_folders / "target", image_folders / "val", tmp_path / "pack").train
    shard = split.folder / split.shards[0]
    with shard.open("r+b") as file:
        file.seek(int(split.offset[2]))
        file.write(b"\0" * 50)
    with pytest.raises(UserError, match=f"{shard.name}:{split.key(2)}: "):
        write_beton(split, tmp_path / "out/x.beton", 1)
    assert list((tmp_path / "out").iterdir()) == []


# --- damage


@pytest.fixture
def copied(mixed, tmp_path) -> Path:
    path = tmp_path / "copy.beton"
    path.write_bytes(mixed[1].read_bytes())
    return path


@pytest.mark.parametrize("keep", [0, 10, 1000, 1300, 5000, -200, -1])
def test_a_truncated_file_is_refused_by_name(mixed, copied, keep):
    copied.write_bytes(copied.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"copy\.beton is damaged"):
        FfcvEngine(mixed[0].train, Options(24, 1, (copied,)))


@pytest.mark.parametrize("keep", [0, 4096, None])
def test_a_file_that_shrinks_or_goes_while_it_is_read_ends_the_epoch(mixed, copied, plan, keep):
    engine = FfcvEngine(mixed[0].train, Options(24, 1, (copied,)))
    images = engine.batches(plan.epoch(0) if keep is None else iter([*plan.epoch(0)] * 50))
    next(images)
    if keep is None:
        copied.unlink()
        images.close()
        images = engine.batches(plan.epoch(1))
    else:
        shorter = copied.with_name("shorter")  # under the same name; what is mapped stays as it is
        shorter.write_bytes(copied.read_bytes()[:keep])
        shorter.replace(copied)
    with pytest.raises(UserError, match=r"copy\.beton was changed while it was read"):
        for _ in images:
            pass
    engine.close()


def test_a_file_that_is_none_or_of_another_split_is_refused(mixed, copied, small_pack):
    with pytest.raises(
        UserError, match=r"copy\.beton does not hold the images of .*train: pack again"
    ):
        FfcvEngine(open_pack(small_pack).train, Options(24, 1, (copied,)))
    copied.write_bytes(b"\xff" * 10_000)
    with pytest.raises(UserError, match=r"copy\.beton is damaged"):
        FfcvEngine(mixed[0].train, Options(24, 1, (copied,)))


def test_a_record_that_would_write_beyond_an_image_is_refused(mixed, copied):
    records, file = stored_records(copied)
    raw = int(np.flatnonzero(records["mode"] == jit.RAW)[0])
    start = file.tobytes().index(records.tobytes())
    end_of_record = start + (raw + 1) * records.dtype.itemsize
    file[end_of_record - 8] += 1  # the lowest byte of the size
    file.tofile(copied)
    assert stored_records(copied)[0][raw]["size"] == records[raw]["size"] + 1
    with pytest.raises(UserError, match=r"copy\.beton is damaged"):
        FfcvEngine(mixed[0].train, Options(24, 1, (copied,)))


@pytest.mark.parametrize("how", ["cut", "garbled"])
def test_a_damaged_jpeg_is_named_and_never_delivered(mixed, copied, how):
    split = mixed[0].train
    image = int(np.argmax(split.width))
    record = stored_records(copied)[0][image]
    start, middle = int(record["data_ptr"]), int(record["data_ptr"] + record["size"] // 2)
    with copied.open("r+b") as file:
        file.seek(middle if how == "cut" else start)
        file.write(b"\0" * (int(record["size"]) // 2) if how == "cut" else b"garbled")
    engine = FfcvEngine(split, Options(24, 2, (copied,)))
    batches = list(evaluation_batches(split, Geometry("centre-crop", 24), 1))
    delivered = []
    with pytest.raises(
        UserError, match=rf"copy\.beton: .*{split.shards[0]}:{split.key(image)} cannot be decoded"
    ):
        delivered.extend(engine.batches(batches))
    assert len(delivered) == image
    assert len(list(engine.batches(batches[:image]))) == image
    engine.close()


# --- the choice


def test_auto_takes_ffcv_where_the_file_is(mixed, plan):
    pack, beton = mixed
    without, with_beton = Options(24), Options(24, 2, (beton,))
    assert choose(pack.train, without) is choose(pack.train, with_beton, "torch") is TorchEngine
    assert choose(pack.train, with_beton) is choose(pack.train, with_beton, "ffcv") is FfcvEngine
    front = Loader(pack.train, 24, "auto", 2, [beton])
    pairs = list(front.iterate(plan.epoch(0)))
    front.close()
    assert front.engine_name == "ffcv"
    assert_same(
        pack.train,
        [batch for batch, _ in pairs],
        [x for _, x in pairs],
        reference(pack.train, plan.epoch(0)),
    )


def test_small_images_stay_in_memory_even_so_unless_ffcv_is_asked_for(small_pack, tmp_path):
    pack = open_pack(small_pack)
    write_beton(pack.train, tmp_path / "train.beton", 1)
    assert Loader(pack.train, 16, "auto", 1, [tmp_path / "train.beton"]).engine_name == "resident"
    asked = Loader(pack.train, 16, "ffcv", 1, [tmp_path / "train.beton"])
    assert asked.engine_name == "ffcv"
    asked.close()


def test_a_machine_without_ffcv_is_told_what_to_install():
    code = (
        "import sys; sys.modules['ffcv'] = None\n"
        "from fastlt.data.loader import Loader\n"
        "from fastlt.data.engines.ffcv.native import has_ffcv, import_ffcv\n"
        "assert not has_ffcv()\n"
        "import_ffcv()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "pip install fastlt[ffcv]" in done.stderr and "make setup" in done.stderr
    assert "MissingExtra" in done.stderr.splitlines()[-1]
