"""The classifier cut over ranks by class: the classes of a rank, its exchanges and its loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from fastlt_kernels._impl.chunks import Chunking, plan_chunks, slices
from fastlt_kernels._impl.products import kept_dtype
from fastlt_kernels._impl.rows import Rows, Terms, join_terms, merge_terms
from fastlt_kernels._impl.tile_work import TileWork

Group: TypeAlias = "dist.ProcessGroup | None"  # None: all processes


def shard_of(num_classes: int, rank: int, world: int) -> slice:
    """Return the classes of a rank: torch.chunk's and DTensor's cut.

    The last may be shorter or empty.
    """
    size = -(-num_classes // world)
    return slice(min(rank * size, num_classes), min((rank + 1) * size, num_classes))


def length(shard: slice) -> int:
    """Return the number of classes of a shard."""
    return int(shard.stop - shard.start)


def gather(local: Tensor, group: Group) -> Tensor:
    """Return (world, ...): the tensors of all ranks, which are of one shape."""
    world = dist.get_world_size(group)
    whole = local.new_empty(world * local.shape[0], *local.shape[1:])
    # torch 2.13 renames the collectives on one tensor, and warns of the old names.
    collective = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    collective(whole, local.contiguous(), group=group)
    return whole.view(world, *local.shape)


def gather_labels(labels: Tensor, shares: Tensor, group: Group) -> tuple[Tensor, Tensor]:
    """Return labels and shares (L, n) of all ranks, (L, N), in one exchange."""
    count = labels.shape[0]
    packed = gather(torch.cat([labels, shares.double().view(torch.int64)]), group)  # (world, 2L, n)
    packed = packed.transpose(0, 1).reshape(2 * count, -1)
    return packed[:count], packed[count:].view(torch.float64).to(shares.dtype)


def reduce_terms(terms: Terms, group: Group) -> Terms:
    """Return the terms of all ranks' classes, in one exchange of a few numbers a row.

    A log-sum-exp says as much as a maximum and a sum. The best class is an integer in the bits of a
    float.
    """
    dtype = terms.log_sum.dtype
    parts = [terms.log_sum, terms.label_logit]
    if terms.logit_sum is not None:
        parts.append(terms.logit_sum)
    if terms.best_logit is not None and terms.best is not None:
        integer = torch.int64 if dtype == torch.float64 else torch.int32
        parts += [terms.best_logit[None], terms.best[None].to(integer).view(dtype)]
    packed = gather(torch.cat([part.to(dtype) for part in parts]), group)
    return merge_terms([_unpacked(rank, terms) for rank in packed.unbind()])


def _unpacked(packed: Tensor, like: Terms) -> Terms:
    labels = like.log_sum.shape[0]
    best_logit = best = None
    if like.best is not None:
        integer = torch.int64 if packed.dtype == torch.float64 else torch.int32
        best_logit, best = packed[-2], packed[-1].view(integer).long()
    logit_sum = None if like.logit_sum is None else packed[2 * labels : 3 * labels]
    return Terms(packed[:labels], packed[labels : 2 * labels], logit_sum, best_logit, best)


class Scattering:
    """A sum over ranks under way, of which each rank gets its own rows."""

    def __init__(self, partial: Tensor, group: Group) -> None:
        self.partial = partial.contiguous()  # must live until the exchange is over
        self.own = partial.new_empty(
            partial.shape[0] // dist.get_world_size(group), *partial.shape[1:]
        )
        collective = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        self.work = collective(self.own, self.partial, group=group, async_op=True)

    def result(self) -> Tensor:
        """Return this rank's rows, when the exchange is over."""
        if self.work is not None:
            self.work.wait()
        return self.own


class ShardGradients(NamedTuple):
    """The gradients of this rank's rows and classes; None where not wanted."""

    features: Tensor | None  # (n, D), dtype of the sums
    weight: Tensor | None  # (c, D), the dtype that gradients of weight are kept in
    bias: Tensor | None  # (c,)


