"""The matrix products of the linear loss: their dtypes, and sums that are wider."""

from __future__ import annotations

import torch
from torch import Tensor


def is_autocast(features: Tensor) -> bool:
    """Return whether autocast is on for the device of the features."""
    return features.device.type != "meta" and torch.is_autocast_enabled(features.device.type)


def product_dtype(features: Tensor, autocast: bool) -> torch.dtype:
    """Return the dtype of the products."""
    device = features.device.type
    dtype = (
        torch.get_autocast_dtype(device)
        if autocast and features.dtype != torch.float64
        else features.dtype
    )
    # Measured on AVX-512: fp16 products take 4 to 60 times as long as fp32 ones, and can overflow.
    return torch.float32 if dtype == torch.float16 and device == "cpu" else dtype


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that a gradient is kept in between forward and backward.

    Halves could overflow before the loss scale is known.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def logits_of(features: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """Write features (n, D) @ weight (c, D).T + bias (c,) to out (n, c), in features' dtype."""
    weight = weight.to(features.dtype).T
    if bias is None:
        torch.mm(features, weight, out=out)
    else:
        torch.addmm(bias.to(features.dtype), features, weight, out=out)


def add_product_(total: Tensor, left: Tensor, right: Tensor, fresh: bool) -> None:
    """Add left @ right to total, summed in the dtype of total; `fresh`: overwrite it."""
    if left.dtype == total.dtype:
        torch.addmm(total, left, right, beta=0 if fresh else 1, out=total)
    elif total.is_cuda and total.dtype == torch.float32:
        # The product leaves the multiplier's fp32 registers as it is: a half could overflow, a
        # bfloat16 would round.
        torch.addmm(total, left, right, out_dtype=total.dtype, beta=0 if fresh else 1, out=total)
    elif fresh:
        total.copy_(left @ right)
    else:
        total.add_(left @ right)
