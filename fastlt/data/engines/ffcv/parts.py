"""The parts that FFCV is extended by: a field of untouched bytes, its decoder, and an epoch that
ends well.

Import it through `fastlt.data.engines.ffcv.native`.
"""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from queue import Empty, Full
from typing import Any

import numpy as np
from ffcv.fields.base import ARG_TYPE, Field
from ffcv.loader.epoch_iterator import EpochIterator
from ffcv.loader.loader import Loader
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State

from fastlt.data.engines.ffcv import jit
from fastlt.data.engines.ffcv.native import torch_threads_kept
from fastlt.decode.region import decode_boxes
from fastlt.errors import UserError

FIELD = "image"
PATIENCE = 300  # seconds for one batch: far more than any takes, but not for ever
PIECES = 4  # of a batch for each thread, so that none waits long for the one with the large photos


@dataclass(frozen=True)
class StoredImage:
    """What a .beton holds of one image. mode: JPEG (the bytes as they are) or RAW (RGB pixels)."""

    mode: int
    turn: int  # EXIF orientation 1..8 that is still to be undone
    height: int  # pixels, as stored
    width: int
    data: np.ndarray  # (bytes,) uint8


class ImageField(Field):
    """JPEG bytes untouched, everything else as pixels: FFCV's own field re-encodes."""

    @property
    def metadata_type(self) -> np.dtype:
        """The record that a .beton holds of each image."""
        names = ["mode", "turn", "height", "width", "data_ptr", "size"]
        return np.dtype(list(zip(names, ["<u1", "<u1", "<u4", "<u4", "<u8", "<u8"], strict=True)))

    @staticmethod
    def from_binary(binary: Any) -> "ImageField":
        """Return the field that a .beton's header describes; it has no settings."""
        return ImageField()

    def to_binary(self) -> Any:
        """Return the settings for a .beton's header: there are none."""
        return np.zeros(1, dtype=ARG_TYPE)[0]

    def encode(
        self,
        destination: np.ndarray,
        image: StoredImage,
        malloc: Callable[[int], tuple[int, np.ndarray]],
    ) -> None:
        """Store one image at `destination`, with its bytes in memory of their own."""
        address, buffer = malloc(image.data.size)
        buffer[:] = image.data
        destination[0] = (
            image.mode,
            image.turn,
            image.height,
            image.width,
            address,
            image.data.size,
        )

    def get_decoder_class(self) -> type[Operation]:
        """Return the decoder that FFCV is to use."""
        return SquareDecoder


class SquareDecoder(Operation):
    """The decoder of rows of the plan into (n, size, size, 3) uint8.

    FFCV hands a decoder the indices of a batch unseen, so they can be rows.

    Threads of our own: numba's prange would abort the process where two loaders run and no tbb or
    OpenMP is installed.
    """

    def __init__(self, size: int, workers: int, region: bool) -> None:
        super().__init__()
        self.size, self.workers, self.region = size, max(1, workers), region
        self.pool = ThreadPoolExecutor(self.workers, "fastlt-ffcv")

    def accept_globals(self, metadata: np.ndarray, memory_read: Callable[..., Any]) -> None:
        """Keep the table of images."""
        super().accept_globals(metadata, memory_read)
        self.images = image_table(metadata)

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        """Return the shape and type of what is decoded, and the memory it needs."""
        shape, dtype = (self.size, self.size, 3), np.dtype("<u1")
        return replace(previous_state, jit_mode=True, shape=shape, dtype=dtype), AllocationQuery(
            shape, dtype
        )

    def generate_code(self) -> Callable[..., np.ndarray]:
        """Return the function that decodes a batch of rows."""

        def decode(
            rows: np.ndarray, out: np.ndarray, metadata: np.ndarray, storage: tuple[np.ndarray, ...]
        ) -> np.ndarray:
            file, step = np.asarray(storage[0]), 1 + len(rows) // (PIECES * self.workers)
            parts = [slice(start, start + step) for start in range(0, len(rows), step)]
            list(self.pool.map(lambda part: self._decode(rows[part], file, out[part]), parts))
            return out

        return decode

    def _decode(self, rows: np.ndarray, file: np.ndarray, out: np.ndarray) -> None:
        """Decode the whole image where a region alone could not be decoded."""
        if not self.region:
            jit.decode_rows(rows, self.images, file, out)
            return
        decoded = decode_regions(rows, self.images[rows[:, jit.IMAGE]], file, out)
        for i in np.flatnonzero(~decoded).tolist():
            jit.decode_rows(rows[i : i + 1], self.images, file, out[i : i + 1])