class ShardWork:
    """All N rows by this rank's classes: their terms, then, with all ranks' terms, gradients."""

    def __init__(
        self,
        features: Tensor,  # (N, D), dtype of the products
        weight: Tensor,  # (c, D)
        bias: Tensor | None,  # (c,)
        rows: Rows,
        first: int,  # class of the first row of weight
        chunk_bytes: int,
        backend: str,
        gradients: bool,
    ) -> None:
        self.features, self.rows = features, rows
        self.classes = weight.shape[0]
        self.kept = [kept_dtype(weight.dtype), kept_dtype((weight if bias is None else bias).dtype)]
        plan = _plan(features, weight, rows, chunk_bytes, backend, gradients)
        self.work = TileWork(weight, bias, rows, plan, features.dtype, backend, first)

    def terms(self) -> Terms:
        """Return the terms of all rows over this rank's classes."""
        if self.classes == 0:
            return _no_terms(self.rows)
        return join_terms(
            [self.work.terms(self.features[part], part) for part in self._row_parts()]
        )

    def gradients(
        self, log_sum: Tensor, wanted: Sequence[bool], scatter: Callable[[Tensor], Scattering]
    ) -> ShardGradients:
        """Return the gradients of this rank's rows and classes.

        log_sum (L, N) is over all ranks' classes; wanted: of features, weight, bias.
        The sum of the features' gradient over ranks goes on while the last tile's part of the
        weight's is made.
        """
        count, width = self.features.shape
        total = self.rows.shares.dtype
        several = count > self.work.plan.rows
        of_weight, of_bias = (
            self.features.new_empty(shape, dtype=total if several else kept) if want else None
            for shape, kept, want in zip(
                ((self.classes, width), (self.classes,)), self.kept, wanted[1:], strict=True
            )
        )
        of_features = self.features.new_zeros(count, width, dtype=total) if wanted[0] else None
        scattering = None
        pieces = (
            [(part, tile) for part in self._row_parts() for tile in self.work.tiles]
            if self.classes
            else []
        )
        for part, classes in pieces:
            features = self.features[part]
            gradient = self.work.gradient(features, part, classes, log_sum[:, part])
            if of_features is not None:
                self.work.tile.add_to_features(of_features[part], gradient, classes)
                scattering = scatter(of_features) if (part, classes) == pieces[-1] else None
            self.work.add_to_parameters(of_weight, of_bias, features, part, classes, gradient)
        if of_features is not None and not pieces:
            scattering = scatter(of_features)
        return ShardGradients(
            None if scattering is None else scattering.result(),
            None if of_weight is None else of_weight.to(self.kept[0]),
            None if of_bias is None else of_bias.to(self.kept[1]),
        )

    def _row_parts(self) -> list[slice]:
        return list(slices(self.features.shape[0], self.work.plan.rows))


def _plan(
    features: Tensor, weight: Tensor, rows: Rows, chunk_bytes: int, backend: str, gradients: bool
) -> Chunking:
    """Return the cut as in one process, but with logits that fit as a whole as one tile.

    They wait for the other ranks' terms.
    """
    count, width = features.shape
    classes = weight.shape[0]
    plan = plan_chunks(
        count,
        width,
        classes,
        slots=rows.labels.shape[0] * rows.max_degree,
        weight_dtype=weight.dtype,
        product=features.dtype,
        total=rows.shares.dtype,
        device=features.device.type,
        in_torch=backend == "torch",
        chunk_bytes=chunk_bytes,
    )
    # The other half is for products and a cast weight, which the plan keeps to a quarter each.
    whole = gradients and count * classes * features.dtype.itemsize <= chunk_bytes // 2
    return plan._replace(rows=count, classes=classes) if whole else plan


def _no_terms(rows: Rows) -> Terms:
    """Return the terms of no classes."""
    none = torch.full_like(rows.shares, -torch.inf)
    return Terms(
        none,
        none,
        None if rows.smoothing is None else torch.zeros_like(none),
        none[0] if rows.num_predicted else None,
        torch.zeros_like(rows.labels[0]) if rows.num_predicted else None,
    )
