"""The `ffcv` engine over several packs: an engine for each, whose parts of a batch are put together
again.
"""

import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

import numpy as np
import torch

from fastlt.data.engines.ffcv.engine import FfcvEngine
from fastlt.data.plan import Batch
from fastlt.packing.concat import MixedSplit


class MixedFfcvEngine:
    """betons: of each part of the split. Decode, strict and what is raised are as of FfcvEngine."""

    def __init__(
        self,
        split: MixedSplit,
        size: int,
        workers: int,
        betons: Sequence[Path],
        decode: str,
        strict: bool,
    ) -> None:
        self._split, self._size = split, size
        self._starts = np.cumsum([0, *(len(part) for part in split.parts)]).tolist()
        self._engines = [
            FfcvEngine(part, size, workers, beton, decode, strict)
            for part, beton in zip(split.parts, betons, strict=True)
        ]

    @property
    def damaged(self) -> dict[int, str]:
        """By the image's number in the whole."""
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
