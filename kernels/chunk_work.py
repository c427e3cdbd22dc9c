"""The steps of one chunk of rows in the linear loss: logits, their gradient in place, and what that adds to the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastlt_kernels.chunks import Chunking, slices
from fastlt_kernels.products import add_product_, logits_of
from fastlt_kernels.rows import Rows, Terms, implementation, merge_terms

if TYPE_CHECKING:
    from fastlt_kernels.linear_loss import Gradients, Problem


class ChunkWork:
    """Buffers that the chunks share. The gradients are complete after `finish`."""

    def __init__(self, problem: Problem, plan: Chunking, gradients: Gradients, wanted: Sequence[bool]) -> None:
        self.problem, self.plan, self.gradients, self.wanted = problem, plan, gradients, wanted
        self.backend = implementation(problem.backend)
        product = problem.product_dtype
        self.weight = problem.weight.to(product) if plan.cast_weight_once else problem.weight
        self.tile = problem.features.new_empty(plan.rows * plan.classes, dtype=product)
        # Over several chunks the gradients of weight and bias are summed wider than they are kept.
        several = problem.features.shape[0] > plan.rows
        self.sums = [_sum_of(g, problem.rows.shares.dtype) if several else g for g in gradients[1:]]
        self.fresh = not several

    def chunk(self, part: slice) -> Terms:
        """The terms of some rows, over all classes; their gradients are added."""
        features = self.problem.features[part].to(self.problem.product_dtype)
        rows = self.problem.rows.part(part)
        tiles = list(slices(self.problem.weight.shape[0], self.plan.classes))
        if len(tiles) == 1:
            return self._in_one_go(part, features, rows, tiles[0])
        terms = merge_terms([self.backend.row_terms(self._logits(features, t), t.start, rows) for t in tiles])
        if any(self.wanted):
            of_features = self._sum_of_features(features)
            for tile in tiles:
                logits = self._logits(features, tile)
                self.backend.row_gradient(logits, tile.start, rows, terms.log_sum, logits)
                self._add_gradients(features, tile, logits, of_features, False)
            self._keep(part, of_features)
        return terms

    def _in_one_go(self, part: slice, features: Tensor, rows: Rows, classes: slice) -> Terms:
        logits = self._logits(features, classes)
        if not any(self.wanted):
            return self.backend.row_terms(logits, 0, rows)
        terms = self.backend.row_loss_and_gradient(logits, rows, logits)
        direct = self.plan.products >= classes.stop and self.wanted[0]
        of_features = self.gradients[0][part] if direct else self._sum_of_features(features)
        self._add_gradients(features, classes, logits, of_features, direct)
        if not direct:
            self._keep(part, of_features)
        return terms

    def _sum_of_features(self, features: Tensor) -> Tensor | None:
        """Zeros for the features' gradient, where it is a sum over classes."""
        return features.new_zeros(features.shape, dtype=self.problem.rows.shares.dtype) if self.wanted[0] else None

    def _keep(self, part: slice, of_features: Tensor | None) -> None:
        if of_features is not None:
            self.gradients[0][part] = of_features

    def finish(self) -> None:
        for kept, total in zip(self.gradients[1:], self.sums, strict=True):
            if kept is not total:
                kept.copy_(total)

    def _logits(self, features: Tensor, classes: slice) -> Tensor:
        """(n, c) in the shared buffer."""
        shape = features.shape[0], classes.stop - classes.start
        logits = self.tile[: shape[0] * shape[1]].view(shape)
        for part in slices(classes.stop, self.plan.products, classes.start):
            columns = logits[:, part.start - classes.start : part.stop - classes.start]
            bias = None if self.problem.bias is None else self.problem.bias[part]
            logits_of(features, self.weight[part], bias, columns)
        return logits

    def _add_gradients(
        self,
        features: Tensor,  # (n, D), dtype of the products
        classes: slice,
        logits: Tensor,  # (n, c), now the gradient of the logits
        of_features: Tensor | None,  # (n, D), gets the features' gradient, if wanted
        fresh: bool,  # which overwrites it
    ) -> None:
        weights, biases = self.sums
        if self.wanted[2]:
            total = logits.sum(dim=0, dtype=self.problem.rows.shares.dtype)
            biases[classes].copy_(total) if self.fresh else biases[classes].add_(total)
        for part in slices(classes.stop, self.plan.products, classes.start):
            columns = logits[:, part.start - classes.start : part.stop - classes.start]
            if of_features is not None:
                add_product_(of_features, columns, self.weight[part].to(features.dtype), fresh)
            if self.wanted[1]:
                add_product_(weights[part], columns.T, features, self.fresh)


def _sum_of(kept: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros to add to, in dtype: the memory of the result where that is as wide."""
    return kept.zero_() if kept.dtype == dtype else torch.zeros_like(kept, dtype=dtype)
