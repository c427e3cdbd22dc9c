"""Fixtures that every test may use."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from helpers.interpreter import look_for_builtins_once
from PIL import Image
from rich.console import Console

if TYPE_CHECKING:
    from fastlt.packing.reader import Pack

# Processes that tests start find the functions of test modules by the names of their paths. It
# comes last, so that fastlt is the installed one.
sys.path.append(str(Path(__file__).resolve().parents[1]))
if "PYTEST_XDIST_WORKER" in os.environ:  # two workers with a thread each, not with all cores each
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
if not torch.cuda.is_available():
    # before the kernels are imported: without a GPU, they run in Triton's interpreter
    os.environ["TRITON_INTERPRET"] = "1"
    if find_spec("triton"):
        look_for_builtins_once()


# minutes in few tests: begun first, as a worker alone with them at the end leaves the other idle
LONG_FILES = (
    "sweep/test_run.py",
    "studies/test_fit.py",
    "methods/test_matrix.py",
    "cli/test_cli.py",
    "reports/test_in_a_browser.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the tests of long files first, in the order of LONG_FILES."""

    def place(item: pytest.Item) -> int:
        name = item.path.as_posix()
        return next((i for i, end in enumerate(LONG_FILES) if name.endswith(end)), len(LONG_FILES))

    items.sort(key=place)


@pytest.fixture
def poisoned_memory():
    """Uninitialised memory holds NaN, so that a read of what nobody wrote shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the real data sets (cifar100, photos, labels); tests that need it are skipped
    where it is absent.
    """
    root = Path(os.environ.get("FASTLT_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (root / "data").is_dir():
        pytest.skip(
            f"no real data at {root}: set FASTLT_SHARED to a folder that holds data/cifar100, "
            "data/photos and data/labels"
        )
    return root / "data"


CLASSES = {
    "target": {"a": 12, "b": 6, "c": 3},
    "auxiliary": {"x": 5, "y": 9},
    "val": {"a": 3, "b": 3, "c": 3},
}
PAIRS = (("a", "x"), ("b", "x"), ("b", "y"))


@pytest.fixture(scope="session")
def image_folders(tmp_path_factory) -> Path:
    """target/, auxiliary/, val/ with a few 16-pixel PNGs a class, each class with its own colour,
    and pairs.csv.
    """
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    names = [name for classes in CLASSES.values() for name in classes]
    colours = {name: rng.integers(40, 216, 3) for name in sorted(set(names))}
    for split, classes in CLASSES.items():
        for name, count in classes.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(colours[name] + rng.normal(0, 25, (16, 16, 3)), 0, 255).astype(
                    np.uint8
                )
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    (root / "pairs.csv").write_text("target,auxiliary\n" + "".join(f"{t},{a}\n" for t, a in PAIRS))
    return root


@pytest.fixture(scope="session")
def small_pack(image_folders, tmp_path_factory) -> Path:
    """`image_folders`, packed."""
    from fastlt.packing.sources import read_collection
    from fastlt.packing.writer import PackOptions, write_pack

    folders = (image_folders / name for name in ("target", "auxiliary", "val", "pairs.csv"))
    out = tmp_path_factory.mktemp("packs") / "small"
    return write_pack(
        read_collection(*folders, None, None), PackOptions(out=out, workers=1), Console(quiet=True)
    )


@pytest.fixture(scope="session")
def mixed_pack(tmp_path_factory) -> "Pack":
    """Every kind of image that a pack may store:

    JPEG grey, colour, progressive, CMYK and turned eight ways, PNG, WebP.
    """
    from helpers.scenes import mixed_images, pack_folders

    folder = tmp_path_factory.mktemp("mixed")
    (folder / "train/a").mkdir(parents=True)
    for name, data in mixed_images().items():
        (folder / "train/a" / name).write_bytes(data)
    return pack_folders(folder / "train", folder / "train", folder / "pack")
