import io
import sys

import numpy as np
import pytest
from helpers.scenes import saved, scene
from PIL import Image

from fastlt.decode.formats import PLUGINS, is_image_file, kind_of
from fastlt.decode.images import READ, BadImage, decode, decode_pil, frames, open_image
from fastlt.packing.encode import ImageSettings, encode

AS_THEY_ARE = ImageSettings(0, 0, 10**8)
# Pillow's name of the format -> options that keep every pixel
LOSSLESS = {
    "PNG": {},
    "WEBP": {"lossless": True},
    "BMP": {},
    "DIB": {},
    "TIFF": {"compression": "tiff_lzw"},
    "PPM": {},
    "GIF": {},
}


def written(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1"])
def test_lossless_kinds_lose_nothing(kind, mode):
    image = scene(21, 34).convert(mode)
    if kind in ("WEBP", "PPM") and mode == "P":
        image = image.convert("RGB")
    data = written(image, kind, **LOSSLESS[kind])
    stored, extension, height, width = encode(data, AS_THEY_ARE)
    assert (height, width) == (21, 34) and extension in (".png", ".webp")
    found = Image.open(io.BytesIO(stored))
    assert found.mode in ("L", "RGB")
    wanted = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    np.testing.assert_array_equal(decode(stored), wanted)
    if kind != "GIF":
        np.testing.assert_array_equal(wanted, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("kind", ["AVIF", "JPEG", "HEIF", "JXL"])
def test_kinds_with_a_loss_are_near(kind):
    if kind in PLUGINS:
        pytest.importorskip(PLUGINS[kind][1])
        assert kind not in READ
    if kind == "HEIF":
        pytest.importorskip("pillow_heif").register_heif_opener()
    elif kind == "JXL":
        pytest.importorskip("pillow_jxl")
    image = scene(48, 64)
    data = written(image, kind, quality=95)
    assert kind_of(data) == kind
    stored, extension, *size = encode(data, AS_THEY_ARE)
    assert size == [48, 64] and extension == (".jpg" if kind == "JPEG" else ".png")
    difference = np.abs(decode(stored).astype(int) - np.asarray(image).astype(int))
    assert difference.mean() < 6


@pytest.mark.parametrize("kind", PLUGINS)
def test_a_missing_library_is_named(kind, monkeypatch):
    name, module, *_ = PLUGINS[kind]
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(Image, "OPEN", {k: v for k, v in Image.OPEN.items() if k != kind})
    begins = {"HEIF": b"\0\0\0\x1cftypheic", "JXL": b"\xff\x0a"}[kind]
    with pytest.raises(BadImage, match=rf"a {name} image, .*pip install \"fastlt\[formats\]\""):
        open_image(begins + bytes(100))


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "WEBP", "PNG"])
def test_of_several_frames_the_first_is_taken(kind):
    first, second = scene(20, 30), scene(20, 30).transpose(Image.Transpose.ROTATE_180)
    lossless = {"lossless": True} if kind == "WEBP" else {}
    data = written(first, kind, save_all=True, append_images=[second], **lossless)
    assert frames(open_image(data)) == 2
    alone = written(first, kind, **lossless)
    np.testing.assert_array_equal(decode(data), decode(alone))


def test_a_jpeg_with_others_behind_it_is_stored_as_it_is():
    data = written(scene(40, 50), "MPO", save_all=True, append_images=[scene(30, 30)])
    assert encode(data, AS_THEY_ARE) == (data, ".jpg", 40, 50)
    with pytest.raises(BadImage, match="damaged"):
        decode(data[:900] + b"\xff\xd9" + data[902:])


def test_of_cmyk_and_ycbcr_tiffs_the_colours_are_pillows():
    for mode in ("CMYK", "RGBA"):
        data = written(scene(30, 40).convert(mode), "TIFF")
        np.testing.assert_array_equal(
            decode(data), np.asarray(scene(30, 40).convert(mode).convert("RGB"))
        )


@pytest.mark.parametrize(
    ("name", "data", "is_one"),
    [
        ("a.jpg", b"", True),
        ("a.JFIF", b"", True),
        ("A.TIFF", b"", True),
        ("n0001", saved(scene(5, 5), "JPEG"), True),
        ("scan.0001", saved(scene(5, 5), "PNG"), True),
        ("St. Louis", saved(scene(5, 5), "JPEG"), True),
        ("a.txt", saved(scene(5, 5), "JPEG"), False),
        ("a.part", saved(scene(5, 5), "JPEG"), False),
        ("README", b"words", False),
        ("film", b"\0\0\0\x18ftypmp42", False),
        ("empty", b"", False),
    ],
)
def test_files_are_images_by_their_names_or_their_bytes(tmp_path, name, data, is_one):
    path = tmp_path / name
    path.write_bytes(data)
    assert is_image_file(path) is is_one
    assert is_image_file(str(path)) is is_one


def test_a_tiff_that_pillow_does_not_know_says_what_to_do():
    cv2 = pytest.importorskip("cv2")
    colours = np.random.default_rng(0).random((5, 6, 3)).astype(np.float32)
    _, data = cv2.imencode(".tif", colours)
    with pytest.raises(BadImage, match="a TIFF of a kind that cannot be read: save it as"):
        decode_pil(data.tobytes())
