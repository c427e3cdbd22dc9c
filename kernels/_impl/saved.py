"""The values that the forward keeps for the backward, and the scaling of gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastlt_kernels._impl.backends import HAS_TRITON


def save_mixed(ctx: Any, values: Sequence[Any]) -> None:
    """Save tensors by autograd's own means, which see leaks and overwriting; the rest as it is."""
    ctx.save_for_backward(*(value if isinstance(value, Tensor) else None for value in values))
    ctx.others = [None if isinstance(value, Tensor) else value for value in values]


def saved_mixed(ctx: Any) -> list[Any]:
    """Return what `save_mixed` saved."""
    return [
        other if tensor is None else tensor
        for tensor, other in zip(ctx.saved_tensors, ctx.others, strict=True)
    ]


def refuse_twice(name: str) -> None:
    """Raise RuntimeError in a backward with create_graph.

    Its gradient would silently count as a constant.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} is differentiable once: use neighbor_silencing_loss(..., backend='torch')"
        )


def scaled(saved: Tensor, grad_loss: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return saved * grad_loss (), in dtype.

    When the graph is not kept, nobody needs `saved` any more: it is scaled in place, and where the
    scale is 1 (a plain loss.backward()) its memory is not even touched. Else, a second backward
    will want it as it is.
    """
    dtype = dtype or saved.dtype
    if _is_batched(grad_loss):
        return (saved * grad_loss).to(dtype)
    if dtype == saved.dtype and _is_ours_alone(saved):
        return _scaled_in_place(saved, grad_loss)
    # Of one dimension at least, or it would be rounded to saved's type first, and a loss scale of
    # 65536 is infinite in half.
    return torch.mul(saved, grad_loss.reshape(1), out=torch.empty_like(saved, dtype=dtype))


def _scaled_in_place(saved: Tensor, scale: Tensor) -> Tensor:
    if saved.is_cuda:
        from fastlt_kernels._impl.triton_rows import scale_

        return scale_(saved, scale)
    return saved if scale == 1 else saved.mul_(scale)


def _is_ours_alone(saved: Tensor) -> bool:
    """Return whether a tensor is real and used by this backward alone."""
    if type(saved) is not Tensor or not saved.is_contiguous() or torch.compiler.is_compiling():
        return False
    if not saved.is_cpu and not (
        saved.is_cuda and HAS_TRITON and saved.dtype != torch.float64
    ):  # the kernel computes in fp32
        return False
    keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps_graph is not None and not keeps_graph()


def _is_batched(grad_loss: Tensor) -> bool:
    """Return whether it stands for several scales at once, as is_grads_batched has it."""
    return torch._C._dispatch_keys(grad_loss).has(torch._C._parse_dispatch_key("Batched"))  # type: ignore[arg-type]
