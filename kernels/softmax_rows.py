"""Some rows of logits plus prior -> their losses, and in the same buffer the gradient: silencing in place and exact.

The buffer is read as base logits and left as the gradient, with one exponential per element. The columns that any label
of the row silences (a few) are taken out of the buffer and handled beside it. So two labels with different silenced sets
share one buffer, each with its own log-sum-exp, and nothing is ever subtracted from a sum.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastlt_kernels.graph import padded_neighbours


class SilencedColumns(NamedTuple):
    """The columns that the labels (L, n) silence, L = 1 or 2: their union in M = L * max_degree slots per row."""

    columns: Tensor  # (n, M) int64
    real: Tensor  # (n, M) bool; the other slots are padding, or repeat an earlier slot's column
    by_label: Tensor  # (L, n, M) bool, whether this label silences the column of this real slot


def silenced_columns(indptr: Tensor | None, indices: Tensor | None, max_degree: int, labels: Tensor) -> SilencedColumns:
    """labels (L, n) int64 and the tensors of a ClassGraph; without them there are no columns (M = 0)."""
    if indptr is None or indices is None or max_degree == 0:
        none = labels.new_empty(labels.shape[1], 0)
        return SilencedColumns(none, none.bool(), none.bool().expand(labels.shape[0], -1, -1))
    columns, real = padded_neighbours(indptr, indices, max_degree, labels[0])
    if labels.shape[0] == 1:
        return SilencedColumns(columns, real, real[None])
    columns_b, real_b = padded_neighbours(indptr, indices, max_degree, labels[1])
    in_b = _contained(columns, real, columns_b, real_b)
    fresh_b = real_b & ~_contained(columns_b, real_b, columns, real)
    by_first = torch.cat([real, torch.zeros_like(real)], dim=1)
    by_second = torch.cat([in_b, fresh_b], dim=1)
    return SilencedColumns(
        torch.cat([columns, columns_b], dim=1), torch.cat([real, fresh_b], dim=1), torch.stack([by_first, by_second])
    )


def loss_and_gradient_(
    base: Tensor,  # (n, C) fp32 or fp64, rows contiguous; overwritten, with the gradient if that is wanted
    labels: Tensor,  # (L, n) int64
    shares: Tensor,  # (L, n), dtype of base: what each label's loss counts
    silenced: SilencedColumns,
    silence: float,
    label_smoothing: float,
    want_gradient: bool,
) -> Tensor:
    """The losses (n,), sum over labels of share * L; base becomes their gradient, sum of share * (softmax - target mass)."""
    columns, real, by_label = silenced
    label_logits = base.gather(1, labels.T).T
    values = base.gather(1, columns).masked_fill_(~real, -torch.inf)
    smoothing = label_smoothing / (base.shape[1] - by_label.sum(dim=2)).to(base.dtype)  # (L, n), mass per unsilenced class
    expected = (1 - label_smoothing) * label_logits
    if label_smoothing > 0:
        expected += smoothing * _unsilenced_sum(base, values, silenced)

    # Adding, not writing: slots that are not real add zero, wherever they point.
    base.scatter_add_(1, columns, torch.where(real, -torch.inf, torch.zeros_like(values)))
    highest = base.amax(dim=1).clamp_(min=torch.finfo(base.dtype).min)  # finite even if every class is silenced by one label
    base.sub_(highest[:, None]).exp_()
    log_rest = highest + base.sum(dim=1).log_()

    silenced_values = torch.where(by_label, values + (math.log(silence) if silence > 0 else -math.inf), values)
    log_sum = torch.logsumexp(torch.cat([log_rest.expand(labels.shape)[..., None], silenced_values], dim=2), dim=2)
    if want_gradient:
        base.mul_((shares * torch.exp(highest - log_sum)).sum(dim=0)[:, None])
        probabilities = torch.exp(silenced_values - log_sum[..., None])
        _finish_gradient_(base, labels, shares, silenced, probabilities, smoothing, label_smoothing)
    return (shares * (log_sum - expected)).sum(dim=0)


def _finish_gradient_(
    base: Tensor,
    labels: Tensor,
    shares: Tensor,
    silenced: SilencedColumns,
    probabilities: Tensor,  # (L, n, M), of the silenced columns
    smoothing: Tensor,  # (L, n)
    label_smoothing: float,
) -> None:
    """base (n, C) holds the shared softmax, zero at silenced columns: put their part in and take the target mass off."""
    columns, _, by_label = silenced
    if label_smoothing > 0:
        base.sub_((shares * smoothing).sum(dim=0)[:, None])
        probabilities = probabilities + smoothing[..., None] * by_label  # gives back what a silenced class must not lose
    base.scatter_add_(1, columns, (shares[..., None] * probabilities).sum(dim=0))
    base.scatter_add_(1, labels.T, (label_smoothing - 1) * shares.T)


def _unsilenced_sum(base: Tensor, values: Tensor, silenced: SilencedColumns) -> Tensor:
    """(L, n): sum of the base logits that label L does not silence; leaves base zero at the union of silenced columns."""
    columns, real, by_label = silenced
    base.scatter_add_(1, columns, torch.where(real, -values, torch.zeros_like(values)))  # v - v is zero exactly
    return base.sum(dim=1) + torch.where(real & ~by_label, values, torch.zeros_like(values)).sum(dim=2)


def _contained(columns: Tensor, real: Tensor, others: Tensor, others_real: Tensor) -> Tensor:
    """(n, K) bool: whether a real column is among the real columns of `others`, which ascend in each row."""
    haystack = others.masked_fill(~others_real, torch.iinfo(others.dtype).max)
    slot = torch.searchsorted(haystack, columns).clamp_(max=others.shape[1] - 1)
    return real & (haystack.gather(1, slot) == columns)
