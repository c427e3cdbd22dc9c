"""What tests of methods start from: a method on a small pack, and a step of it."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fastlt.config import Config, load_config
from fastlt.methods import method_settings
from fastlt.training.loop import open_packs, train
from fastlt.training.setup import Trainer, prepare
from fastlt.utils import torchvision_shim

QUIET = Console(quiet=True)
SMALL = [
    "model.name=resnet8",
    "data.size=16",
    "data.batch=16",
    "data.padding=2",
    "data.workers=0",
    "train.threads=1",
    "train.epochs=2",
    "train.eval_every=2",
]


def config_of(pack: Path, method: str, *settings: str, start: str | None = None) -> Config:
    """Return the configuration of a method on a pack of images of 16 pixels."""
    place = f"data.pack={json.dumps(str(pack))}"
    chosen = [*SMALL, place, *settings]
    return load_config("cifar100-siblings", chosen, method_settings(method, start))


@contextmanager
def prepared(pack: Path, run: Path, method: str, *settings: str) -> Iterator[Trainer]:
    """Yield the trainer of a method at its start."""
    config = config_of(pack, method, *settings)
    with prepare(config, run, open_packs(config.data)) as trainer:
        yield trainer


def trained(pack: Path, run: Path, method: str, *settings: str) -> Path:
    """Return the folder of a finished run of a method."""
    train(config_of(pack, method, *settings), run, QUIET)
    return run


def batch_of(trainer: Trainer, count: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images (count, 3, 16, 16) and labels of all classes, auxiliaries too."""
    generator = torch.Generator().manual_seed(count)
    images = torch.randn(count, 3, 16, 16, generator=generator)
    return images, torch.arange(count) % trainer.space.num_classes


def need_timm() -> None:
    """Skip the test where timm is missing, and let it be imported beside a CPU build of torch."""
    if find_spec("timm") is None:
        pytest.skip("timm is an extra")
    torchvision_shim.make_importable()
