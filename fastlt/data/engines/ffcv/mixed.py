"""The `ffcv` engine over several packs: an engine for each, whose parts of a batch are put together
again.
"""

import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace

import numpy as np
import torch

from fastlt.data.engines.ffcv.engine import FfcvEngine, ffcv_obstacle
from fastlt.data.engines.interface import Options
from fastlt.data.plan import Batch
from fastlt.packing.concat import MixedSplit
from fastlt.packing.reader import Split


class MixedFfcvEngine:
    """The engine of several packs that each have a .beton; errors are those of FfcvEngine."""

    name = "ffcv"
    order = 30

    def __init__(self, split: Split, options: Options) -> None:
        assert isinstance(split, MixedSplit)
        self._split, self._size = split, options.size
        self._starts = np.cumsum([0, *(len(part) for part in split.parts)]).tolist()
        self._engines = [
            FfcvEngine(part, replace(options, betons=(beton,)))
            for part, beton in zip(split.parts, options.betons, strict=True)
        ]
        self.decode = self._engines[0].decode

    @staticmethod
    def suits(split: Split, options: Options) -> bool:
        """Return whether the split is of several packs."""
        return isinstance(split, MixedSplit)

    @staticmethod
    def obstacle(split: Split, options: Options) -> str | None:
        """Return a sentence where FFCV or a .beton is missing, or there is but one pack."""
        if not isinstance(split, MixedSplit):
            return "this engine is for several packs"
        return ffcv_obstacle(split, options)

    @property
    def damaged(self) -> dict[int, str]:
        """The images that were replaced, by their number in the whole, each with the reason."""
        found = zip(self._starts, self._engines, strict=False)
        return {
            start + image: reason
            for start, engine in found
            for image, reason in engine.damaged.items()
        }

    def batches(self, batches: Iterable[Batch]) -> Generator[torch.Tensor, None, None]:
        """The images of each batch, (n, size, size, 3) uint8, the caller's to keep."""
        shared = Shared(self._split, self._starts, batches)
        with ExitStack() as opened:
            own = [engine.batches(shared.of(number)) for number, engine in enumerate(self._engines)]
            streams = [opened.enter_context(closing(stream)) for stream in own]
            while (part := shared.next()) is not None:
                images = torch.empty(len(part), self._size, self._size, 3, dtype=torch.uint8)
                for number in np.unique(part).tolist():
                    images[torch.from_numpy(part == number)] = next(streams[number])
                yield images

    def close(self) -> None:
        """End the threads of every part."""
        for engine in self._engines:
            engine.close()


class Shared:
    """Batches cut into those of each part, which are asked for from several threads."""

    def __init__(self, split: MixedSplit, starts: Sequence[int], batches: Iterable[Batch]) -> None:
        self._split, self._starts = split, starts
        self._source, self._lock = iter(batches), threading.Lock()
        self._whole: deque[np.ndarray] = deque()
        self._of: list[deque[Batch]] = [deque() for _ in split.parts]

    def of(self, number: int) -> Iterator[Batch]:
        """The part's own of each batch that has any."""
        while True:
            with self._lock:
                while not self._of[number]:
                    if not self._read():
                        return
                mine = self._of[number].popleft()
            yield mine

    def next(self) -> np.ndarray | None:
        """Which part each image of the next whole batch is of, (n,); None at the end."""
        with self._lock:
            return self._whole.popleft() if self._whole or self._read() else None

    def _read(self) -> bool:
        batch = next(self._source, None)
        if batch is None:
            return False
        part = self._split.part[batch.images]
        self._whole.append(part)
        for number in np.unique(part).tolist():
            mine = part == number
            images = batch.images[mine] - self._starts[number]
            self._of[number].append(
                Batch(images, batch.labels[mine], batch.boxes[mine], batch.flips[mine])
            )
        return True
