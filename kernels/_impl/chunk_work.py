"""The steps of one chunk of rows in the linear loss: logits, their gradient in place, and what that
adds to the gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlt_kernels._impl.chunks import Chunking, slices
from fastlt_kernels._impl.rows import Rows, Terms, implementation, merge_terms
from fastlt_kernels._impl.tile import Tile

Gradients = tuple[Tensor, Tensor, Tensor]  # of features, weight and bias; empty where not wanted


class ChunkWork:
    """What the chunks share. The gradients are complete after `finish`."""

    def __init__(
        self,
        features: Tensor,  # (N, D)
        rows: Rows,
        tile: Tile,
        plan: Chunking,
        backend: str,
        gradients: Gradients,
        wanted: Sequence[bool],
    ) -> None:
        self.features, self.rows, self.tile, self.plan = features, rows, tile, plan
        self.backend = implementation(backend)
        self.gradients, self.wanted = gradients, wanted
        # Over several chunks the gradients of weight and bias are summed wider than they are kept.
        several = features.shape[0] > plan.rows
        self.sums = [_sum_of(g, rows.shares.dtype) if several else g for g in gradients[1:]]

    def chunk(self, part: slice) -> Terms:
        """The terms of some rows, over all classes; their gradients are added."""
        features = self.features[part].to(self.tile.buffer.dtype)
        rows = self.rows.part(part)
        tiles = list(slices(self.tile.weight.shape[0], self.plan.classes))
        if len(tiles) == 1 and any(self.wanted):
            return self._in_one_go(part, features, rows, tiles[0])
        terms = merge_terms(
            [self.backend.row_terms(self.tile.logits(features, t), t.start, rows) for t in tiles]
        )
        if any(self.wanted):
            of_features = self._sum_of_features(features)
            for classes in tiles:
                gradient = self.tile.logits(features, classes)
                self.backend.row_gradient(gradient, classes.start, rows, terms.log_sum, gradient)
                self._add_gradients(part, features, classes, gradient, of_features, False)
            self._keep(part, of_features)
        return terms

    def finish(self) -> None:
        for kept, total in zip(self.gradients[1:], self.sums, strict=True):
            if kept is not total:
                kept.copy_(total)

    def _in_one_go(self, part: slice, features: Tensor, rows: Rows, classes: slice) -> Terms:
        gradient = self.tile.logits(features, classes)
        terms = self.backend.row_loss_and_gradient(gradient, rows, gradient)
        if self.wanted[0] and self.tile.step >= classes.stop:
            self._add_gradients(part, features, classes, gradient, self.gradients[0][part], True)
            return terms
        of_features = self._sum_of_features(features)
        self._add_gradients(part, features, classes, gradient, of_features, False)
        self._keep(part, of_features)
        return terms

    def _sum_of_features(self, features: Tensor) -> Tensor | None:
        """Zeros for the features' gradient, where it is a sum over classes."""
        return (
            features.new_zeros(features.shape, dtype=self.rows.shares.dtype)
            if self.wanted[0]
            else None
        )

    def _keep(self, part: slice, of_features: Tensor | None) -> None:
        if of_features is not None:
            self.gradients[0][part] = of_features

    def _add_gradients(
        self,
        part: slice,
        features: Tensor,  # (n, D), dtype of the products
        classes: slice,
        gradient: Tensor,  # (n, c), of the logits
        of_features: Tensor | None,  # (n, D), gets the features' gradient, if wanted
        overwrite: bool,  # of_features
    ) -> None:
        weights, biases = self.sums
        fresh = part.start == 0
        if of_features is not None:
            self.tile.add_to_features(of_features, gradient, classes, overwrite)
        if self.wanted[1]:
            self.tile.add_to_weight(weights, gradient, features, classes, fresh)
        if self.wanted[2]:
            self.tile.add_to_bias(biases, gradient, classes, fresh)


def _sum_of(kept: Tensor, dtype: torch.dtype) -> Tensor:
    """What is summed in, in dtype: the memory of the result where that is as wide."""
    return kept if kept.dtype == dtype else torch.empty_like(kept, dtype=dtype)
