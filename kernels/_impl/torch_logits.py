"""The loss on logits in plain torch.

It is differentiable as often as torch is, on any device, under any transform.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastlt_kernels._impl.rows import Rows
from fastlt_kernels.graph import padded_neighbours


def torch_losses(logits: Tensor, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """Return losses (N,), log-sum-exps (N,) and predictions (N,) int64 of logits (N, C).

    The latter two are of the first label, and have no gradient.
    """
    base = logits.to(rows.shares.dtype)
    if rows.log_prior is not None:
        base = base + rows.log_prior
    per_label = [_label_losses(base, rows, which) for which in range(rows.labels.shape[0])]
    losses = (rows.shares * torch.stack([loss for loss, _ in per_label])).sum(dim=0)
    predicted = logits.detach()[:, : rows.num_predicted]
    best = predicted.argmax(dim=1) if rows.num_predicted > 0 else torch.zeros_like(rows.labels[0])
    return losses, per_label[0][1].detach(), best


def _label_losses(base: Tensor, rows: Rows, which: int) -> tuple[Tensor, Tensor]:
    """Return losses and log-sum-exps (N,) of one label per row; base (N, C) has the prior."""
    labels = rows.labels[which]
    # A label of no share has no say in loss or gradient, whatever the logits: 0 * inf is not 0.
    base = base.masked_fill((rows.shares[which] == 0)[:, None], 0)
    silenced = _silenced_mask(base, rows, which)
    log_sum = torch.logsumexp(
        base if silenced is None else _silence(base, silenced, rows.silence), dim=1
    )
    losses = log_sum - (1 - rows.label_smoothing) * base.gather(1, labels[:, None])[:, 0]
    if rows.smoothing is None:
        return losses, log_sum
    unsilenced = base if silenced is None else base.masked_fill(silenced, 0)
    return losses - rows.smoothing[which] * unsilenced.sum(dim=1), log_sum


def _silenced_mask(base: Tensor, rows: Rows, which: int) -> Tensor | None:
    """Return which logits are silenced, (N, C) bool, None where none are.

    A scatter of constants needs no gradient, and padding, which points at the label, is undone at
    the end.
    """
    if rows.graph_rows is None or rows.indptr is None or rows.indices is None:
        return None
    labels = rows.graph_rows[which]
    columns, _ = padded_neighbours(rows.indptr, rows.indices, rows.max_degree, labels)
    mask = torch.zeros(base.shape, dtype=torch.bool, device=base.device)
    mask = mask.scatter(1, columns, True).scatter(1, labels[:, None], False)
    if rows.blocks is None:
        return mask
    is_target = torch.arange(base.shape[1], device=base.device) < rows.split
    block = rows.blocks[which][:, None]
    return (mask ^ torch.where(is_target, block & 1, block & 2).bool()).scatter(
        1, labels[:, None], False
    )


def _silence(base: Tensor, silenced: Tensor, silence: float) -> Tensor:
    if silence == 0:
        return base.masked_fill(silenced, -torch.inf)
    return torch.where(silenced, base + math.log(silence), base)
