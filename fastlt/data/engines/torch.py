"""The `torch` engine: the worker processes of a DataLoader.

With exact decoding it is the reference, Pillow alone.
"""

import ctypes
import gc
import os
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from fastlt.data.damage import stand_in
from fastlt.data.engines.interface import NO_GPU_DECODER, Options
from fastlt.data.plan import Batch
from fastlt.decode.images import fill_box
from fastlt.decode.region import decode_boxes, has_region, region_obstacle
from fastlt.errors import UserError
from fastlt.packing.reader import Split, check_shards, picture

# images, and those that could not be decoded, with the reason
Made = tuple[torch.Tensor, dict[int, str]]
DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG
PATIENCE = 300  # seconds for one batch: far more than any takes, but not for ever
LONGEST_SOCKET = 107  # bytes of the path of a Unix socket, on Linux
SOCKET_IN_TEMP = len("/pymp-12345678/listener-12345678")  # as multiprocessing names it
ADVICE = "try fewer data.workers, and `fastlt pack --verify` if a shard may have been cut short"


@contextmanager
def worker_errors() -> Iterator[None]:
    """Raise UserError where PyTorch reports a killed worker.

    Its error may come up anywhere in the main thread, at any moment.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise UserError(f"a worker of the torch engine failed: {error}; {ADVICE}") from error


class TorchEngine:
    """The engine that works everywhere: each worker process makes whole batches.

    No image is copied twice. Without workers the images are made in this thread. Workers last
    until `close`. JPEGs are decoded by region where `decode` is not `exact` and the decoder was
    compiled. An image that cannot be decoded is a UserError if `strict`; else another one of its
    class takes its place, and `damaged` says why, by image.
    """

    name = "torch"
    order = 60

    def __init__(self, split: Split, options: Options) -> None:
        check_shards(split)
        self.damaged: dict[int, str] = {}
        self.decode = "region" if options.decode != "exact" and has_region() else "exact"
        self._dataset = BatchDataset(split, options.size, self.decode == "region", options.strict)
        self._workers = options.workers
        self._epoch = EpochSampler()
        self._loader: DataLoader | None = None
        self._reading = False

    @staticmethod
    def suits(split: Split, options: Options) -> bool:
        """Return True: `auto` ends here where no faster engine can be used."""
        return True

    @staticmethod
    def obstacle(split: Split, options: Options) -> str | None:
        """Return a sentence where `decode` asks for a decoder that is missing."""
        if options.decode == "gpu":  # where it can be done, gpu.py does it
            return NO_GPU_DECODER
        return region_obstacle("data.decode=region") if options.decode == "region" else None

    def batches(self, batches: Iterable[Batch]) -> Generator[torch.Tensor, None, None]:
        """The images of each batch, (n, size, size, 3) uint8, the caller's to keep.

        Raises UserError that names a damaged image, or where a worker dies. One epoch at a time:
        RuntimeError otherwise.
        """
        if self._reading:
            raise RuntimeError("the engine is still in another epoch: close its iterator first")
        self._reading, self._epoch.batches = True, batches
        try:
            for made in self._start():
                if isinstance(made, str):
                    raise UserError(made)
                images, damaged = made
                self.damaged |= damaged
                yield images
        except (RuntimeError, OSError, EOFError) as error:  # as DataLoader reports a dead worker
            if not self._workers:
                raise
            self.close()
            raise UserError(f"a worker of the torch engine failed: {error}; {ADVICE}") from error
        finally:
            self._reading = False

    def _start(self) -> Iterator[Made | str]:
        with warnings.catch_warnings(), garbage_kept():
            # more workers than cores: `fastlt train` says so at its start
            warnings.filterwarnings("ignore", "This DataLoader will create")
            return iter(self._made())

    def _made(self) -> DataLoader:
        if self._loader is None:
            several = self._workers > 0
            if several:
                check_temporary_folder()
            # A fork of a process that is fetching shards inherits its locks, and never gets them.
            self._loader = DataLoader(
                self._dataset,
                batch_size=None,
                sampler=self._epoch,
                num_workers=self._workers,
                persistent_workers=several,
                timeout=PATIENCE if several else 0,
                worker_init_fn=partial(
                    begin_worker, threading.current_thread() is threading.main_thread()
                ),
                multiprocessing_context="spawn"
                if several and self._dataset.split.remote is not None
                else None,
            )
        return self._loader

    def close(self) -> None:
        """End the workers."""
        self._loader = None


@contextmanager
def garbage_kept() -> Iterator[None]:
    """Keep the collector still while processes are forked, until `begin_worker`."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def check_temporary_folder() -> None:
    """Raise UserError where workers could not hand over their images.

    They do so through a socket in the folder of temporary files. Where its path is too long, the
    image is lost in the worker, and the training would wait for it.
    """
    folder = tempfile.gettempdir()
    too_long = len(os.fsencode(folder)) + SOCKET_IN_TEMP > LONGEST_SOCKET
    if too_long and sys.platform == "linux":
        raise UserError(
            f"the folder of temporary files, {folder}, has too long a path for the sockets of the "
            "torch engine's workers: set TMPDIR to a shorter one, or data.workers=0"
        )


