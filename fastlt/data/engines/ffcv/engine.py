"""The `ffcv` engine: images from a .beton, decoded by compiled threads on the CPU.

The same pixels as the torch engine.
"""

from collections.abc import Generator, Iterable

import numpy as np
import torch

from fastlt.data.damage import stand_in
from fastlt.data.engines.ffcv.beton import check_beton, write_beton
from fastlt.data.engines.ffcv.native import has_ffcv, import_ffcv
from fastlt.data.engines.interface import NO_GPU_DECODER, Options
from fastlt.data.plan import Batch
from fastlt.decode.region import has_region, region_obstacle
from fastlt.errors import UserError
from fastlt.packing.concat import MixedSplit
from fastlt.packing.reader import Split

__all__ = ["FfcvEngine", "has_ffcv", "write_beton"]


def ffcv_obstacle(split: Split, options: Options) -> str | None:
    """Return the sentence that says why FFCV cannot load the split; None where it can."""
    if split.remote is not None:
        return (
            f"the ffcv engine needs its pack on this machine, and this one is at "
            f"{split.remote.url}: set data.engine=torch"
        )
    if not options.betons:
        mixed = isinstance(split, MixedSplit)
        which = "a .beton of each pack" if mixed else f"{split.folder}.beton"
        return f"the ffcv engine needs {which}: pack again with --beton, or set data.engine=torch"
    if options.decode == "gpu":
        return NO_GPU_DECODER
    if options.decode == "region" and (missing := region_obstacle("data.decode=region")):
        return missing
    try:
        import_ffcv()
    except UserError as error:
        return str(error)
    return None


class FfcvEngine:
    """The engine of one pack with a .beton; decode and strict are as in TorchEngine.

    Raises UserError where FFCV is missing, or the .beton is damaged or of another split.
    """

    name = "ffcv"
    order = 40

    def __init__(self, split: Split, options: Options) -> None:
        size, workers, strict = options.size, options.workers, options.strict
        beton = options.betons[0]
        self.decode = "region" if options.decode != "exact" and has_region() else "exact"
        parts, self._jit = import_ffcv()
        check_beton(beton, split)
        self.damaged: dict[int, str] = {}
        self._split, self._beton, self._size, self._strict = split, beton, size, strict
        self._bytes = beton.stat().st_size
        self._decoder = parts.SquareDecoder(size, workers, self.decode == "region")
        self._loader = parts.make_loader(str(beton), self._decoder)
        self._epoch = parts.Epoch

    @staticmethod
    def suits(split: Split, options: Options) -> bool:
        """Return True: where there is a .beton, it is faster than the torch engine."""
        return True

    @staticmethod
    def obstacle(split: Split, options: Options) -> str | None:
        """Return a sentence where FFCV or the .beton is missing, or there are several packs."""
        several = "this engine is for one pack" if isinstance(split, MixedSplit) else None
        return ffcv_obstacle(split, options) or several

    def batches(self, batches: Iterable[Batch]) -> Generator[torch.Tensor, None, None]:
        """The images of each batch, (n, size, size, 3) uint8, the caller's to keep."""
        epoch = self._epoch(self._loader, map(self._rows, batches))
        try:
            for rows, images in epoch:
                for place in np.flatnonzero(rows[:, self._jit.STATUS]).tolist():
                    images[place] = self._stand_in(rows[place])
                yield torch.from_numpy(images)
        finally:
            epoch.stop()

    def _stand_in(self, row: np.ndarray) -> np.ndarray:
        image = int(row[self._jit.IMAGE])
        where = self._split.where(image)
        reason = (
            f"{self._beton}: {where} cannot be decoded; the file is damaged: copy it again or "
            "pack again"
        )
        if self._strict:
            raise UserError(reason)
        self.damaged[image] = reason
        return stand_in(
            self._split,
            image,
            row[self._jit.TOP : self._jit.FLIP],
            bool(row[self._jit.FLIP]),
            self._size,
            reason,
        )

    def _rows(self, batch: Batch) -> np.ndarray:
        """A batch as (n, ROW) int64.

        Checked, for compiled code would read beyond the table, or the end of the file.
        """
        try:
            is_whole = self._beton.stat().st_size == self._bytes
        except OSError:
            is_whole = False
        if not is_whole:
            raise UserError(
                f"{self._beton} was changed while it was read: copy it again or pack again"
            )
        if len(batch.images) and not 0 <= batch.images.min() <= batch.images.max() < len(
            self._split
        ):
            raise IndexError(f"batch.images must lie in 0..{len(self._split) - 1}")
        if (batch.boxes[:, 2:] < 1).any():
            raise ValueError("batch.boxes must be at least one pixel high and wide")
        status = np.zeros(len(batch.images))
        return np.column_stack([batch.images, batch.boxes, batch.flips, status]).astype(np.int64)

    def close(self) -> None:
        """End the threads."""
        self._decoder.pool.shutdown(cancel_futures=True)
