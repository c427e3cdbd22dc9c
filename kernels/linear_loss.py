"""The neighbour silencing loss of features and classifier weight, with all gradients.

N x C logits are never held.

Rows go through in chunks. A chunk's logits become their own gradient in place, and the products
with weight and features follow at once, so for reduction "mean" and "sum" the forward leaves the
gradients of the summed loss and the backward only scales them. For "none" the scale of each row is
known in the backward alone, which goes over the chunks again.

Where the classes are so many that a chunk would have too few rows, the classes are cut as well: the
logits of each tile are made twice, once for the log-sum-exp of its rows and once, when that is
known over all tiles, for their gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlt_kernels._impl.backends import choose_backend, is_transformed
from fastlt_kernels._impl.checks import (
    check_chunk_bytes,
    check_linear,
    check_loss,
    check_matrix,
    check_predicted,
)
from fastlt_kernels._impl.chunk_work import ChunkWork, Gradients
from fastlt_kernels._impl.chunks import plan_chunks, slices
from fastlt_kernels._impl.labels import accumulation_dtype, divided, stack_labels
from fastlt_kernels._impl.products import is_autocast, kept_dtype, product_dtype
from fastlt_kernels._impl.rows import Rows, Terms, describe_rows, join_terms, losses_of
from fastlt_kernels._impl.saved import refuse_twice, save_mixed, saved_mixed, scaled
from fastlt_kernels._impl.tile_work import TileWork
from fastlt_kernels.graph import ClassGraph
from fastlt_kernels.logits_loss import ROWS_SCHEMA, LossOutput


def linear_neighbor_silencing_loss(
    features: Tensor,  # (N, D) fp32, fp16, bf16 or fp64
    weight: Tensor,  # (C, D), dtype of features, or any but fp64 under autocast
    target: Tensor,  # (N,) integer class ids; -100 is ignored
    *,
    bias: Tensor | None = None,  # (C,), as weight
    graph: ClassGraph | None = None,
    log_prior: Tensor | None = None,  # (C,) float
    silence: float = 0.1,
    target_b: Tensor | None = None,  # (N,) integer class ids
    mix: float | Tensor | None = None,  # scalar or (N,)
    row_weight: Tensor | None = None,  # (N,) float
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    backend: str = "auto",
    chunk_bytes: int = 512 * 2**20,
) -> Tensor:
    """Return `neighbor_silencing_loss(features @ weight.T + bias, ...)` in bounded memory.

    Temporaries stay within chunk_bytes (but one row by 1,024 classes is always taken), whatever N
    and C are, beside a few vectors of N and of C. The gradients come on top, those of weight and
    bias summed in float32 (float64 for float64) and returned in the parameter's dtype. Under
    autocast the products are made in its dtype (float32 for float16 on a CPU). Other arguments, the
    result and the errors are as there. Differentiable once, in features, weight and bias.
    """
    return linear_neighbor_silencing_outputs(
        features,
        weight,
        target,
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
    ).loss


def linear_neighbor_silencing_outputs(
    features: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
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
) -> LossOutput:
    """Return the loss with the log-sum-exp and the predictions among the targets.

    All are of the same pass.
    """
    check_matrix("features", features, "(N, D)")
    autocast = is_autocast(features)
    check_linear(features, weight, bias, autocast)
    check_chunk_bytes(chunk_bytes)
    count, classes = features.shape[0], weight.shape[0]
    check_loss(
        count,
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
    check_predicted(num_targets, classes)
    if is_transformed():
        raise RuntimeError(
            "linear_neighbor_silencing_loss does not run under torch.func or forward-mode "
            "differentiation: "
            "use neighbor_silencing_loss(features @ weight.T, ..., backend='torch')"
        )
    backend = choose_backend(backend, features, count)
    product = product_dtype(features, autocast)
    labels, shares = stack_labels(
        target, target_b, mix, row_weight, accumulation_dtype(features.dtype)
    )
    counted, divisor = divided(shares, reduction, product)
    rows = describe_rows(
        labels, counted, log_prior, graph, classes, silence, label_smoothing, num_targets
    )
    wanted = [
        torch.is_grad_enabled() and t is not None and t.requires_grad
        for t in (features, weight, bias)
    ]
    loss, log_sum, best, *_ = torch.ops.fastlt_kernels.linear_loss(
        features, weight, bias, *rows, product, chunk_bytes, backend, reduction != "none", wanted
    )
    return LossOutput(loss if divisor is None else loss / divisor, log_sum, best)


class Problem(NamedTuple):
    """The arguments that the two operators share, in the order of their schema.

    Those of Rows are one.
    """

    features: Tensor  # (N, D)
    weight: Tensor  # (C, D)
    bias: Tensor | None  # (C,)
    rows: Rows
    product_dtype: torch.dtype
    chunk_bytes: int
    backend: str

    @staticmethod
    def of(features: Tensor, weight: Tensor, bias: Tensor | None, *args: Any) -> Problem:
        """Return the problem of an operator's arguments."""
        return Problem(
            features, weight, bias, Rows(*args[: len(Rows._fields)]), *args[len(Rows._fields) :]
        )

    def flat(self) -> tuple[Any, ...]:
        """Return the arguments of an operator."""
        return (*self[:3], *self.rows, *self[4:])


