"""One label per row, or two with their shares (mixup, cutmix), in one form: the loss is linear in the labels."""

from __future__ import annotations

import torch
from torch import Tensor


def stack_labels(target: Tensor, target_b: Tensor | None, mix: float | Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Labels (L, N) int64 and their shares (L, N) of the given dtype, which sum to 1 over L = 1 or 2."""
    whole = torch.ones(target.shape, dtype=dtype, device=target.device)
    if target_b is None or mix is None:
        return target.long()[None], whole[None]
    # A product, not torch.full: under torch.compile, full makes a new graph for every number.
    share = whole * (mix.detach().to(target.device, dtype) if isinstance(mix, Tensor) else mix)
    return torch.stack([target.long(), target_b.long()]), torch.stack([share, 1 - share])


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums and exponentials are made in: float32, and float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
