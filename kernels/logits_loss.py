"""The neighbour silencing loss of logits that exist already."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlt_kernels._impl.backends import choose_backend, is_transformed
from fastlt_kernels._impl.checks import check_loss, check_matrix, check_predicted
from fastlt_kernels._impl.labels import accumulation_dtype, counted_rows, stack_labels
from fastlt_kernels._impl.rows import Rows, Terms, describe_rows, implementation, losses_of
from fastlt_kernels._impl.saved import refuse_twice, save_mixed, saved_mixed, scaled
from fastlt_kernels._impl.torch_logits import torch_losses
from fastlt_kernels.graph import ClassGraph

# Measured on AVX-512, for the torch rows on a CPU: of fewer logits plain torch's few calls cost
# less.
FUSE_FROM_LOGITS = 200_000


class LossOutput(NamedTuple):
    """The loss, and the other results of the same pass, which have no gradient."""

    loss: Tensor  # fp32 or fp64: () or (N,)
    log_sum_exp: Tensor  # (N,), over the logits with prior and silencing of `target`
    prediction: Tensor  # (N,) int64, the best target class by logit alone, as at inference


def neighbor_silencing_loss(
    logits: Tensor,  # (N, C) fp32, fp16, bf16 or fp64
    target: Tensor,  # (N,) integer class ids; -100 is ignored
    *,
    graph: ClassGraph | None = None,
    log_prior: Tensor | None = None,  # (C,) float
    silence: float = 0.1,
    target_b: Tensor | None = None,  # (N,) integer class ids
    mix: float | Tensor | None = None,  # scalar or (N,)
    row_weight: Tensor | None = None,  # (N,) float
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Return cross entropy with a prior, in which each label's neighbours weigh `silence`.

    Neighbours are those in `graph` (arXiv 2410.15980).

        a_ij = z_ij + log_prior_j + [j in S(y_i)] * log(silence)
        L_i = logsumexp_j(a_ij) - a_i,y_i

    log_prior is a constant (tau already in it); -inf drops a class that never occurs. silence = 1
    is Balanced Softmax, 0 drops the silenced terms; no graph, no silencing. Two labels: mix *
    L(target) + (1 - mix) * L(target_b), each with its own silenced set. label_smoothing spreads its
    mass over the unsilenced classes only. Rows labelled -100 have no loss, and "mean" is over the
    others (0 if there are none). row_weight multiplies the loss of each row, mixed or not, and
    "mean" is then sum(w_i * L_i) / sum(w_i), 0 where all weights are; it is a constant, which gets
    no gradient.

    backend "triton" makes loss and gradient in one pass, on a GPU; "torch" is plain torch, on
    anything, and differentiable as often as wanted; "auto" takes Triton on a GPU, and on a CPU
    blocks of rows that stay in cache where there are many logits. Returns the loss in float32
    (float64 for float64 logits): a scalar for reduction "mean" and "sum", (N,) for "none".
    Arithmetic inside is float32 or float64; differentiable in logits, once but by "torch". Logits
    are never overwritten. Raises ValueError naming the argument.
    """
    return neighbor_silencing_outputs(
        logits,
        target,
        num_targets=0,
        graph=graph,
        log_prior=log_prior,
        silence=silence,
        target_b=target_b,
        mix=mix,
        row_weight=row_weight,
        label_smoothing=label_smoothing,
        reduction=reduction,
        backend=backend,
    ).loss


