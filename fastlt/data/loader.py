"""One front for training and evaluation: the batches of a plan go in, and each comes out with its
images, whichever engine makes them.

All engines that decode exactly on a CPU give the same images; those that decode regions, or use
DALI or a GPU, give nearly the same.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol

import torch

from fastlt.data.engines.choice import choose
from fastlt.data.engines.interface import CPU, HW_DECODER_LOAD, PREFETCH, Options
from fastlt.data.plan import Batch
from fastlt.packing.reader import Split
from fastlt.packing.remote import Fetcher


class Feed(Protocol):
    """What gives each batch of a plan its images, or what stands for them."""

    def iterate(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, torch.Tensor]]:
        """Yield each batch with its images."""


class Loader:
    """The images of a split, `size` pixels a side, loaded by the engine of that name.

    The other arguments are those of Options. `engine_name` and `decode` say what was chosen.
    Raises UserError where the engine cannot load the split.
    """

    def __init__(
        self,
        split: Split,
        size: int,
        engine: str = "auto",
        workers: int = 2,
        betons: Sequence[Path] = (),
        *,
        decode: str = "exact",
        strict: bool = True,
        device: torch.device = CPU,
        prefetch: int = PREFETCH,
        hw_decoder_load: float = HW_DECODER_LOAD,
        shared: Path | None = None,
    ) -> None:
        options = Options(
            size,
            workers,
            tuple(betons),
            decode,
            strict,
            device,
            prefetch,
            hw_decoder_load,
            shared,
        )
        self._split = split
        self._engine = choose(split, options, engine)(split, options)
        self.engine_name, self.decode = self._engine.name, self._engine.decode

    @property
    def damaged(self) -> dict[int, str]:
        """The images that were replaced so far, each with the reason."""
        return self._engine.damaged

    def iterate(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, torch.Tensor]]:
        """Yield each batch with its images, (n, size, size, 3) uint8, the caller's to keep.

        They are on the CPU or, of an engine that decodes on a GPU, on its device. Engines read the
        plan ahead.
        """
        ahead: deque[Batch] = deque()
        source = batches if self._split.remote is None else Fetcher(self._split).ahead(batches)

        def noted() -> Iterator[Batch]:
            for batch in source:
                ahead.append(batch)
                yield batch

        with closing(self._engine.batches(noted())) as batches_of_images:
            for images in batches_of_images:
                yield ahead.popleft(), images

    def close(self) -> None:
        """End worker processes and threads; the loader is of no use afterwards."""
        self._engine.close()
