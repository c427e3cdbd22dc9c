"""One label per row, or two with their shares (mixup, cutmix), in one form.

The loss is linear in the labels.
"""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE_INDEX = -100  # PyTorch's own: a label that has no loss and does not count in the mean


def stack_labels(
    target: Tensor,
    target_b: Tensor | None,
    mix: float | Tensor | None,
    row_weight: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return labels (L, N) int64 and their shares (L, N) in dtype.

    The shares of a row sum to its weight, which is 1 without row_weight (N,). An ignored label has
    share 0, and stands as class 0 so that it can be looked up.
    """
    whole = torch.ones(target.shape, dtype=dtype, device=target.device)
    if target_b is None or mix is None:
        labels, shares = target.long()[None], whole[None]
    else:
        # A product, not torch.full: under torch.compile, full makes a new graph for every number.
        if isinstance(mix, Tensor):
            # A scalar on the CPU goes into the product as it is: moved to a GPU, it would be waited
            # for.
            mix = (
                mix.detach().to(dtype)
                if mix.ndim == 0 and mix.is_cpu
                else mix.detach().to(target.device, dtype)
            )
        share = whole * mix
        labels, shares = (
            torch.stack([target.long(), target_b.long()]),
            torch.stack([share, 1 - share]),
        )
    if row_weight is not None:
        shares = shares * row_weight.detach().to(dtype)
    ignored = labels == IGNORE_INDEX
    return labels.masked_fill(ignored, 0), shares.masked_fill(ignored, 0)


def counted_rows(shares: Tensor) -> Tensor:
    """Return what "mean" divides by, (): the weight of the rows that are not ignored.

    Where that is 0 it is 1.
    """
    count = shares.sum()
    return torch.where(count > 0, count, torch.ones_like(count))


def divided(shares: Tensor, reduction: str, product: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Return shares (L, N) with the mean's divisor in, and what is left to divide the loss by.

    The latter may be None.

    In half precision gradients divided by the rows would vanish before a loss scale lifts them:
    there the division is last.
    """
    if reduction != "mean":
        return shares, None
    divisor = counted_rows(shares)
    return (shares, divisor) if product == torch.float16 else (shares / divisor, None)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums and exponentials: float32, and float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