class BatchDataset(Dataset):
    """Whole batches for items."""

    def __init__(self, split: Split, size: int, region: bool, strict: bool) -> None:
        self.split, self.size, self.region, self.strict = split, size, region, strict
        self._sound = np.zeros(len(split), bool)  # images that were decoded before

    def __getitem__(self, batch: Batch) -> Made | str:
        """Return (n, size, size, 3) uint8, or the message for the user.

        An exception would come out of a worker as a traceback.
        """
        out = np.empty((len(batch.images), self.size, self.size, 3), np.uint8)
        damaged: dict[int, str] = {}
        try:
            for i in np.flatnonzero(~self._regions(batch, out)).tolist():
                out[i] = self.exact(
                    int(batch.images[i]), batch.boxes[i], bool(batch.flips[i]), damaged
                )
        except UserError as error:
            return str(error)
        return torch.from_numpy(out), damaged

    def _regions(self, batch: Batch, out: np.ndarray) -> np.ndarray:
        """(n,) bool, which images of the batch are in `out`."""
        split, images = self.split, batch.images
        if not self.region:
            return np.zeros(len(images), bool)
        addresses, _alive = split.addresses(images)
        sides = split.height[images], split.width[images]
        return decode_boxes(addresses, split.size[images], *sides, batch.boxes, batch.flips, out)

    def exact(self, image: int, box: np.ndarray, flip: bool, damaged: dict[int, str]) -> np.ndarray:
        """(size, size, 3) uint8 of one image, or of its stand-in, which is noted in `damaged`;
        UserError if strict.
        """
        try:
            found = picture(self.split, image, bool(self._sound[image]))
            self._sound[image] = True
            return fill_box(found, box, flip, self.size)
        except UserError as error:
            if self.strict:
                raise
            damaged[image] = str(error)
            return stand_in(self.split, image, box, flip, self.size, str(error))


def begin_worker(by_main_thread: bool, number: int) -> None:
    """Signals, which often go to the whole group, are for the training, which ends its workers;
    where it was killed itself, the system does: with the thread that made them, so that it must be
    the one that lives longest.

    What the training's process left behind is never collected here: a library that ended its
    threads in a process that never had them would crash, or wait for them for ever.
    """
    gc.freeze()
    gc.enable()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if by_main_thread and sys.platform == "linux":
        ctypes.CDLL(None).prctl(DIE_WITH_PARENT, signal.SIGKILL)


class EpochSampler(Sampler[Batch]):
    """What a DataLoader draws from; its workers live on while the epoch is exchanged."""

    batches: Iterable[Batch] = ()

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)
