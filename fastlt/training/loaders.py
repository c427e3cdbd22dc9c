"""The loaders of a run's images, as its settings ask for them."""

from pathlib import Path

import torch

from fastlt.config import DataConfig
from fastlt.data.loader import Loader
from fastlt.packing.reader import Pack


def train_loader(data: DataConfig, pack: Pack, device: torch.device, size: int) -> Loader:
    """Return the loader of the training images, of `size` pixels a side."""
    return Loader(
        pack.train,
        size,
        data.engine,
        data.workers,
        pack.betons("train"),
        decode=data.decode,
        strict=data.strict,
        device=device,
        prefetch=data.prefetch,
        hw_decoder_load=data.hw_decoder_load,
        shared=shared_by(data),
    )


def val_loader(data: DataConfig, pack: Pack, device: torch.device) -> Loader:
    """Return the loader of the val split.

    It decodes exactly, so that a figure does not depend on the machine; but for the dali engine,
    which cannot.
    """
    decode = "region" if data.engine == "dali" else "exact"
    return Loader(
        pack.val,
        data.size,
        data.engine,
        data.workers,
        pack.betons("val"),
        decode=decode,
        device=device,
        shared=shared_by(data),
    )


def shared_by(data: DataConfig) -> Path | None:
    """Return the folder of decoded images that trainings share, or None."""
    return Path(data.shared) if data.shared else None
