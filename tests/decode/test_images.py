"""Decoding: every kind of image comes out as a person would see it, and damage is told from it."""

import csv
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastlt.decode.images import BadImage, decode, decode_pil, fill_box, open_image, orientation

ORIENTATION = 0x0112
# the eight orientations of the EXIF 2.3 standard: how an upright picture lies in the file
STORED_FROM_UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


def picture(height: int = 40, width: int = 56) -> np.ndarray:
    """Smooth colours, (height, width, 3) uint8, without any symmetry."""
    y, x = np.mgrid[0:height, 0:width].astype(float)
    return np.stack(
        [255 * y / height, 255 * x / width, 127 + 100 * np.sin(x / 9 + y / 5)], axis=-1
    ).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_by_hand(rows: bytes, width: int, height: int, depth: int, colour: int) -> bytes:
    """A PNG from raw scan lines, for kinds that Pillow cannot write."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    stride = len(rows) // height
    lines = b"".join(b"\0" + rows[y * stride : (y + 1) * stride] for y in range(height))
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(lines))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_lossless_rgb_is_exact(kind: str, options: dict[str, Any]) -> None:
    assert np.array_equal(decode(encoded(Image.fromarray(picture()), kind, **options)), picture())


def test_grey_becomes_three_equal_channels() -> None:
    grey = picture()[..., 0]
    for kind in ("PNG", "JPEG"):
        found = decode(
            encoded(Image.fromarray(grey), kind, **({"quality": 95} if kind == "JPEG" else {}))
        )
        assert found.shape == (40, 56, 3)
        assert np.abs(found.astype(int) - grey[..., None]).max() <= (0 if kind == "PNG" else 8)


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    wide = np.linspace(0, 65535, 40 * 56).reshape(40, 56).astype(np.uint16)
    found = decode(encoded(Image.fromarray(wide), "PNG"))
    assert np.abs(found.astype(float) - wide[..., None] / 257).max() <= 1


def test_sixteen_bit_rgb_is_scaled() -> None:
    wide = picture().astype(np.uint16) * 257
    assert np.array_equal(
        decode(png_by_hand(wide.astype(">u2").tobytes(), 56, 40, depth=16, colour=2)), picture()
    )


def test_one_bit_and_palette() -> None:
    dots = picture()[..., 2] > 127
    assert np.array_equal(
        decode(encoded(Image.fromarray(dots), "PNG")),
        np.repeat(dots[..., None] * np.uint8(255), 3, axis=-1),
    )
    palette = Image.fromarray(picture()).quantize(16)
    assert np.array_equal(decode(encoded(palette, "PNG")), np.asarray(palette.convert("RGB")))


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True, "exact": True})]
)
def test_transparency_lies_over_white(kind: str, options: dict[str, Any]) -> None:
    alpha = np.tile(np.linspace(0, 255, 56).astype(np.uint8), (40, 1))
    found = decode(encoded(Image.fromarray(np.dstack([picture(), alpha])), kind, **options))
    share = alpha[..., None] / 255
    assert np.abs(found - (picture() * share + 255 * (1 - share))).max() <= 1.01


def test_transparent_grey_and_transparent_palette_entry_lie_over_white() -> None:
    grey, alpha = picture()[..., 0], np.full((40, 56), 51, np.uint8)
    found = decode(encoded(Image.fromarray(np.dstack([grey, alpha]), "LA"), "PNG"))
    assert np.abs(found - (0.2 * grey + 0.8 * 255)[..., None]).max() <= 1.01
    palette = Image.fromarray(np.tile(np.arange(2, dtype=np.uint8), (4, 4)), "P")
    palette.putpalette([10, 20, 30, 200, 100, 50])
    found = decode(encoded(palette, "PNG", transparency=0))
    assert found[0, 0].tolist() == [255, 255, 255] and found[0, 1].tolist() == [200, 100, 50]


def test_cmyk_is_close_to_the_rgb_it_came_from() -> None:
    found = decode(encoded(Image.fromarray(picture()).convert("CMYK"), "JPEG", quality=95))
    assert np.abs(found.astype(int) - picture()).mean() < 3


def test_progressive_equals_baseline() -> None:
    image = Image.fromarray(picture())
    assert np.array_equal(
        decode(encoded(image, "JPEG", progressive=True)), decode(encoded(image, "JPEG"))
    )


@pytest.mark.parametrize("number", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "options"), [("JPEG", {"quality": 95}), ("PNG", {}), ("WEBP", {"lossless": True})]
)
def test_exif_orientation_comes_out_upright(
    kind: str, options: dict[str, Any], number: int
) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = number
    lying = Image.fromarray(np.ascontiguousarray(STORED_FROM_UPRIGHT[number](picture())))
    found = decode(encoded(lying, kind, exif=exif, **options))
    assert found.shape == picture().shape
    assert np.abs(found.astype(int) - picture()).mean() < (3 if kind == "JPEG" else 1e-9)


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0rubbish",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 40,
    ],
)
def test_damaged_metadata_do_not_spoil_the_image(
    exif: bytes, recwarn: pytest.WarningsRecorder
) -> None:
    data = encoded(Image.fromarray(picture()), "JPEG", exif=exif)
    assert orientation(open_image(data)) == 1
    assert np.array_equal(decode(data), decode(encoded(Image.fromarray(picture()), "JPEG")))
    assert not list(recwarn)


def test_orientation_out_of_range_is_upright() -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 9
    assert np.array_equal(decode(encoded(Image.fromarray(picture()), "PNG", exif=exif)), picture())


def test_animation_gives_its_first_frame() -> None:
    frames = [Image.fromarray(picture()), Image.fromarray(255 - picture())]
    for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
        assert np.array_equal(
            decode(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)),
            picture(),
        )


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_truncation_is_found_wherever_it_is(kind: str) -> None:
    data = encoded(Image.fromarray(picture()), kind)
    for length in range(
        1, len(data) - 24, max(1, len(data) // 40)
    ):  # the last bytes of a PNG hold no pixels
        with pytest.raises(BadImage):
            decode(data[:length])


def test_what_is_no_image_says_so() -> None:
    with pytest.raises(BadImage, match="empty file"):
        decode(b"")
    with pytest.raises(BadImage, match="not an image"):
        decode(b"<html>404</html>" * 100)
    with pytest.raises(BadImage, match="a TIFF of a kind that cannot be read"):
        decode(b"II*\0" + bytes(100))


def test_decompression_bomb_is_refused_by_its_header() -> None:
    with pytest.raises(BadImage, match="100000 x 100000 pixels are more than the limit"):
        decode(bomb())
    with pytest.raises(BadImage, match="56 x 40 pixels are more than the limit of 2239"):
        decode(encoded(Image.fromarray(picture()), "PNG"), max_pixels=2239)
    assert decode(encoded(Image.fromarray(picture()), "PNG"), max_pixels=2240).shape == (40, 56, 3)


def bomb() -> bytes:
    data = bytearray(png_by_hand(bytes(30), 10, 1, depth=8, colour=2))
    data[16:24] = struct.pack(">II", 100_000, 100_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


def test_fill_box_copies_shrinks_and_mirrors() -> None:
    image = Image.fromarray(picture())
    assert np.array_equal(
        fill_box(image, np.array([3, 5, 16, 16]), False, 16), picture()[3:19, 5:21]
    )
    assert np.array_equal(
        fill_box(image, np.array([3, 5, 16, 16]), True, 16), picture()[3:19, 5:21][:, ::-1]
    )
    halved = picture()[:32, :32].reshape(16, 2, 16, 2, 3).astype(float).mean(axis=(1, 3))
    assert np.abs(fill_box(image, np.array([0, 0, 32, 32]), False, 16) - halved).max() <= 1


def test_fill_box_is_black_beyond_the_edge() -> None:
    found = fill_box(Image.fromarray(picture()), np.array([-4, 50, 10, 10]), False, 10)
    assert np.array_equal(found[4:, :6], picture()[:6, 50:])
    assert not found[:4].any() and not found[:, 6:].any()


def test_real_edge_cases(shared_data: Path) -> None:
    """As photos/SOURCE.txt says: 12 files, 4 of them grey, 3 of 1000 pixels and more, 2
    progressive.
    """
    files = sorted((shared_data / "photos" / "edge_cases").iterdir())
    pixels = [decode(file.read_bytes()) for file in files]
    assert len(pixels) == 12 and all(image.std() > 5 for image in pixels)
    assert sum(bool((image == image[..., :1]).all()) for image in pixels) == 4
    assert sum(max(image.shape) >= 1000 for image in pixels) == 3
    assert sum("progressive" in open_image(file.read_bytes()).info for file in files) == 2


def test_real_photos_have_their_size(shared_data: Path) -> None:
    rows = list(
        csv.DictReader(
            (shared_data / "photos" / "index.tsv").read_text().splitlines(), delimiter="\t"
        )
    )
    for row in rows[::25]:
        image = decode_pil((shared_data / "photos" / "images" / row["path"]).read_bytes())
        assert (image.width, image.height) == (int(row["width"]), int(row["height"])), row["path"]