def neighbor_silencing_outputs(
    logits: Tensor,
    target: Tensor,
    *,
    num_targets: int,
    graph: ClassGraph | None = None,
    log_prior: Tensor | None = None,
    silence: float = 0.1,
    target_b: Tensor | None = None,
    mix: float | Tensor | None = None,
    row_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    backend: str = "auto",
) -> LossOutput:
    """Return the loss with the log-sum-exp and the predictions of the same pass.

    Predictions are among the classes 0..num_targets - 1.
    """
    check_matrix("logits", logits, "(N, C)")
    count, classes = logits.shape
    check_loss(
        count,
        classes,
        logits.device,
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
    labels, shares = stack_labels(
        target, target_b, mix, row_weight, accumulation_dtype(logits.dtype)
    )
    rows = describe_rows(
        labels, shares, log_prior, graph, classes, silence, label_smoothing, num_targets
    )
    chosen = choose_backend(backend, logits, count)
    if is_transformed() and backend == "triton":
        raise RuntimeError(
            "backend 'triton' does not run under torch.func or forward-mode differentiation: use "
            "backend='torch'"
        )
    blocks_pay = logits.is_cpu and count * classes >= FUSE_FROM_LOGITS
    if backend == "torch" or is_transformed() or (chosen == "torch" and not blocks_pay):
        losses, log_sum, best = torch_losses(logits, rows)
        return LossOutput(_reduced(losses, shares, reduction), log_sum, best)
    # One pass can make the gradient too where its scale is known by then. For rows that will count
    # each on its own it is not; nor in half precision, where gradients divided by the rows would
    # vanish before the loss scale lifts them.
    summed = reduction != "none" and logits.dtype != torch.float16
    if summed and reduction == "mean":
        rows = rows._replace(shares=shares / counted_rows(shares))
    wanted = torch.is_grad_enabled() and logits.requires_grad
    loss, log_sum, best, _ = torch.ops.fastlt_kernels.logits_loss(
        logits, *rows, chosen, summed, wanted
    )
    return LossOutput(loss if summed else _reduced(loss, shares, reduction), log_sum[0], best)


def _reduced(losses: Tensor, shares: Tensor, reduction: str) -> Tensor:
    """Return losses (N,) as the reduction has them."""
    if reduction == "none":
        return losses
    return losses.sum() if reduction == "sum" else losses.sum() / counted_rows(shares)


ROWS_SCHEMA = (
    "Tensor labels, Tensor shares, Tensor? log_prior, Tensor? smoothing, Tensor? graph_rows, "
    "Tensor? indptr, Tensor? indices, "
    "SymInt max_degree, float silence, float label_smoothing, Tensor? blocks, SymInt split, "
    "SymInt num_predicted"
)


@torch.library.custom_op(
    "fastlt_kernels::logits_loss",
    mutates_args=(),
    schema=f"(Tensor logits, {ROWS_SCHEMA}, str backend, bool summed, bool wanted) -> (Tensor, "
    "Tensor, Tensor, Tensor)",
)
def _logits_loss(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return loss, log-sum-exp (L, N), prediction (N,) and gradient (N, C) of the loss.

    The loss is () if summed, else (N,), without a gradient.
    """
    *described, backend, summed, wanted = args
    rows = Rows(*described)
    gradient = _empty_gradient(logits, summed and wanted)
    terms = _terms(_packed(logits), rows, backend, gradient if summed and wanted else None)
    losses = losses_of(terms, rows)
    best = torch.zeros_like(rows.labels[0]) if terms.best is None else terms.best
    return losses.sum() if summed else losses, terms.log_sum, best, gradient


@torch.library.custom_op(
    "fastlt_kernels::logits_loss_gradient",
    mutates_args=(),
    schema=f"(Tensor logits, {ROWS_SCHEMA}, str backend, Tensor log_sum) -> Tensor",
)
def _logits_loss_gradient(logits: Tensor, *args: Any) -> Tensor:
    """Return the gradient (N, C) of the sum of shares * loss."""
    *described, backend, log_sum = args
    gradient = _empty_gradient(logits, True)
    implementation(backend).row_gradient(_packed(logits), 0, Rows(*described), log_sum, gradient)
    return gradient


@_logits_loss.register_fake
def _(logits: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *described, _backend, summed, wanted = args
    shares = Rows(*described).shares
    return (
        shares.new_empty(() if summed else shares.shape[1:]),
        torch.empty_like(shares),
        shares.new_empty(shares.shape[1:], dtype=torch.int64),
        _empty_gradient(logits, summed and wanted),
    )


@_logits_loss_gradient.register_fake
def _(logits: Tensor, *args: Any) -> Tensor:
    return _empty_gradient(logits, True)


def _terms(logits: Tensor, rows: Rows, backend: str, gradient: Tensor | None) -> Terms:
    """Return the terms, and write the gradient where there is room for it."""
    if gradient is None:
        return implementation(backend).row_terms(logits, 0, rows)
    return implementation(backend).row_loss_and_gradient(logits, rows, gradient)


def _packed(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _empty_gradient(logits: Tensor, wanted: bool) -> Tensor:
    return logits.new_empty(logits.shape if wanted else (0,))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, *described, ctx.backend, ctx.summed, wanted = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.has_gradient = wanted
    if ctx.summed:
        ctx.save_for_backward(output[3])
        return
    save_mixed(ctx, [logits, *described, output[1]])


def _backward(ctx: Any, grad_loss: Tensor | None, *_unused: Any) -> tuple[Tensor | None, ...]:
    refuse_twice("neighbor_silencing_loss")
    nothing = (None,) * (len(Rows._fields) + 3)
    if grad_loss is None or not ctx.has_gradient:
        return None, *nothing
    if ctx.summed:
        return scaled(ctx.saved_tensors[0], grad_loss), *nothing
    logits, *described, log_sum = saved_mixed(ctx)
    rows = Rows(*described)
    rows = rows._replace(shares=rows.shares * grad_loss)
    return torch.ops.fastlt_kernels.logits_loss_gradient(
        logits, *rows, ctx.backend, log_sum
    ), *nothing


_logits_loss.register_autograd(_backward, setup_context=_setup_context)
