"""Images, packs and splits that several tests are about."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from fastlt.packing.reader import Pack, Split, open_pack
from fastlt.packing.sources import read_collection
from fastlt.packing.writer import PackOptions, write_pack

ORIENTATION = 0x0112
QUIET = Console(quiet=True)


def mixed_images() -> dict[str, bytes]:
    images = {f"turned{turn}.jpg": saved(scene(60, 90), "JPEG", turn) for turn in range(1, 9)}
    images |= {
        "grey.jpg": saved(scene(70, 50).convert("L"), "JPEG"),
        "progressive.jpg": saved(scene(51, 83), "JPEG", progressive=True),
        "cmyk.jpg": saved(scene(64, 48).convert("CMYK"), "JPEG"),
        "colour.png": saved(scene(45, 77), "PNG"),
        "grey_png.png": saved(scene(40, 40).convert("L"), "PNG"),
        "webp.webp": saved(scene(33, 66), "WEBP", lossless=True),
        "large.jpg": saved(scene(300, 410), "JPEG"),
        "tiny.jpg": saved(scene(3, 5), "JPEG"),
    }
    return images


def scene(height: int, width: int) -> Image.Image:
    """Smooth and unlike itself in every mirroring."""
    y, x = np.mgrid[:height, :width] / max(height, width)
    noise = np.random.default_rng(height * 1000 + width).normal(0, 6, (height, width, 3))
    planes = np.stack([255 * x, 255 * y, 120 + 100 * np.sin(9 * x + 5 * y)], axis=2) + noise
    return Image.fromarray(planes.clip(0, 255).astype(np.uint8))


def saved(image: Image.Image, kind: str, turn: int = 1, **options: object) -> bytes:
    buffer, exif = io.BytesIO(), Image.Exif()
    exif[ORIENTATION] = turn
    image.save(buffer, kind, exif=exif, **options)
    return buffer.getvalue()


def by_pillow(data: list[torch.Tensor]) -> list[torch.Tensor]:
    """In place of torchvision's decoder for a GPU: not turned, and all fail if one does."""
    images = [Image.open(io.BytesIO(one.numpy().tobytes())) for one in data]
    if any(image.mode == "CMYK" for image in images):
        raise RuntimeError("CMYK is not supported")
    return [torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) for image in images]


def pack_folders(train: Path, val: Path, out: Path) -> Pack:
    collection = read_collection(train, None, val, None, None, None)
    return open_pack(write_pack(collection, PackOptions(out=out, workers=1), QUIET))


def bare_split(labels: np.ndarray, height: int = 32, width: int = 32) -> Split:
    """A split for the plan alone: it has no shards."""
    count = len(labels)
    none, side = np.zeros(count, np.int32), np.ones(count, np.int32)
    return Split(
        "train",
        Path("nowhere"),
        (),
        none,
        none,
        none,
        np.asarray(labels, np.int32),
        side * height,
        side * width,
    )
