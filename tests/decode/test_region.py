"""Decoding what a crop needs: close to the whole decode, the same in every engine, and safe on
damaged bytes.
"""

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.scenes import mixed_images, pack_folders, saved, scene
from PIL import Image
from rich.console import Console

from fastlt.data.damage import stand_in
from fastlt.data.engines.ffcv.native import has_ffcv
from fastlt.data.engines.interface import Options
from fastlt.data.engines.torch import TorchEngine
from fastlt.data.geometry import Geometry, boxes_of
from fastlt.data.loader import Loader
from fastlt.data.plan import Batch, Plan, Sampling
from fastlt.decode import region
from fastlt.decode.images import decode, decode_pil, fill_box
from fastlt.errors import UserError
from fastlt.packing.reader import Pack, open_pack
from fastlt.packing.sources import read_collection
from fastlt.packing.writer import PackOptions, write_pack

if not (region.has_region() and region.has_transcoder()):
    pytest.skip("fastlt's JPEG decoder is not compiled here", allow_module_level=True)

SAMPLINGS = {"4:4:4": 0, "4:2:2": 1, "4:2:0": 2}
ROUNDING = 1  # grey level: the whole decode rounds three times, this one once


def jpeg(
    height: int, width: int, turn: int = 1, sampling: str = "4:4:4", **options: object
) -> bytes:
    return saved(
        scene(height, width), "JPEG", turn, quality=90, subsampling=SAMPLINGS[sampling], **options
    )