_SHARED_SCHEMA = (
    f"Tensor features, Tensor weight, Tensor? bias, {ROWS_SCHEMA}, ScalarType "
    "product_dtype, SymInt chunk_bytes, str backend"
)


@torch.library.custom_op(
    "fastlt_kernels::linear_loss",
    mutates_args=(),
    schema=f"({_SHARED_SCHEMA}, bool summed, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, "
    "Tensor, Tensor)",
)
def _linear_loss(*args: Any) -> tuple[Tensor, ...]:
    """Return loss, log-sum-exp and prediction (N,), and gradients in features, weight, bias.

    The loss is () if summed, else (N,), without gradients.
    """
    *shared, summed, wanted = args
    problem = Problem.of(*shared)
    losses, terms, gradients = _run(problem, wanted if summed else (False, False, False))
    best = torch.zeros_like(problem.rows.labels[0]) if terms.best is None else terms.best.clone()
    return losses.sum() if summed else losses, terms.log_sum[0].clone(), best, *gradients


@torch.library.custom_op(
    "fastlt_kernels::linear_loss_gradients",
    mutates_args=(),
    schema=f"({_SHARED_SCHEMA}, bool[] wanted) -> (Tensor, Tensor, Tensor)",
)
def _linear_loss_gradients(*args: Any) -> Gradients:
    """Return the gradients of sum(shares * loss), shares being what each row's loss counts."""
    *shared, wanted = args
    return _run(Problem.of(*shared), wanted)[2]


@_linear_loss.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    *shared, summed, wanted = args
    problem = Problem.of(*shared)
    shares = problem.rows.shares
    count = shares.shape[1]
    return (
        shares.new_empty(() if summed else (count,)),
        shares.new_empty(count),
        shares.new_empty(count, dtype=torch.int64),
        *_empty_gradients(problem, wanted if summed else (False, False, False)),
    )


@_linear_loss_gradients.register_fake
def _(*args: Any) -> Gradients:
    *shared, wanted = args
    return _empty_gradients(Problem.of(*shared), wanted)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *shared, ctx.summed, ctx.wanted = inputs
    problem = Problem.of(*shared)
    ctx.dtypes = [None if t is None else t.dtype for t in problem[:3]]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    if ctx.summed:
        ctx.save_for_backward(*output[3:])
        return
    save_mixed(ctx, problem.flat())


def _backward(ctx: Any, grad_loss: Tensor | None, *_unused: Any) -> tuple[Tensor | None, ...]:
    refuse_twice("linear_neighbor_silencing_loss")
    nothing = (None,) * (len(Rows._fields) + 5)
    if grad_loss is None:
        return None, None, None, *nothing
    if ctx.summed:
        pairs = zip(ctx.saved_tensors, ctx.dtypes, ctx.wanted, strict=True)
        return *(
            scaled(g, grad_loss, dtype) if wanted else None for g, dtype, wanted in pairs
        ), *nothing
    problem = Problem.of(*saved_mixed(ctx))
    problem = problem._replace(rows=problem.rows._replace(shares=problem.rows.shares * grad_loss))
    gradients = torch.ops.fastlt_kernels.linear_loss_gradients(*problem.flat(), ctx.wanted)
    returned = [
        g.to(dtype) if wanted else None
        for g, dtype, wanted in zip(gradients, ctx.dtypes, ctx.wanted, strict=True)
    ]
    return *returned, *nothing


_linear_loss.register_autograd(_backward, setup_context=_setup_context)


def _empty_gradients(problem: Problem, wanted: Sequence[bool]) -> Gradients:
    """Return uninitialised gradients, of zero length where not wanted."""
    features, weight, bias = problem[:3]
    return (
        features.new_empty(
            features.shape if wanted[0] else (0,), dtype=kept_dtype(problem.product_dtype)
        ),
        weight.new_empty(weight.shape if wanted[1] else (0,), dtype=kept_dtype(weight.dtype)),
        weight.new_empty(
            weight.shape[:1] if wanted[2] else (0,),
            dtype=kept_dtype((weight if bias is None else bias).dtype),
        ),
    )


def _run(problem: Problem, wanted: Sequence[bool]) -> tuple[Tensor, Terms, Gradients]:
    """Return losses (N,), terms, and the wanted gradients of their sum, chunk by chunk."""
    features, weight, bias, rows, product, chunk_bytes, backend = problem
    plan = plan_chunks(
        features.shape[0],
        features.shape[1],
        weight.shape[0],
        slots=rows.labels.shape[0] * rows.max_degree,
        weight_dtype=weight.dtype,
        product=product,
        total=rows.shares.dtype,
        device=features.device.type,
        in_torch=backend == "torch",
        chunk_bytes=chunk_bytes,
        weight_grad=wanted[1],
    )
    gradients = _empty_gradients(problem, wanted)
    # The dtypes of the products are chosen already; autocast must not choose again.
    with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
        tiles = TileWork(weight, bias, rows, plan, product, backend)
        work = ChunkWork(features, tiles, gradients, wanted)
        terms = join_terms([work.chunk(part) for part in slices(features.shape[0], plan.rows)])
        work.finish()
    return losses_of(terms, rows), terms, gradients
