"""The loss on tiles of some rows by some classes, for chunks of rows and for shards of classes."""

from __future__ import annotations

import torch
from torch import Tensor

from fastlt_kernels._impl.chunks import Chunking, slices
from fastlt_kernels._impl.rows import Rows, Terms, implementation, merge_terms
from fastlt_kernels._impl.tile import Tile


class TileWork:
    """Terms and gradients of rows over classes, tile by tile in one buffer.

    Logits that are one tile are made once. Else each tile is made for its terms, and again for its
    gradient.
    """

    def __init__(
        self,
        weight: Tensor,  # (C, D)
        bias: Tensor | None,  # (C,)
        rows: Rows,
        plan: Chunking,
        product: torch.dtype,
        backend: str,
        first: int = 0,  # class of the first row of weight
    ) -> None:
        self.rows, self.plan, self.first = rows, plan, first
        self.backend = implementation(backend)
        self.tile = Tile(weight, bias, product, plan)
        self.tiles = list(slices(weight.shape[0], plan.classes))
        self.held: tuple[slice, slice] | None = None  # whose logits the buffer holds

    def terms(self, features: Tensor, part: slice) -> Terms:
        """Return the terms of the rows `part`, with features (n, D), over all classes."""
        rows = self.rows.part(part)
        return merge_terms(
            [
                self.backend.row_terms(
                    self._logits(features, part, classes), self.first + classes.start, rows
                )
                for classes in self.tiles
            ]
        )

    def gradient(self, features: Tensor, part: slice, classes: slice, log_sum: Tensor) -> Tensor:
        """Return (n, c) d loss / d logits, where the logits were.

        log_sum (L, n) is over all classes.
        """
        logits = self._logits(features, part, classes)
        self.held = None
        first, rows = self.first + classes.start, self.rows.part(part)
        self.backend.row_gradient(logits, first, rows, log_sum, logits)
        return logits

    def terms_and_gradient(self, features: Tensor, part: slice) -> tuple[Terms, Tensor]:
        """Return both in one pass, where all classes are one tile."""
        (classes,) = self.tiles
        logits = self._logits(features, part, classes)
        self.held = None
        return self.backend.row_loss_and_gradient(logits, self.rows.part(part), logits), logits

    def add_to_parameters(
        self,
        weight: Tensor | None,  # (C, D), None where not wanted
        bias: Tensor | None,  # (C,)
        features: Tensor,  # (n, D)
        part: slice,
        classes: slice,
        gradient: Tensor,  # (n, c), of the logits
    ) -> None:
        """Add what the rows `part` give to the gradients; the first rows overwrite them."""
        fresh = part.start == 0
        if weight is not None:
            self.tile.add_to_weight(weight, gradient, features, classes, fresh)
        if bias is not None:
            self.tile.add_to_bias(bias, gradient, classes, fresh)

    def _logits(self, features: Tensor, part: slice, classes: slice) -> Tensor:
        """Return (n, c) in the one buffer."""
        if self.held == (part, classes):
            return self.tile.buffer[: features.shape[0], : classes.stop - classes.start]
        self.held = part, classes
        return self.tile.logits(features, classes)
