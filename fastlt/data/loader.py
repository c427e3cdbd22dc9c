"""One front for training and evaluation: a plan's batches in, each with its images out, whichever engine makes them.

An engine is a class with `batches(batches) -> Iterator[Tensor]` and `close()`; all give the same images. GPU decoding would be
one more.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from functools import lru_cache
from pathlib import Path

import torch

from fastlt.data import resident
from fastlt.data.ffcv import FfcvEngine
from fastlt.data.native import has_ffcv, import_ffcv
from fastlt.data.packed import Pack, Split
from fastlt.data.plan import Batch
from fastlt.data.resident import ResidentEngine
from fastlt.data.torch import TorchEngine
from fastlt.errors import UserError

Engine = TorchEngine | ResidentEngine | FfcvEngine
ENGINES = ("auto", "torch", "ffcv")


class Loader:
    """Images of `size` pixels a side from a split. `engine` is one of ENGINES, or what `choose_engine` has made of it."""

    def __init__(self, split: Split, size: int, engine: str = "auto", workers: int = 2, beton: Path | None = None) -> None:
        self.engine_name = _choose(split, beton, engine)
        self._engine = _make(self.engine_name, split, size, workers, beton)

    def iterate(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, torch.Tensor]]:
        """Each batch with its images, (n, size, size, 3) uint8 on the CPU, the caller's to keep. Engines read the plan ahead."""
        ahead: deque[Batch] = deque()

        def noted() -> Iterator[Batch]:
            for batch in batches:
                ahead.append(batch)
                yield batch

        with closing(self._engine.batches(noted())) as images:
            for made in images:
                yield ahead.popleft(), made

    def close(self) -> None:
        """Ends worker processes and threads; the loader is of no use afterwards."""
        self._engine.close()


def choose_engine(pack: Pack, split_name: str, engine: str) -> str:
    """The engine for a split: `resident`, `ffcv` or `torch`. Raises UserError where the one asked for cannot be had."""
    split = {"train": pack.train, "val": pack.val}[split_name]
    return _choose(split, pack.beton.get(split_name), engine)


def _choose(split: Split, beton: Path | None, engine: str) -> str:
    if engine not in (*ENGINES, "resident"):
        raise UserError(f"there is no engine '{engine}': data.engine is one of {', '.join(ENGINES)}")
    if engine == "ffcv":
        import_ffcv()
        if beton is None:
            raise UserError(f"the ffcv engine needs {split.folder}.beton: pack again with --beton, or set data.engine=torch")
        return "ffcv"
    if resident.fits(split):  # the torch engine's images, for a hundredth of its time
        return "resident"
    return "ffcv" if engine == "auto" and beton is not None and has_ffcv() else "torch"


def _make(name: str, split: Split, size: int, workers: int, beton: Path | None) -> Engine:
    if name == "ffcv":
        assert beton is not None
        return FfcvEngine(split, size, workers, beton)
    return ResidentEngine(split, size) if name == "resident" else TorchEngine(split, size, workers)


def normalise(
    images: torch.Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> torch.Tensor:
    """images (n, H, W, 3) uint8 to (images / 255 - mean) / std, (n, 3, H, W), on the device where they are.

    Computed in float32 and in place; 8-bit input in bf16 arithmetic would lose a bit or two.
    """
    count, height, width, _ = images.shape
    scale, shift = _scale_and_shift(tuple(mean), tuple(std), images.device)
    if not channels_last:
        planes = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return planes.mul_(scale.view(3, 1, 1)).add_(shift.view(3, 1, 1)).to(dtype)
    # Whole rows as the inner dimension: with 3 channels innermost the CPU's vector units would go half empty.
    rows = images.reshape(count, height, width * 3).to(torch.float32)
    rows = rows.mul_(scale.repeat(width)).add_(shift.repeat(width)).to(dtype)
    return rows.view(count, height, width, 3).permute(0, 3, 1, 2)


@lru_cache(maxsize=8)
def _scale_and_shift(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Kept, for a copy to a GPU would make every batch wait."""
    centre, spread = (torch.tensor(values, dtype=torch.float64) for values in (mean, std))
    return (1 / (255 * spread)).to(device, torch.float32), (-centre / spread).to(device, torch.float32)
