"""What an engine is: a class that turns the batches of a plan into images."""

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from fastlt.data.plan import Batch
from fastlt.packing.reader import Split

DECODES = ("auto", "region", "exact", "gpu")
CPU = torch.device("cpu")
PREFETCH = 2  # batches
# share of the JPEGs that a GPU's decoding hardware takes, where there is some
HW_DECODER_LOAD = 0.65
NO_GPU_DECODER = (
    "data.decode=gpu needs an NVIDIA GPU with torchvision or DALI (pip install fastlt[timm] or "
    "fastlt[dali]), and data.engine=dali or torch: set data.decode=auto"
)


@dataclass(frozen=True)
class Options:
    """The settings of a loader; each engine takes from them what concerns it."""

    size: int
    """Pixels a side of the images that are delivered."""
    workers: int = 2
    """Processes or threads; 0: none beside the caller's."""
    betons: tuple[Path, ...] = ()
    """The split's FFCV files, one of each pack."""
    decode: str = "exact"
    """`exact` decodes whole images as Pillow does, `region` only what a crop needs, `gpu` on
    `device`, and `auto` the fastest of these that the engine can do."""
    strict: bool = True
    """Whether to raise UserError at an image that cannot be decoded; else another of its class
    replaces it."""
    device: torch.device = CPU
    """The device that is trained on."""
    prefetch: int = PREFETCH
    """Batches that the dali engine makes ahead."""
    hw_decoder_load: float = HW_DECODER_LOAD
    """Share of the JPEGs that a GPU's decoding hardware takes, of the dali engine."""
    shared: Path | None = None
    """A folder for what the resident engine has decoded."""


class Engine(Protocol):
    """The interface of an engine. Several classes may share a name, for different splits."""

    name: str
    """What `data.engine` calls it."""
    order: int
    """The place in which `auto` tries it, lowest first."""
    decode: str
    """What it does: `region`, `exact` or `gpu`."""

    def __init__(self, split: Split, options: Options) -> None: ...

    @staticmethod
    def suits(split: Split, options: Options) -> bool:
        """Return whether `data.engine=auto` may choose it."""
        ...

    @staticmethod
    def obstacle(split: Split, options: Options) -> str | None:
        """Return the sentence that says why it cannot load this split; None where it can."""
        ...

    @property
    def damaged(self) -> dict[int, str]:
        """The images that were replaced so far, each with the reason."""
        ...

    def batches(self, batches: Iterable[Batch]) -> Generator[torch.Tensor, None, None]:
        """Yield the images of each batch, (n, size, size, 3) uint8, the caller's to keep."""
        ...

    def close(self) -> None:
        """End its processes and threads."""
        ...
