"""The loss in plain, dense torch: the specification that every fast path is held to.

Slow and large on purpose.

    a_ij = z_ij + log_prior_j + [j in S(y_i)] * log(silence)
    L_i  = logsumexp_j(a_ij) - sum_j q_ij * (z_ij + log_prior_j)

with q the (smoothed) target mass, which lies on unsilenced classes only; without smoothing q_i is
one at y_i and the second term is a_i,y_i. Source: arXiv 2410.15980 (neighbour silencing), arXiv
2007.07314 (the prior).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastlt_kernels._impl.labels import IGNORE_INDEX
from fastlt_kernels.graph import AUXILIARIES, TARGETS, ClassGraph


def reference_loss(
    logits: Tensor,
    target: Tensor,
    *,
    graph: ClassGraph | None = None,
    log_prior: Tensor | None = None,
    silence: float = 0.1,
    target_b: Tensor | None = None,
    mix: float | Tensor | None = None,
    row_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Return `neighbor_silencing_loss`, formula by formula, with dense (N, C) masks.

    It is in the dtype of logits (N, C).
    """
    base = logits if log_prior is None else logits + log_prior.to(logits.dtype)
    losses, counted = _label_losses(base, target, graph, silence, label_smoothing)
    if target_b is not None and mix is not None:
        share = mix.to(logits) if isinstance(mix, Tensor) else mix
        losses_b, counted_b = _label_losses(base, target_b, graph, silence, label_smoothing)
        losses, counted = (
            share * losses + (1 - share) * losses_b,
            share * counted + (1 - share) * counted_b,
        )
    if row_weight is not None:
        weight = row_weight.detach().to(logits.dtype)
        losses = torch.where(weight == 0, 0, weight * losses)  # 0 * inf has no say here
        counted = weight * counted
    if reduction == "mean":
        return losses.sum() / counted.sum() if counted.any() else losses.sum()
    return losses if reduction == "none" else losses.sum()


def silenced_mask(graph: ClassGraph | None, labels: Tensor, num_classes: int) -> Tensor:
    """Return whether class j is in S(labels_i), (N, C) bool."""
    mask = torch.zeros(len(labels), num_classes, dtype=torch.bool, device=labels.device)
    if graph is not None:
        for row, label in enumerate(labels.tolist()):
            blocks = graph.target_blocks if label < graph.num_targets else graph.auxiliary_blocks
            mask[row, : graph.num_targets] = bool(blocks & TARGETS)
            mask[row, graph.num_targets :] = bool(blocks & AUXILIARIES)
            mask[row, graph.indices[graph.indptr[label] : graph.indptr[label + 1]]] ^= True
            mask[row, label] = False
    return mask


def target_mass(
    labels: Tensor, silenced: Tensor, label_smoothing: float, dtype: torch.dtype
) -> Tensor:
    """Return 1 - eps + eps / K on the label, eps / K on each other unsilenced class, (N, C).

    There are K unsilenced classes with the label.
    """
    unsilenced = (~silenced).to(dtype)
    label = torch.nn.functional.one_hot(labels.long(), silenced.shape[1]).to(dtype)
    return (1 - label_smoothing) * label + label_smoothing * unsilenced / unsilenced.sum(
        dim=1, keepdim=True
    )


def _label_losses(
    base: Tensor, labels: Tensor, graph: ClassGraph | None, silence: float, label_smoothing: float
) -> tuple[Tensor, Tensor]:
    """Return losses (N,) of one label each, and 1 for each that counts, 0 for an ignored one.

    base (N, C) is logits plus prior.
    """
    counted = labels != IGNORE_INDEX
    labels = torch.where(counted, labels, 0)
    silenced = silenced_mask(graph if silence < 1 else None, labels, base.shape[1])
    log_silence = math.log(silence) if silence > 0 else -math.inf
    silenced_logits = torch.where(silenced, base + log_silence, base)
    mass = target_mass(labels, silenced, label_smoothing, base.dtype)
    expected = (mass * base.masked_fill(mass == 0, 0)).sum(dim=1)  # 0 * inf has no say here
    return torch.where(counted, torch.logsumexp(silenced_logits, dim=1) - expected, 0), counted.to(
        base.dtype
    )