def decode_all(
    images: list[bytes], boxes: np.ndarray, flips: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """(n, size, size, 3) uint8 and which were decoded."""
    arrays = [np.frombuffer(data, np.uint8) for data in images]
    addresses = np.array([array.ctypes.data for array in arrays], np.uint64)
    sides = np.array([decode_pil(data).size for data in images])
    out = np.zeros((len(images), size, size, 3), np.uint8)
    decoded = region.decode_boxes(
        addresses, np.array([len(d) for d in images]), sides[:, 1], sides[:, 0], boxes, flips, out
    )
    return out, decoded


def some_boxes(
    height: int, width: int, count: int, rng: np.random.Generator, overhang: int = 0
) -> np.ndarray:
    """(count, 4) of any size and place."""
    tops, lefts = rng.integers(-overhang, height, count), rng.integers(-overhang, width, count)
    heights, widths = (
        rng.integers(1, side - start + 1 + overhang)
        for side, start in ((height, tops), (width, lefts))
    )
    inside = (tops + heights > 0) & (lefts + widths > 0)
    return np.column_stack([np.where(inside, tops, 0), np.where(inside, lefts, 0), heights, widths])


def differences(data: bytes, boxes: np.ndarray, flips: np.ndarray, size: int) -> np.ndarray:
    """(n,) mean absolute difference to the whole decode, in grey levels; asserts that all were
    decoded.
    """
    made, decoded = decode_all([data] * len(boxes), boxes, flips, size)
    assert decoded.all()
    image = decode_pil(data)
    wanted = np.stack(
        [fill_box(image, box, flip, size) for box, flip in zip(boxes, flips, strict=True)]
    )
    return np.abs(made.astype(int) - wanted).mean(axis=(1, 2, 3))


# --- pixels


@pytest.mark.parametrize("restarts", [False, True], ids=["plain", "transcoded"])
@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(("height", "width"), [(97, 130), (64, 96), (33, 200), (20, 15)])
def test_a_crop_is_that_of_the_whole_image(height, width, sampling, restarts):
    rng = np.random.default_rng(height + width)
    data = jpeg(height, width, sampling=sampling)
    boxes = some_boxes(height, width, 40, rng, overhang=6)
    found = differences(
        region.transcode(data) if restarts else data, boxes, rng.random(len(boxes)) < 0.5, 24
    )
    # the most where one pixel fills the output
    assert found.mean() < 0.6 * ROUNDING and found.max() < 3 * ROUNDING


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_crops_of_the_output_size_are_the_pixels_themselves(sampling):
    rng = np.random.default_rng(0)
    boxes = np.column_stack(
        [rng.integers(-20, 110, 30), rng.integers(-20, 140, 30), np.full((30, 2), 24)]
    )
    assert (
        differences(jpeg(120, 150, sampling=sampling), boxes, rng.random(30) < 0.5, 24).max()
        < ROUNDING
    )


def test_a_crop_beside_the_image_is_black():
    made, decoded = decode_all(
        [jpeg(50, 60)], np.array([[-10, -30, 40, 50]]), np.array([False]), 25
    )
    assert (
        decoded.all()
        and not made[0, :6].any()
        and not made[0, :, :14].any()
        and made[0, 6:, 16:].any()
    )


def test_what_is_compiled_for_newer_processors_makes_the_same_bits(monkeypatch):
    if (
        region._decoder("fastlt.decode._region_avx2") is None
        or not region._decoder("fastlt.decode._region").fastlt_jpeg_has_avx2()
    ):
        pytest.skip("this machine has one way alone")
    rng = np.random.default_rng(2)
    for sampling, side in itertools.product(SAMPLINGS, (8, 24, 61)):
        boxes, flips = some_boxes(120, 150, 20, rng, overhang=9), rng.random(20) < 0.5
        images = [jpeg(120, 150, sampling=sampling)] * 20
        wide = decode_all(images, boxes, flips, side)
        with monkeypatch.context() as patch:
            plain = region._decoder("fastlt.decode._region")
            patch.setattr(region, "_library", lambda library=plain: library)
            narrow = decode_all(images, boxes, flips, side)
        assert (wide[0] == narrow[0]).all() and wide[1].all() and narrow[1].all()


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_large_crops_are_averages_of_all_their_pixels(sampling):
    rng = np.random.default_rng(3)
    boxes = np.concatenate([some_boxes(600, 700, 30, rng), [[0, 0, 600, 700]]])
    assert (
        differences(jpeg(600, 700, sampling=sampling), boxes, np.zeros(len(boxes), bool), 24).mean()
        < ROUNDING
    )


@pytest.mark.parametrize("turn", range(1, 9))
def test_turned_images_are_turned_back(turn):
    rng = np.random.default_rng(turn)
    for data in (jpeg(61, 90, turn), region.transcode(jpeg(61, 90, turn))):
        height, width = decode(data).shape[:2]
        boxes = some_boxes(height, width, 25, rng, overhang=5)
        # On average: at 3 pixels to 2, the middle one goes to the left or to the right, and a
        # mirrored decode picks the other.
        assert differences(data, boxes, rng.random(len(boxes)) < 0.5, 24).mean() < ROUNDING


def test_restart_markers_change_no_pixel_of_a_crop():
    rng = np.random.default_rng(5)
    for sampling, (height, width) in itertools.product(
        SAMPLINGS, [(130, 256), (96, 96), (50, 1000), (200, 81)]
    ):
        data = jpeg(height, width, sampling=sampling)
        boxes, flips = some_boxes(height, width, 30, rng), rng.random(30) < 0.5
        plain, spliced = (
            decode_all([d] * 30, boxes, flips, 32) for d in (data, region.transcode(data))
        )
        assert plain[1].all() and spliced[1].all()
        assert (plain[0] == spliced[0]).all()


@pytest.mark.parametrize("kind", ["grey", "optimised", "restarts_of_others"])
def test_other_kinds_of_jpeg(kind):
    options = {
        "optimised": {"optimize": True},
        "grey": {},
        "restarts_of_others": {"restart_marker_blocks": 5},
    }[kind]
    image = scene(80, 120).convert("L") if kind == "grey" else scene(80, 120)
    rng = np.random.default_rng(9)
    boxes = some_boxes(80, 120, 20, rng)
    assert (
        differences(
            saved(image, "JPEG", subsampling=0, **options), boxes, np.zeros(len(boxes), bool), 24
        ).max()
        < ROUNDING
    )


def test_photos_are_close_to_their_whole_decode(shared_data):
    found = []
    for path in sorted((shared_data / "photos/images").glob("*/*"))[::9]:
        data = path.read_bytes()
        width, height = decode_pil(data).size
        places = np.arange(4)
        boxes, flips = boxes_of(
            Geometry("random-resized-crop", 224, True),
            places * 0 + height,
            places * 0 + width,
            places,
            0,
            0,
        )
        found.append(differences(region.transcode(data), boxes, flips, 224))
    assert np.mean(found) < 0.5  # grey levels; measured: 0.41


# --- transcoding


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"restart_marker_rows": 1}],
    ids=["baseline", "progressive", "rows"],
)
def test_transcoding_changes_no_pixel(sampling, options):
    for height, width in [(97, 130), (8, 8), (1, 1), (17, 400)]:
        data = jpeg(height, width, sampling=sampling, **options)
        rewritten = region.transcode(data)
        assert (decode(rewritten) == decode(data)).all()
        again = Image.open(io.BytesIO(rewritten))
        assert not again.info.get("progressive") and b"\xff\xdd" in rewritten


def test_transcoding_keeps_the_metadata():
    data = saved(scene(40, 60), "JPEG", 6, comment=b"a comment", icc_profile=b"profile" * 30)
    before, after = (Image.open(io.BytesIO(d)) for d in (data, region.transcode(data)))
    assert (
        after.info["comment"] == b"a comment"
        and after.info["icc_profile"] == before.info["icc_profile"]
    )
    assert after.getexif() == before.getexif() and after.size == before.size


