"""A tile of logits, some rows by some classes, and its matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlt_kernels._impl.chunks import ALIGNED, Chunking, slices
from fastlt_kernels._impl.products import add_product_, logits_of


class Tile:
    """A buffer in which the logits of tiles are made, and become their own gradient.

    Its rows start at aligned addresses, and what is behind a row's last class belongs to the tile.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, plan: Chunking
    ) -> None:
        self.weight = weight.to(dtype) if plan.cast_weight_once else weight  # (C, D)
        self.bias = bias  # (C,)
        self.step = plan.products
        shape = plan.rows, -(-plan.classes // ALIGNED) * ALIGNED
        self.buffer = weight.new_empty(shape, dtype=dtype)
        if self.buffer.device.type == "cpu" and dtype == torch.bfloat16:
            # Products on AMX read behind the last class of a row, where a NaN would spoil the sum
            # although it is multiplied by zero (seen with torch 2.13 on a Xeon).
            self.buffer.zero_()

    def logits(self, features: Tensor, classes: slice) -> Tensor:
        """Return logits (n, c) in the buffer, of features (n, D) in the dtype of the products."""
        logits = self.buffer[: features.shape[0], : classes.stop - classes.start]
        for part in slices(classes.stop, self.step, classes.start):
            bias = None if self.bias is None else self.bias[part]
            logits_of(features, self.weight[part], bias, _columns(logits, part, classes))
        return logits

    def add_to_features(
        self, total: Tensor, gradient: Tensor, classes: slice, fresh: bool = False
    ) -> None:
        """Add gradient (n, c) @ weight to total (n, D).

        `fresh`: it is overwritten, which one product alone can do.
        """
        for part in slices(classes.stop, self.step, classes.start):
            add_product_(
                total,
                _columns(gradient, part, classes),
                self.weight[part].to(gradient.dtype),
                fresh,
            )

    def add_to_weight(
        self, total: Tensor, gradient: Tensor, features: Tensor, classes: slice, fresh: bool
    ) -> None:
        """Add gradient.T @ features to total (C, D) at the tile's classes; `fresh`: overwrite."""
        for part in slices(classes.stop, self.step, classes.start):
            add_product_(total[part], _columns(gradient, part, classes).T, features, fresh)

    def add_to_bias(self, total: Tensor, gradient: Tensor, classes: slice, fresh: bool) -> None:
        """Add the sum of gradient over its rows to total (C,), in fp32 or total's float64.

        `fresh`: it is overwritten.
        """
        dtype = torch.promote_types(total.dtype, torch.float32)
        # A few rows at a time, for a CPU widens all that it is to sum.
        step = (
            gradient.shape[0]
            if dtype == gradient.dtype or gradient.is_cuda
            else max(1, gradient.shape[0] // 16)
        )
        of_classes = gradient[:step].sum(dim=0, dtype=dtype)
        for part in slices(gradient.shape[0], step, step) if gradient.shape[0] > step else ():
            of_classes += gradient[part].sum(dim=0, dtype=dtype)
        total[classes].copy_(of_classes) if fresh else total[classes].add_(of_classes)


def _columns(tile: Tensor, part: slice, classes: slice) -> Tensor:
    return tile[:, part.start - classes.start : part.stop - classes.start]
