"""The linear loss with the classifier sharded over ranks by class.

Neither its weight nor its logits are ever whole.

Every rank sees the features and labels of all ranks, and makes the terms of its own classes. One
exchange of a few numbers a row makes them those of all classes; which classes a label silences is
known by their ids, and is never sent. Each rank then has the gradient of its weight, and its part
of the features' gradient, which is summed while that of the weight is made.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastlt_kernels._impl.backends import choose_backend, is_transformed
from fastlt_kernels._impl.checks import (
    check_chunk_bytes,
    check_linear,
    check_loss,
    check_matrix,
    check_predicted,
)
from fastlt_kernels._impl.class_parallel_checks import (
    check_alike,
    check_classes,
    check_sampling,
    check_shard,
    place_in,
)
from fastlt_kernels._impl.class_sampling import Sample, draw, rows_in_sample, sampled_classes
from fastlt_kernels._impl.labels import accumulation_dtype, divided, stack_labels
from fastlt_kernels._impl.products import is_autocast, product_dtype
from fastlt_kernels._impl.rows import Rows, Terms, describe_rows, losses_of
from fastlt_kernels._impl.saved import refuse_twice, scaled
from fastlt_kernels._impl.shards import (
    Group,
    Scattering,
    ShardGradients,
    ShardWork,
    gather,
    gather_labels,
    length,
    reduce_terms,
    shard_of,
)
from fastlt_kernels.graph import ClassGraph
from fastlt_kernels.logits_loss import LossOutput


def class_parallel_loss(
    features: Tensor,  # (n, D) fp32, fp16, bf16 or fp64, this rank's rows: as many on every rank
    weight: Tensor,  # (c, D), this rank's classes: shard_of(num_classes, rank, world)
    target: Tensor,  # (n,) integer class ids of all C classes; -100 is ignored
    *,
    num_classes: int,
    bias: Tensor | None = None,  # (c,), as weight
    graph: ClassGraph | None = None,  # over all C classes
    log_prior: Tensor | None = None,  # (C,) float
    silence: float = 0.1,
    target_b: Tensor | None = None,  # (n,) integer class ids
    mix: float | Tensor | None = None,  # scalar or (n,)
    row_weight: Tensor | None = None,  # (n,) float
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    backend: str = "auto",
    chunk_bytes: int = 512 * 2**20,
    sample_rate: float = 1.0,
    generator: torch.Generator | None = None,  # on the device of features
    group: Group = None,
) -> Tensor:
    """Return `linear_neighbor_silencing_loss` over the rows and classes of all ranks of `group`.

    They call it together.

    "mean" and "sum" are over the rows of all ranks, and the same number on each; "none" gives this
    rank's own rows, (n,).

    Gradients are those under DistributedDataParallel, which takes what the ranks call backward on
    to be parts of a mean: the objective is the mean over ranks of that. For "mean" it is the loss
    itself (each rank scaling it alike); with "none", loss.mean().backward() comes to the same.
    weight and bias get the gradient of the objective, and must not be averaged again: keep them
    outside of the DDP wrapper. features get it times the number of ranks, by which DDP then
    divides.

    sample_rate < 1 takes of each shard's auxiliaries that share only, drawn anew with `generator`
    in every call; always in are the targets, the labels of all ranks and their neighbours, at room
    for max(1, max_degree) of them per label. What was drawn counts for what was not, so that the
    sum of exponentials is right on average (Partial FC, arXiv 2203.15565, leaves that out, and its
    sum is too small). Smoothing's mass is spread over the drawn classes. Others' weights get zeros.

    Temporaries stay within chunk_bytes as there, beside features (N, D) and their gradient, N being
    all ranks' rows. torch.compile runs this outside of its graphs. Differentiable once. Raises
    ValueError as there, on all ranks where values are checked.
    """
    return class_parallel_outputs(
        features,
        weight,
        target,
        num_classes=num_classes,
        num_targets=0,
        bias=bias,
        graph=graph,
        log_prior=log_prior,
        silence=silence,
        target_b=target_b,
        mix=mix,
        row_weight=row_weight,
        label_smoothing=label_smoothing,
        reduction=reduction,
        backend=backend,
        chunk_bytes=chunk_bytes,
        sample_rate=sample_rate,
        generator=generator,
        group=group,
    ).loss


def class_parallel_outputs(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    num_classes: int,
    num_targets: int,
    bias: Tensor | None = None,
    graph: ClassGraph | None = None,
    log_prior: Tensor | None = None,
    silence: float = 0.1,
    target_b: Tensor | None = None,
    mix: float | Tensor | None = None,
    row_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    backend: str = "auto",
    chunk_bytes: int = 512 * 2**20,
    sample_rate: float = 1.0,
    generator: torch.Generator | None = None,
    group: Group = None,
) -> LossOutput:
    """Return the loss with the log-sum-exp and the predictions of this rank's rows.

    Predictions are among the classes 0..num_targets - 1.
    """
    # Not as a decorator: that takes the import of this module as long as that of torch.
    outputs = torch.compiler.disable(_outputs) if torch.compiler.is_compiling() else _outputs
    return outputs(
        features,
        weight,
        bias,
        target,
        num_classes,
        num_targets,
        graph,
        log_prior,
        silence,
        target_b,
        mix,
        row_weight,
        label_smoothing,
        reduction,
        backend,
        chunk_bytes,
        sample_rate,
        generator,
        group,
    )


def _outputs(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    classes: int,
    num_predicted: int,
    graph: ClassGraph | None,
    log_prior: Tensor | None,
    silence: float,
    target_b: Tensor | None,
    mix: float | Tensor | None,
    row_weight: Tensor | None,
    label_smoothing: float,
    reduction: str,
    backend: str,
    chunk_bytes: int,
    sample_rate: float,
    generator: torch.Generator | None,
    group: Group,
) -> LossOutput:
    rank, world = place_in(group)
    if is_transformed():
        raise RuntimeError(
            "class_parallel_loss does not run under torch.func or forward-mode differentiation"
        )
    wanted = tuple(
        torch.is_grad_enabled() and isinstance(t, Tensor) and t.requires_grad
        for t in (features, weight, bias)
    )
    try:
        check_classes(classes)
        shard = shard_of(classes, rank, world)
        check_matrix("features", features, "(n, D)")
        autocast = is_autocast(features)
        check_linear(features, weight, bias, autocast)
        check_chunk_bytes(chunk_bytes)
        check_loss(
            features.shape[0],
            classes,
            features.device,
            target,
            graph,
            log_prior,
            silence,
            target_b,
            mix,
            row_weight,
            label_smoothing,
            reduction,
            backend,
        )
        check_predicted(num_predicted, classes)
        check_shard(weight, classes, shard, rank, world)
        check_sampling(sample_rate, generator, graph, num_predicted)
        backend = choose_backend(backend, features, features.shape[0])
    except ValueError as error:
        if isinstance(features, Tensor):
            check_alike(features, target_b, wanted[0], reduction, error, group)
        raise
    check_alike(features, target_b, wanted[0], reduction, None, group)

    labels, shares = stack_labels(
        target, target_b, mix, row_weight, accumulation_dtype(features.dtype)
    )
    labels, shares = gather_labels(labels, shares, group)
    product = product_dtype(features, autocast)
    counted, divisor = divided(shares, reduction, product)
    sampled = graph if sample_rate < 1 else None
    seen = (
        classes
        if sampled is None
        else sampled_classes(classes, world, sampled, sample_rate, labels.numel())
    )
    rows = describe_rows(
        labels, counted, log_prior, graph, seen, silence, label_smoothing, num_predicted
    )
    first, sample = shard.start, None
    if sampled is not None:
        first, sample = 0, draw(labels, sampled, shard, sample_rate, generator, shares.dtype)
        rows = rows_in_sample(rows, sample, sampled, shard)
    job = Job(
        rows,
        first,
        sample,
        shard,
        num_predicted > 0,
        product,
        chunk_bytes,
        backend,
        reduction != "none",
        wanted,
        group,
    )
    loss, log_sum, best = _ClassParallelLoss.apply(features, weight, bias, job)
    return LossOutput(loss if divisor is None else loss / divisor, log_sum, best)


class Job(NamedTuple):
    """The values that the loss depends on beside the tensors that get gradients."""

    rows: Rows  # of all ranks
    first: int  # class of the first column, as the rows count them
    sample: Sample | None
    shard: slice
    predicts: bool
    product_dtype: torch.dtype
    chunk_bytes: int
    backend: str
    summed: bool
    wanted: tuple[bool, ...]  # gradients of features, weight, bias
    group: Group

    def work(
        self, features: Tensor, weight: Tensor, bias: Tensor | None, gradients: bool
    ) -> ShardWork:
        """Return the work on features (N, D) of all ranks."""
        if self.sample is not None:
            weight = weight[self.sample.classes]
            bias = None if bias is None else bias[self.sample.classes]
        return ShardWork(
            features, weight, bias, self.rows, self.first, self.chunk_bytes, self.backend, gradients
        )

    def all_terms(self, work: ShardWork) -> Terms:
        """Return the terms over the classes of all ranks."""
        terms = work.terms()
        if self.sample is not None:
            if terms.logit_sum is not None:
                # What a class stands for belongs to the log-sum-exp alone; no corrected class is
                # ever silenced.
                terms = terms._replace(logit_sum=terms.logit_sum - self.sample.correction.sum())
            if terms.best is not None:
                terms = terms._replace(best=terms.best + self.shard.start)
            elif self.predicts:  # elsewhere: all ranks exchange the same
                none = terms.log_sum.new_full(terms.log_sum.shape[1:], -torch.inf)
                terms = terms._replace(best_logit=none, best=torch.zeros_like(self.rows.labels[0]))
        return reduce_terms(terms, self.group)

    def gradients(self, work: ShardWork, log_sum: Tensor) -> ShardGradients:
        """Return the gradients of this rank's rows and classes."""
        return work.gradients(log_sum, self.wanted, lambda partial: Scattering(partial, self.group))

    def spread(self, gradient: Tensor | None) -> Tensor | None:
        """Return a gradient over the drawn classes as one over all of the shard's."""
        if gradient is None or self.sample is None:
            return gradient
        return gradient.new_zeros(length(self.shard), *gradient.shape[1:]).index_copy_(
            0, self.sample.classes, gradient
        )


