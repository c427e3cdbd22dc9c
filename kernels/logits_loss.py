"""Neighbour silencing on logits that already exist."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastlt_kernels.checks import check_logits, check_loss
from fastlt_kernels.graph import ClassGraph
from fastlt_kernels.labels import accumulation_dtype, stack_labels


def neighbor_silencing_loss(
    logits: Tensor,  # (N, C) fp32, fp16, bf16 or fp64
    target: Tensor,  # (N,) integer class ids
    *,
    graph: ClassGraph | None = None,
    log_prior: Tensor | None = None,  # (C,) float
    silence: float = 0.1,
    target_b: Tensor | None = None,  # (N,) integer class ids
    mix: float | Tensor | None = None,  # scalar or (N,)
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Cross entropy with a prior, in which each label's neighbours in `graph` weigh `silence` (arXiv 2410.15980).

        a_ij = z_ij + log_prior_j + [j in S(y_i)] * log(silence),    L_i = logsumexp_j(a_ij) - a_i,y_i

    log_prior is a constant (tau already in it); -inf drops a class that never occurs. silence = 1 is Balanced Softmax,
    0 drops the silenced terms; no graph, no silencing. Two labels: mix * L(target) + (1 - mix) * L(target_b), each with
    its own silenced set. label_smoothing spreads its mass over the unsilenced classes only.

    Returns the loss in float32 (float64 for float64 logits): a scalar for reduction "mean" and "sum", (N,) for "none".
    Arithmetic inside is float32 or float64; differentiable in logits. Raises ValueError naming the argument.
    """
    check_logits(logits)
    rows, classes = logits.shape
    check_loss(rows, classes, logits.device, target, graph, log_prior, silence, target_b, mix, label_smoothing, reduction, backend)
    base = logits.to(accumulation_dtype(logits.dtype))
    if log_prior is not None:
        base = base + log_prior.detach().to(base.dtype)
    labels, shares = stack_labels(target, target_b, mix, base.dtype)
    per_label = [_label_losses(base, label, graph, silence, label_smoothing) for label in labels.unbind()]
    losses = (shares * torch.stack(per_label)).sum(dim=0)
    return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.mean()


def _label_losses(base: Tensor, labels: Tensor, graph: ClassGraph | None, silence: float, label_smoothing: float) -> Tensor:
    """(N,) losses of one label per row; base (N, C) is logits plus prior."""
    silenced = _silenced_mask(base, labels, graph) if graph is not None and graph.max_degree > 0 and silence < 1 else None
    log_sum = torch.logsumexp(base if silenced is None else _silence(base, silenced, silence), dim=1)
    losses = log_sum - (1 - label_smoothing) * base.gather(1, labels[:, None])[:, 0]
    if label_smoothing == 0:
        return losses
    unsilenced = base if silenced is None else base.masked_fill(silenced, 0)
    count = base.shape[1] if silenced is None else base.shape[1] - silenced.sum(dim=1)
    return losses - label_smoothing * unsilenced.sum(dim=1) / count


def _silenced_mask(base: Tensor, labels: Tensor, graph: ClassGraph) -> Tensor:
    """(N, C) bool. A scatter of constants needs no gradient, and padding, which points at the label, is undone at the end."""
    columns, _ = graph.neighbours(labels)
    mask = torch.zeros(base.shape, dtype=torch.bool, device=base.device)
    return mask.scatter(1, columns, True).scatter(1, labels[:, None], False)


def _silence(base: Tensor, silenced: Tensor, silence: float) -> Tensor:
    if silence == 0:
        return base.masked_fill(silenced, -torch.inf)
    return torch.where(silenced, base + math.log(silence), base)
