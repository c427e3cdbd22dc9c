"""The `torch` engine, the reference: Pillow in the worker processes of a DataLoader."""

from collections.abc import Generator, Iterable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from fastlt.data.images import fill_box
from fastlt.data.packed import Split, check_shards, picture
from fastlt.data.plan import Batch
from fastlt.errors import UserError

PATIENCE = 300  # seconds for one batch: far more than any takes, but not for ever


class TorchEngine:
    """A worker makes a whole batch, so no image is copied twice. workers 0: in this thread. Workers last until `close`."""

    def __init__(self, split: Split, size: int, workers: int) -> None:
        check_shards(split)
        self._dataset = BatchDataset(split, size)
        self._workers = workers
        self._epoch = EpochSampler()
        self._loader: DataLoader | None = None
        self._reading = False

    def batches(self, batches: Iterable[Batch]) -> Generator[torch.Tensor, None, None]:
        """The images of each batch, (n, size, size, 3) uint8, the caller's to keep.

        Raises UserError that names a damaged image, or where a worker dies. One epoch at a time: RuntimeError otherwise.
        """
        if self._reading:
            raise RuntimeError("the engine is still in another epoch: close its iterator first")
        self._reading, self._epoch.batches = True, batches
        try:
            for images in self._start():
                if isinstance(images, str):
                    raise UserError(images)
                yield images
        except (RuntimeError, OSError, EOFError) as error:  # as DataLoader tells of a dead worker
            if not self._workers:
                raise
            self.close()
            raise UserError(f"a worker of the torch engine failed: {error}; try fewer data.workers") from error
        finally:
            self._reading = False

    def _start(self) -> Iterator[torch.Tensor | str]:
        if self._loader is None:
            several = self._workers > 0
            self._loader = DataLoader(
                self._dataset, batch_size=None, sampler=self._epoch, num_workers=self._workers,
                persistent_workers=several, timeout=PATIENCE if several else 0,
            )  # fmt: skip
        return iter(self._loader)

    def close(self) -> None:
        """Ends the workers."""
        self._loader = None


class BatchDataset(Dataset):
    """Whole batches for items."""

    def __init__(self, split: Split, size: int) -> None:
        self.split, self.size = split, size

    def __getitem__(self, batch: Batch) -> torch.Tensor | str:
        """(n, size, size, 3) uint8, or what the user must be told: an exception would come out of a worker as a traceback."""
        out = np.empty((len(batch.images), self.size, self.size, 3), np.uint8)
        try:
            for i, image in enumerate(batch.images.tolist()):
                out[i] = fill_box(picture(self.split, image), batch.boxes[i], batch.flips[i], self.size)
        except UserError as error:
            return str(error)
        return torch.from_numpy(out)


class EpochSampler(Sampler[Batch]):
    """What a DataLoader draws from; its workers live on while the epoch is exchanged."""

    batches: Iterable[Batch] = ()

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)
