"""A pack with a hierarchy over its classes, and studies without processes of their own."""

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from fastlt.cli import app
from fastlt.packing.sources import read_collection
from fastlt.packing.writer import PackOptions, write_pack
from fastlt.studies.repeated import Runner


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """16 classes of 4 parents, 12 images each, and the hierarchy."""
    root = tmp_path_factory.mktemp("hierarchy")
    rng = np.random.default_rng(0)
    for split, count in (("target", 12), ("val", 2)):
        for k in range(16):
            (root / split / f"c{k:02}").mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(rng.normal(15 * k, 20, (16, 16, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / f"c{k:02}" / f"{i}.png")
    collection = read_collection(root / "target", None, root / "val", None, None, None)
    write_pack(collection, PackOptions(out=root / "pack", workers=1), Console(quiet=True))
    (root / "h.csv").write_text(
        "class,parent\n" + "".join(f"c{k:02},p{k // 4}\n" for k in range(16))
    )
    return root


@pytest.fixture
def in_process(monkeypatch):
    """Commands run in this process, which spares each of a dozen trainings its imports."""

    def run(runner: Runner, *arguments: str) -> None:
        ended = CliRunner().invoke(app, list(arguments))
        assert ended.exit_code == 0, ended.output

    monkeypatch.setattr(Runner, "run", run)
