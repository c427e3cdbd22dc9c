"""The choice of the implementation.

The Triton kernels run on a GPU, or in Triton's interpreter where that was asked for; torch
elsewhere.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None
# Triton settles this when it defines a kernel, so it is asked once
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def choose_backend(backend: str, matrix: Tensor, count: int) -> str:
    """Return "torch" or "triton", for `count` rows like those of `matrix`.

    Raises ValueError where "triton" was asked for and cannot run, saying why.
    """
    obstacle = _obstacle(matrix)
    if backend == "triton" and obstacle:
        raise ValueError(f"backend 'triton' {obstacle}: use 'auto' or 'torch'")
    if backend == "torch" or obstacle or count == 0:
        return "torch"
    return "triton" if backend == "triton" or matrix.is_cuda else "torch"


def is_transformed() -> bool:
    """Return whether this runs under torch.func or forward-mode differentiation.

    The fast paths know neither grad, vmap and jvp nor the latter.
    """
    if torch.compiler.is_compiling():
        return False
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def _obstacle(matrix: Tensor) -> str:
    if matrix.dtype == torch.float64:
        return "computes in float32, and the input is float64"
    if not HAS_TRITON:
        return "needs the triton package, which is not installed"
    if not matrix.is_cuda and not INTERPRETED:
        return (
            "needs a GPU (or TRITON_INTERPRET=1 in the environment before Python starts), and "
            f"the input is on {matrix.device}"
        )
    return ""
