"""Steps whose gradient is not finite: they are skipped, counted, and many in a row end the run."""

from collections import deque
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from fastlt.errors import UserError
from fastlt.packing.reader import Split
from fastlt.utils.files import write_text


class Begun(NamedTuple):
    """An optimiser step on its way, and the images of its batches."""

    step: int
    images: np.ndarray


class Guard:
    """Skipped steps, counted without waiting for the device.

    most: steps in a row that end the run; listed: the file that names their images.
    """

    def __init__(self, models: list[nn.Module], most: int, listed: Path, split: Split) -> None:
        self._buffers = [
            buffer for model in models for buffer in model.buffers() if buffer.is_floating_point()
        ]
        self._most, self._listed, self._split = most, listed, split
        self._group: list[np.ndarray] = []
        self._begun: list[Begun] = []
        self._skipped: deque[Begun] = deque(maxlen=most)
        self.keep()

    def begin(self, step: int, images: np.ndarray, is_last: bool) -> None:
        """A batch; is_last: of those whose gradients make one optimiser step."""
        self._group.append(images)
        if is_last:
            self._begun.append(Begun(step, np.concatenate(self._group)))
            self._group = []

    @torch.no_grad()
    def keep(self) -> None:
        """The batch-norm statistics as they are: a batch that is not finite would spoil them for
        good.
        """
        self._good = [buffer.clone() for buffer in self._buffers]

    @torch.no_grad()
    def look(self, is_finite: list[bool], in_row: int, where: str) -> tuple[int, int]:
        """Look at whether the steps since the last look were finite.

        is_finite: of each optimiser step; in_row: how many were skipped right before them. Returns
        how many were skipped, and how many of them in a row at the end. Raises UserError at too
        many in a row.
        """
        begun, self._begun = self._begun, []
        for step, finite in zip(begun, is_finite, strict=True):
            in_row = 0 if finite else in_row + 1
            if finite:
                self._skipped.clear()
            else:
                self._skipped.append(step)
            if in_row >= self._most:
                self._give_up(in_row, where)
        if all(is_finite):
            self.keep()
        else:
            torch._foreach_copy_(self._buffers, self._good)
        return is_finite.count(False), in_row

    def _give_up(self, in_row: int, where: str) -> None:
        lines = [
            f"step {step}: {self._split.where(image)}"
            for step, images in self._skipped
            for image in images.tolist()
        ]
        write_text(self._listed, "\n".join(lines) + "\n")
        raise UserError(
            f"the gradient was not finite in {in_row} steps in a row, up to {where}: lower "
            "optim.lr or set optim.clip=1; "
            f"{self._listed} names the images of these steps"
        )
