"""Fixtures that every test may use."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the real data sets (cifar100, photos, labels); tests that need it are skipped where it is absent."""
    root = Path(os.environ.get("FASTLT_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (root / "data").is_dir():
        pytest.skip(f"no real data at {root}: set FASTLT_SHARED to a folder that holds data/cifar100, data/photos and data/labels")
    return root / "data"