class _ClassParallelLoss(torch.autograd.Function):
    """The loss as one function of autograd.

    Gradients are made in the forward for a sum; for single rows in the backward, where what each
    counts is known.
    """

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None, job: Job
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.job, ctx.dtypes = (
            job,
            [None if t is None else t.dtype for t in (features, weight, bias)],
        )
        with torch.autocast(features.device.type, enabled=False):
            everyones = gather(features.to(job.product_dtype), job.group).flatten(0, 1)
            work = job.work(everyones, weight, bias, any(job.wanted))
            terms = job.all_terms(work)
            losses = losses_of(terms, job.rows)
            if job.summed:
                ctx.save_for_backward(
                    *(job.gradients(work, terms.log_sum) if any(job.wanted) else ())
                )
            else:
                ctx.save_for_backward(everyones, weight, bias, terms.log_sum)
        own = _own(features.shape[0], job.group)
        best = torch.zeros_like(job.rows.labels[0]) if terms.best is None else terms.best
        outputs = (
            losses.sum() if job.summed else losses[own].clone(),
            terms.log_sum[0, own].clone(),
            best[own].clone(),
        )
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_unused: Any) -> tuple[Tensor | None, ...]:
        refuse_twice("class_parallel_loss")
        if grad_loss is None:
            return None, None, None, None
        job, world = ctx.job, dist.get_world_size(ctx.job.group)
        if job.summed:
            scale, saved = grad_loss, ctx.saved_tensors
        else:
            scale, saved = (
                torch.ones_like(grad_loss[:1].sum()),
                _row_gradients(ctx, grad_loss, world),
            )
        features, weight, bias = (
            None if gradient is None else scaled(gradient, factor, dtype)
            for gradient, factor, dtype in zip(
                saved, (scale * world, scale, scale), ctx.dtypes, strict=True
            )
        )
        return features, job.spread(weight), job.spread(bias), None


def _row_gradients(ctx: Any, grad_loss: Tensor, world: int) -> ShardGradients:
    """Return the gradients of the mean over ranks of the sum of grad_loss (n,) * loss."""
    everyones, weight, bias, log_sum = ctx.saved_tensors
    job = ctx.job
    factors = gather(grad_loss, job.group).flatten() / world
    job = job._replace(rows=job.rows._replace(shares=job.rows.shares * factors))
    with torch.autocast(everyones.device.type, enabled=False):
        return job.gradients(job.work(everyones, weight, bias, True), log_sum)


def _own(count: int, group: Group) -> slice:
    """Return this rank's rows among those of all."""
    rank = dist.get_rank(group)
    return slice(rank * count, (rank + 1) * count)
