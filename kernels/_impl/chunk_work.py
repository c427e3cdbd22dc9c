"""The steps of one chunk of rows in the linear loss: its terms, and its part of the gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastlt_kernels._impl.rows import Terms
from fastlt_kernels._impl.tile_work import TileWork

Gradients = tuple[Tensor, Tensor, Tensor]  # of features, weight and bias; empty where not wanted


class ChunkWork:
    """The gradients that the chunks add to; they are complete after `finish`."""

    def __init__(
        self,
        features: Tensor,  # (N, D)
        work: TileWork,
        gradients: Gradients,
        wanted: Sequence[bool],
    ) -> None:
        self.features, self.work = features, work
        self.gradients, self.wanted = gradients, wanted
        self.total = work.rows.shares.dtype
        # Over several chunks the gradients of weight and bias are summed wider than they are kept.
        several = features.shape[0] > work.plan.rows
        self.sums = [
            (_sum_of(kept, self.total) if several else kept) if want else None
            for kept, want in zip(gradients[1:], wanted[1:], strict=True)
        ]

    def chunk(self, part: slice) -> Terms:
        """Return the terms of some rows, over all classes; their gradients are added."""
        features = self.features[part].to(self.work.tile.buffer.dtype)
        if len(self.work.tiles) == 1 and any(self.wanted):
            return self._in_one_go(part, features)
        terms = self.work.terms(features, part)
        if any(self.wanted):
            of_features = self._sum_of_features(features)
            for classes in self.work.tiles:
                gradient = self.work.gradient(features, part, classes, terms.log_sum)
                self._add_gradients(part, features, classes, gradient, of_features, False)
            self._keep(part, of_features)
        return terms

    def finish(self) -> None:
        """Round the sums to the dtype that the gradients are kept in."""
        for kept, total in zip(self.gradients[1:], self.sums, strict=True):
            if total is not None and kept is not total:
                kept.copy_(total)

    def _in_one_go(self, part: slice, features: Tensor) -> Terms:
        (classes,) = self.work.tiles
        terms, gradient = self.work.terms_and_gradient(features, part)
        if self.wanted[0] and self.work.tile.step >= classes.stop:
            self._add_gradients(part, features, classes, gradient, self.gradients[0][part], True)
            return terms
        of_features = self._sum_of_features(features)
        self._add_gradients(part, features, classes, gradient, of_features, False)
        self._keep(part, of_features)
        return terms

    def _sum_of_features(self, features: Tensor) -> Tensor | None:
        """Return zeros for the features' gradient, where it is a sum over classes."""
        return features.new_zeros(features.shape, dtype=self.total) if self.wanted[0] else None

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
        if of_features is not None:
            self.work.tile.add_to_features(of_features, gradient, classes, overwrite)
        weight, bias = self.sums
        self.work.add_to_parameters(weight, bias, features, part, classes, gradient)


def _sum_of(kept: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what is summed in, in dtype: the memory of the result where that is as wide."""
    return kept if kept.dtype == dtype else torch.empty_like(kept, dtype=dtype)