def test_what_cannot_be_transcoded_is_none():
    whole = jpeg(64, 64)
    assert all(
        region.transcode(data) is None
        for data in (b"", b"no JPEG", whole[: len(whole) // 2], saved(scene(9, 9), "PNG"))
    )


def test_a_transcoded_pack(tmp_path):
    (tmp_path / "images/a").mkdir(parents=True)
    for name, data in mixed_images().items():
        (tmp_path / "images/a" / name).write_bytes(data)
    plain = pack_folders(tmp_path / "images", tmp_path / "images", tmp_path / "plain")
    collection = read_collection(tmp_path / "images", None, tmp_path / "images", None, None, None)
    write_pack(
        collection, PackOptions(tmp_path / "pack", workers=1, transcode=True), Console(quiet=True)
    )
    pack = open_pack(tmp_path / "pack")
    assert pack.manifest["images"]["transcode"] and len(pack.train) == len(plain.train)
    for i in range(len(pack.train)):
        assert (decode(pack.train.read(i)) == decode(plain.train.read(i))).all()
    rewritten = [
        bytes(pack.train.read(i)) != bytes(plain.train.read(i)) for i in range(len(pack.train))
    ]
    assert rewritten == [pack.train.key(i).endswith(".jpg") for i in range(len(pack.train))]


# --- safety


@pytest.mark.parametrize("markers", [{}, {"restart_marker_rows": 1}], ids=["plain", "markers"])
def test_damage_is_told_from_what_is_only_odd(markers):
    whole = jpeg(90, 120, sampling="4:2:0", **markers)
    scan = whole.index(b"\xff\xda") + 14
    middle = scan + (len(whole) - scan) // 2
    assert (
        region.examine(whole) != region.DAMAGED
        and region.examine(memoryview(whole)) != region.DAMAGED
    )
    behind = whole[:-2] + b"\x12\x34\x56" + whole[-2:]  # the code, as some cameras leave bytes
    assert region.examine(behind) != region.DAMAGED
    assert region.examine(whole + b"and more") != region.DAMAGED
    assert region.examine(whole[:middle] + b"\xff\xd9" + whole[-2:]) == region.DAMAGED
    assert region.examine(whole[:middle] + b"\xff\xd5" + whole[middle:]) == region.DAMAGED
    assert (
        region.examine(b"") != region.DAMAGED
        and region.examine(saved(scene(9, 9), "PNG")) != region.DAMAGED
    )
    # cannot be told
    assert region.examine(jpeg(90, 120, progressive=True)[:-40] + b"\xff\xd9") != region.DAMAGED


def test_damaged_bytes_are_told_of_or_decoded_never_more():
    rng = np.random.default_rng(11)
    whole = region.transcode(jpeg(90, 120, sampling="4:2:0"))
    told = 0
    for _ in range(400):
        data = np.frombuffer(whole, np.uint8).copy()
        places = rng.integers(0, len(data), rng.integers(1, 6))
        data[places] = rng.integers(0, 256, len(places))
        data = data[: rng.integers(1, len(data) + 1)] if rng.random() < 0.3 else data
        out = np.zeros((1, 24, 24, 3), np.uint8)
        box = some_boxes(90, 120, 1, rng, overhang=4)
        decoded = region.decode_boxes(
            np.array([data.ctypes.data], np.uint64),
            np.array([len(data)]),
            np.array([90]),
            np.array([120]),
            box,
            np.zeros(1),
            out,
        )
        told += not decoded[0]
        region.transcode(data.tobytes())
    assert 50 < told < 400


NOT_FOR_IT = {
    "nothing": b"",
    "start": b"\xff\xd8",
    "empty": b"\xff\xd8\xff\xd9",
    "png": saved(scene(30, 30), "PNG"),
    "cmyk": saved(scene(9, 9).convert("CMYK"), "JPEG"),
    "progressive": jpeg(9, 9, progressive=True),
    "rgb": saved(scene(9, 9), "JPEG", keep_rgb=True),
}


@pytest.mark.parametrize("other", NOT_FOR_IT.values(), ids=NOT_FOR_IT)
def test_what_is_not_for_this_decoder_is_left_to_the_other(other):
    data = np.frombuffer(other or b"\0", np.uint8)
    out = np.zeros((1, 24, 24, 3), np.uint8)
    sides = np.array([9])
    address = np.array([data.ctypes.data], np.uint64)
    assert not region.decode_boxes(
        address, np.array([len(other)]), sides, sides, np.array([[0, 0, 9, 9]]), np.zeros(1), out
    )[0]


def test_an_image_that_is_not_as_the_index_says_is_not_decoded():
    data = np.frombuffer(jpeg(40, 60), np.uint8)
    out = np.zeros((1, 24, 24, 3), np.uint8)
    address, box = np.array([data.ctypes.data], np.uint64), np.array([[0, 0, 30, 30]])
    for height, width in ((60, 40), (40, 61), (39, 60)):
        sides = np.array([height]), np.array([width])
        assert not region.decode_boxes(
            address, np.array([len(data)]), *sides, box, np.zeros(1), out
        )[0]


# --- engines


@pytest.fixture(scope="module")
def plan_and_pack(mixed_pack: Pack) -> tuple[list[Batch], Pack]:
    geometry = Geometry("random-resized-crop", 24, flip=True)
    plan = Plan(mixed_pack.train, 1, 1, geometry, Sampling(), 5, seed=1)
    return [batch for epoch in range(3) for batch in plan.epoch(epoch)], mixed_pack


def test_the_engines_agree(plan_and_pack, tmp_path):
    if not has_ffcv():
        pytest.skip("no FFCV here")
    from fastlt.data.engines.ffcv.engine import FfcvEngine, write_beton

    batches, pack = plan_and_pack
    write_beton(pack.train, tmp_path / "train.beton", 1)
    ours = FfcvEngine(pack.train, Options(24, 2, (tmp_path / "train.beton",), "region"))
    theirs = TorchEngine(pack.train, Options(24, 0, decode="region"))
    for made, wanted in zip(ours.batches(batches), theirs.batches(batches), strict=True):
        assert (
            made.int() - wanted.int()
        ).abs().max() <= 1  # images that are decoded as a whole: see test_ffcv.py
        assert (made != wanted).float().mean() < 0.01
    ours.close()


def test_workers_change_nothing(plan_and_pack):
    batches, pack = plan_and_pack
    alone, shared = (
        TorchEngine(pack.train, Options(24, 0, decode="region")),
        TorchEngine(pack.train, Options(24, 2, decode="region")),
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(alone.batches(batches), shared.batches(batches), strict=True)
    )
    shared.close()


def test_the_choice_of_decode(mixed_pack, monkeypatch):
    assert Loader(mixed_pack.train, 24, "torch", 0, decode="auto").decode == "region"
    assert Loader(mixed_pack.train, 24, "torch", 0, decode="exact").decode == "exact"
    monkeypatch.setattr(region, "_library", lambda: None)

    def loader(decode: str) -> Loader:
        return Loader(mixed_pack.train, 24, "torch", 0, decode=decode)

    assert loader("auto").decode == "exact"
    with pytest.raises(UserError, match=r"data\.decode=region needs fastlt's JPEG decoder"):
        loader("region")
    with pytest.raises(UserError, match=r"data\.decode=gpu needs an NVIDIA GPU"):
        loader("gpu")
    with pytest.raises(UserError, match="no decode 'fast'"):
        loader("fast")


# --- damaged images


@pytest.fixture(params=["exact", "region"])
def damaged(request, tmp_path: Path) -> tuple[Pack, str, int]:
    """A pack whose image 2 of 6, all of class a but the last two, has lost its end."""
    for name, count in (("a", 4), ("b", 2)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(count):
            (tmp_path / "images" / name / f"{i}.jpg").write_bytes(jpeg(50 + i, 70))
    pack = pack_folders(tmp_path / "images", tmp_path / "images", tmp_path / "pack")
    start, size = int(pack.train.offset[2]), int(pack.train.size[2])
    with (pack.train.folder / pack.train.shards[0]).open("r+b") as file:
        file.seek(start + size // 5)
        file.write(b"\xff\xd9" * (size // 4))
    return open_pack(tmp_path / "pack"), request.param, 2


def test_another_image_of_the_class_takes_the_place(damaged):
    pack, decode_kind, image = damaged
    box = np.array([3, 4, 40, 60])
    batch = Batch(
        np.array([0, image, 5]),
        np.array([0, 0, 1]),
        np.tile(box, (3, 1)),
        np.array([False, True, False]),
    )
    loader = Loader(pack.train, 24, "torch", 0, decode=decode_kind, strict=False)
    ((_, made),) = loader.iterate([batch])
    other = np.asarray(decode_pil(pack.train.read(3)))
    moved = np.array([round(3 * 53 / 52), 4, round(40 * 53 / 52), 60])
    assert (made[1].numpy() == fill_box(Image.fromarray(other), moved, True, 24)).all()
    assert list(loader.damaged) == [image] and "a/2.jpg" in loader.damaged[image]
    with pytest.raises(UserError, match=r"a/2\.jpg"):
        list(Loader(pack.train, 24, "torch", 0, decode=decode_kind).iterate([batch]))


def test_a_class_without_another_image_stops_the_run(damaged):
    pack = damaged[0]
    pack.train.label[:] = [0, 0, 7, 0, 1, 1]
    with pytest.raises(UserError, match="no other image of its class"):
        stand_in(pack.train, 2, np.array([0, 0, 9, 9]), False, 24, "damaged")
