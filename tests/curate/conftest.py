"""A pack of three targets whose images have the hue of their class."""

import io

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fastlt.packing.sources import read_collection
from fastlt.packing.writer import PackOptions, write_pack

HUES = {"otter": 0, "sofa": 60, "tulip": 120, "mink": 180, "bench": 240}
SIDE = 96


class Photos:
    """Soft blobs, each image with a look of its own."""

    @staticmethod
    def image(name: str, seed: int) -> Image.Image:
        rng = np.random.default_rng([HUES[name], seed])
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6), np.uint8)).resize(
            (SIDE, SIDE), Image.Resampling.BICUBIC
        )
        hue, full = (
            Image.new("L", (SIDE, SIDE), value) for value in (round(HUES[name] / 360 * 255), 230)
        )
        return Image.merge("HSV", (hue, full, coarse.point(lambda x: 60 + x * 3 // 4))).convert(
            "RGB"
        )

    @staticmethod
    def encoded(image: Image.Image, quality: int = 90) -> bytes:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return file.getvalue()

    @classmethod
    def write(cls, folder, name, seeds) -> None:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for seed in seeds:
            (folder / name / f"{seed}.jpg").write_bytes(cls.encoded(cls.image(name, seed)))


@pytest.fixture(scope="session")
def photos() -> type[Photos]:
    return Photos


@pytest.fixture(scope="session")
def hued_pack(tmp_path_factory):
    root = tmp_path_factory.mktemp("targets")
    for name, count in (("otter", 40), ("sofa", 20), ("tulip", 10)):
        Photos.write(root / "train", name, range(count))
        Photos.write(root / "val", name, range(100, 106))
    collection = read_collection(root / "train", None, root / "val")
    return write_pack(collection, PackOptions(out=root / "pack", workers=1), Console(quiet=True))