def decode_regions(
    rows: np.ndarray, images: np.ndarray, file: np.ndarray, out: np.ndarray
) -> np.ndarray:
    """Decode rows (n, ROW) int64 of images (n, 6) int64 into `out` (n, size, size, 3).

    Returns which were decoded.
    """
    addresses = images[:, jit.STORED_AT].astype(np.uint64) + np.uint64(file.ctypes.data)
    # no bytes, nothing decoded
    sizes = images[:, jit.STORED_SIZE] * (images[:, jit.STORED_MODE] == jit.JPEG)
    heights, widths = images[:, jit.STORED_HEIGHT], images[:, jit.STORED_WIDTH]
    quarter = images[:, jit.STORED_TURN] >= 5
    upright = np.where(quarter, widths, heights), np.where(quarter, heights, widths)
    return decode_boxes(
        addresses, sizes, *upright, rows[:, jit.TOP : jit.FLIP], rows[:, jit.FLIP], out
    )


def image_table(metadata: np.ndarray) -> np.ndarray:
    """The metadata of the field as (N, 6) int64."""
    return np.stack(
        [metadata[name].astype(np.int64) for name in metadata.dtype.names or ()], axis=1
    )


def make_loader(path: str, decoder: SquareDecoder) -> Loader:
    """FFCV's loader over the images of a .beton, with the plan's order left to `Epoch`.

    What FFCV would compile here (5..10 s for each loader) is a thin call of what ffcv_jit.py keeps
    compiled, so it is left out.
    """
    enabled = Compiler.is_enabled
    Compiler.set_enabled(False)
    try:
        with torch_threads_kept():
            fields, pipelines = {FIELD: ImageField}, {FIELD: [decoder]}
            return Loader(
                path,
                1,
                1,
                os_cache=True,
                custom_fields=fields,
                pipelines=pipelines,
                batches_ahead=2,
            )
    finally:
        Compiler.set_enabled(enabled)


class Epoch(EpochIterator):
    """An iterator over (rows, images) of the rows that `plan` yields.

    FFCV's pipeline in a thread of its own, a few batches ahead.

    FFCV's own loop wants the whole order beforehand, as indices without a place, hands out views
    that it overwrites, hangs where a stage fails, and leaves its thread behind where the reader
    stops early. Call `stop` at the end, whichever end it is.
    """

    def __init__(self, loader: Loader, plan: Iterator[np.ndarray]) -> None:
        self.plan = plan
        self.capacity = 0
        super().__init__(loader, ())  # starts the thread

    def run(self) -> None:
        """Decode the batches of the plan until it ends or nobody wants more."""
        try:
            for number, rows in enumerate(self.plan):
                if not self._hand_over((rows, self._decoded(number, rows))):
                    return
            self._hand_over(None)
        except BaseException as error:
            self._hand_over(error)

    def _decoded(self, number: int, rows: np.ndarray) -> np.ndarray:
        if len(rows) > self.capacity:
            self.capacity = len(rows)
            self.memory_allocations = self.loader.graph.allocate_memory(self.capacity, 1)
        (images,) = self.run_pipeline(number, rows, 0, None)
        return images.copy()

    def _hand_over(self, item: Any) -> bool:
        while not self.terminate_event.is_set():
            with suppress(Full):
                self.output_queue.put(item, timeout=0.5)
                return True
        return False

    def __next__(self) -> tuple[np.ndarray, np.ndarray]:
        """What went wrong in the thread is raised here."""
        item = self._wait()
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            raise item
        return item

    def _wait(self) -> Any:
        for _ in range(PATIENCE):
            with suppress(Empty):
                return self.output_queue.get(timeout=1)
            if not self.is_alive() and self.output_queue.empty():
                raise UserError(
                    "the ffcv engine's thread has ended without a word: try data.engine=torch"
                )
        raise UserError(
            f"the ffcv engine has waited {PATIENCE} s for one batch: can the disk with the pack be "
            "reached?"
        )

    def stop(self) -> None:
        """End the thread; it takes as long as the batch in work."""
        self.close()
        until = time.monotonic() + PATIENCE
        while self.is_alive() and time.monotonic() < until:
            with suppress(Empty):
                self.output_queue.get_nowait()  # makes room, so that the thread looks up
            self.join(timeout=0.02)
