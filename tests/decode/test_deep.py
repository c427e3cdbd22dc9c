import io

import numpy as np
import pytest
from helpers.deep_files import netpbm, png16, rgb_tiff, tiff
from PIL import Image

from fastlt.decode.deep import KINDS, Range, deep_values, is_deep, limits_of, scale_of
from fastlt.decode.images import BadImage, decode_pil, open_image, to_rgb

RANDOM = np.random.default_rng(7)


def values(*shape: int, most: int = 65536) -> np.ndarray:
    return RANDOM.integers(0, most, shape, dtype=np.uint16)


GREY, COLOURS = values(13, 17, 1), values(11, 7, 3)
CASES = {
    "PNG grey": (png16(GREY), GREY[..., 0]),
    "PNG RGB": (png16(COLOURS), COLOURS),
    "TIFF grey": (tiff(GREY[..., 0]), GREY[..., 0]),
    "TIFF grey, LZW": (tiff(GREY[..., 0], "tiff_lzw"), GREY[..., 0]),
    "TIFF RGB": (rgb_tiff(COLOURS), COLOURS),
    "TIFF RGB, big-endian": (rgb_tiff(COLOURS, ">"), COLOURS),
    "PGM": (netpbm(GREY[..., 0]), GREY[..., 0]),
    "PPM": (netpbm(COLOURS), COLOURS),
}


@pytest.mark.parametrize("name", CASES)
def test_every_bit_is_read(name):
    data, wanted = CASES[name]
    image = open_image(data)
    assert is_deep(image)
    found = deep_values(image, data)
    assert found.kind == "16-bit" and found.opacity is None
    np.testing.assert_array_equal(found.values, wanted)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("chosen", [None, Range(100, 4000), Range(-5, 70000)], ids=str)
def test_a_range_becomes_black_to_white(name, chosen):
    data, wanted = CASES[name]
    low, high = (0, 65535) if chosen is None else (chosen.low, chosen.high)
    scaled = ((wanted.astype(np.float64) - low) / (high - low) * 255).clip(0, 255)
    scale = None if chosen is None else {"16-bit": chosen}
    found = np.asarray(decode_pil(data, scale=scale), np.float64)
    assert found.shape == (*wanted.shape[:2], 3)
    wide = scaled if scaled.ndim == 3 else scaled[..., None]
    assert np.abs(found - wide).max() <= 0.501  # rounded


@pytest.mark.parametrize("ending", [".png", ".tif", ".pnm"])
@pytest.mark.parametrize("shape", [(9, 31), (30, 8, 3), (12, 12, 4)])
def test_what_opencv_writes_is_read(ending, shape):
    cv2 = pytest.importorskip("cv2")
    if ending == ".pnm" and shape[-1] == 4:
        pytest.skip("a PPM has no transparency")
    wanted = values(*shape)
    as_it_writes = wanted[..., [2, 1, 0, 3][: shape[2]]] if len(shape) == 3 else wanted
    is_written, data = cv2.imencode(ending, np.ascontiguousarray(as_it_writes))
    assert is_written
    found = deep_values(open_image(data.tobytes()), data.tobytes())
    np.testing.assert_array_equal(found.values, wanted[..., :3] if len(shape) == 3 else wanted)
    if shape[-1] == 4:
        np.testing.assert_allclose(found.opacity, wanted[..., 3] / 65535, atol=1e-6)


def test_transparency_is_over_white():
    grey, colours = values(5, 6, 2), values(5, 6, 4)
    for wanted in (grey, colours):
        found = np.asarray(decode_pil(png16(wanted)), np.float64)
        opacity = wanted[..., -1:] / 65535
        over_white = wanted[..., :-1] / 65535 * opacity + 1 - opacity
        assert np.abs(found - 255 * over_white).max() <= 0.51


@pytest.mark.parametrize("channels", [1, 3])
def test_a_colour_key_is_transparent(channels):
    found = values(4, 4, channels)
    found[1, 2] = 777
    pixels = np.asarray(decode_pil(png16(found, (777,) * channels)))
    assert (pixels[1, 2] == 255).all()
    assert np.abs(pixels[0, 0] - found[0, 0] / 257).max() <= 0.51


def test_signed_and_long_integers_and_floating_point():
    signed = RANDOM.integers(-1000, 3000, (8, 9)).astype(np.int16)
    buffer = io.BytesIO()
    Image.fromarray(signed.astype(np.int32)).save(buffer, "TIFF")
    long = buffer.getvalue()
    assert deep_values(open_image(long), long).kind == "32-bit"
    # of two bytes, marked as signed
    data = tiff(signed.view(np.uint16), x339=2)
    found = deep_values(open_image(data), data)
    assert found.kind == "signed 16-bit"
    np.testing.assert_array_equal(found.values, signed)
    floats = RANDOM.normal(0, 9, (8, 9)).astype(np.float32)
    floats[0, :3] = np.nan, np.inf, -np.inf
    data = tiff(floats)
    found = deep_values(open_image(data), data)
    assert found.kind == "floating-point"
    np.testing.assert_array_equal(found.values, floats)
    pixels = np.asarray(decode_pil(data, scale={"floating-point": Range(-10, 10)}))
    assert pixels[0, :3, 0].tolist() == [0, 255, 0]
    wanted = ((floats[1:] + 10) / 20 * 255).clip(0, 255)
    assert np.abs(pixels[1:, :, 0] - wanted).max() <= 0.51


def test_where_zero_is_white_it_is_turned_round():
    grey = values(6, 6)
    pixels = np.asarray(decode_pil(tiff(grey, x262=0)), np.float64)
    assert np.abs(pixels[..., 0] - (255 - grey / 257)).max() <= 0.51


def test_a_turned_image_is_upright():
    grey = values(4, 9)
    pixels = np.asarray(decode_pil(tiff(grey, x274=6)), np.float64)
    assert np.abs(pixels[..., 0] - np.rot90(grey, -1) / 257).max() <= 0.51


def test_a_kind_without_a_range_is_refused():
    data = png16(COLOURS)
    with pytest.raises(BadImage, match=r"its values are 16-bit, .* give --range"):
        decode_pil(data, scale={})
    with pytest.raises(BadImage, match="its values are 16-bit"):
        decode_pil(data, scale={"floating-point": Range(0, 1)})
    with pytest.raises(BadImage, match="its values are 16-bit"):
        to_rgb(Image.fromarray(GREY[..., 0]), {})


@pytest.mark.parametrize("name", CASES)
def test_truncation_is_found(name):
    data = CASES[name][0]
    for length in range(60, len(data) - 40, max(1, len(data) // 30)):
        with pytest.raises(BadImage):
            decode_pil(data[:length])


def test_a_scale_is_kept_in_files():
    scale = {"16-bit": Range(3, 4071), "floating-point": Range(-0.5, 1.25)}
    assert scale_of(limits_of(scale)) == scale
    for damaged in (None, [], {"16-bit": 3}, {"17-bit": [0, 1]}, {"16-bit": [1]}):
        assert scale_of(damaged) == {}
    assert set(KINDS) == {"16-bit", "signed 16-bit", "32-bit", "floating-point"}
