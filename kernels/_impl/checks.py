"""The argument checks of the losses: a ValueError that names the argument.

Shapes and dtypes are always checked. Values (ids in range, a usable prior) cost a device
synchronisation, so they are checked on CPU tensors, and elsewhere only with FASTLT_KERNELS_DEBUG=1;
never while torch.compile or torch.func is tracing.
"""

from __future__ import annotations

import os
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from fastlt_kernels._impl.backends import is_transformed
from fastlt_kernels._impl.labels import IGNORE_INDEX
from fastlt_kernels.graph import ClassGraph

LOGIT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LABEL_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_matrix(name: str, matrix: Tensor, shape: str) -> None:
    """Raise ValueError where a tensor is no matrix of floats."""
    _check_tensor(name, matrix)
    if matrix.ndim != 2:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(matrix.shape)}")
    if matrix.dtype not in LOGIT_DTYPES:
        raise ValueError(
            f"{name} must be float16, bfloat16, float32 or float64, got {matrix.dtype}"
        )


def check_linear(features: Tensor, weight: Tensor, bias: Tensor | None, autocast: bool) -> None:
    """Raise ValueError where weight or bias do not fit features, which are a matrix."""
    check_matrix("weight", weight, "(C, D)")
    if weight.shape[1] != features.shape[1]:
        raise ValueError(
            f"weight must have the {features.shape[1]} columns of features, got {weight.shape[1]}"
        )
    _check_linear_dtype("weight", weight, features, autocast)
    if bias is None:
        return
    _check_tensor("bias", bias)
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape ({weight.shape[0]},), got {tuple(bias.shape)}")
    _check_linear_dtype("bias", bias, features, autocast)


def check_loss(
    rows: int,
    classes: int,
    device: torch.device,
    target: Tensor,
    graph: ClassGraph | None,
    log_prior: Tensor | None,
    silence: float,
    target_b: Tensor | None,
    mix: float | Tensor | None,
    row_weight: Tensor | None,
    label_smoothing: float,
    reduction: str,
    backend: str,
) -> None:
    """Raise ValueError for a wrong argument of those that all the losses share."""
    if rows > 0 and classes == 0:
        raise ValueError("logits, or weight, must have at least one class")
    _check_options(silence, label_smoothing, reduction, backend)
    values = should_check_values(device)
    _check_labels("target", target, rows, classes, device, values)
    _check_graph(graph, classes, device)
    _check_log_prior(log_prior, classes, device, label_smoothing, values)
    _check_mix(target_b, mix, rows, device, values)
    _check_row_weight(row_weight, rows, device, values)
    if target_b is not None:
        _check_labels("target_b", target_b, rows, classes, device, values)


def check_chunk_bytes(chunk_bytes: int) -> None:
    """Raise ValueError where chunk_bytes is not a positive integer."""
    check_integer("chunk_bytes", chunk_bytes)
    if not 0 < chunk_bytes < 2**63:
        raise ValueError(f"chunk_bytes must be positive and below 2^63, got {chunk_bytes}")


def check_predicted(num_targets: int, classes: int) -> None:
    """Raise ValueError where num_targets is not a number of classes."""
    check_integer("num_targets", num_targets)
    if not 0 <= num_targets <= classes:
        raise ValueError(f"num_targets must be in 0..{classes}, got {num_targets}")


def should_check_values(device: torch.device) -> bool:
    """Return whether to look at the values of tensors on this device."""
    if torch.compiler.is_compiling() or is_transformed() or device.type == "meta":
        return False
    return device.type == "cpu" or os.environ.get("FASTLT_KERNELS_DEBUG") == "1"


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor) or value.layout != torch.strided:
        what = f"{value.layout} tensor" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must be a dense torch tensor, got a {what}")


def check_number(name: str, value: Any) -> None:
    """Raise ValueError where a value is no plain number."""
    # A tensor of one number would be waited for, and its gradient dropped without a word.
    if not isinstance(value, Real | torch.SymInt | torch.SymFloat) or isinstance(value, bool):
        raise ValueError(f"{name} must be a number, got {type(value).__name__}")


def check_integer(name: str, value: Any) -> None:
    """Raise ValueError where a value is no plain integer."""
    if not isinstance(value, int | torch.SymInt) or isinstance(value, bool):
        raise ValueError(f"{name} must be an integer, got {type(value).__name__}")


def _check_linear_dtype(name: str, tensor: Tensor, features: Tensor, autocast: bool) -> None:
    # Autocast leaves float64 alone, so there the dtypes must still agree.
    lowered = (
        autocast
        and torch.float64 not in (tensor.dtype, features.dtype)
        and tensor.dtype in LOGIT_DTYPES
    )
    if tensor.dtype != features.dtype and not lowered:
        raise ValueError(
            f"{name} must have the dtype of features, {features.dtype}, got {tensor.dtype}"
        )
    _check_device(name, tensor, features.device)


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")


def _check_options(silence: float, label_smoothing: float, reduction: str, backend: str) -> None:
    check_number("silence", silence)
    check_number("label_smoothing", label_smoothing)
    if not 0 <= silence <= 1:
        raise ValueError(f"silence must be in [0, 1], got {silence}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', not {reduction!r}")
    if backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend must be 'auto', 'triton' or 'torch', not {backend!r}")


def _check_labels(
    name: str, labels: Tensor, rows: int, classes: int, device: torch.device, values: bool
) -> None:
    _check_tensor(name, labels)
    if labels.shape != (rows,):
        raise ValueError(f"{name} must have shape ({rows},), got {tuple(labels.shape)}")
    if labels.dtype not in LABEL_DTYPES:
        raise ValueError(f"{name} must hold integer class ids, got {labels.dtype}")
    _check_device(name, labels, device)
    if not values:  # nor a mask, whose length nobody knows while tracing
        return
    counted = labels.long()  # not uint8, in which -100 is 156
    counted = counted[counted != IGNORE_INDEX]
    if counted.numel() and not (counted.min() >= 0 and counted.max() < classes):
        raise ValueError(
            f"{name} must be in 0..{classes - 1} (or -100), got "
            f"{int(counted.min())}..{int(counted.max())}"
        )


def _check_graph(graph: ClassGraph | None, classes: int, device: torch.device) -> None:
    if graph is None:
        return
    if not isinstance(graph, ClassGraph):
        raise ValueError(f"graph must be a ClassGraph, got {type(graph).__name__}")
    if graph.num_classes != classes:
        raise ValueError(f"graph has {graph.num_classes} classes, the logits have {classes}")
    if graph.indptr.device != device:
        raise ValueError(
            f"graph is on {graph.indptr.device}, the logits on {device}: move it with "
            "graph.to(device)"
        )


def _check_log_prior(
    log_prior: Tensor | None,
    classes: int,
    device: torch.device,
    label_smoothing: float,
    values: bool,
) -> None:
    if log_prior is None:
        return
    _check_tensor("log_prior", log_prior)
    if log_prior.shape != (classes,) or log_prior.dtype not in LOGIT_DTYPES:
        raise ValueError(
            f"log_prior must have shape ({classes},) and hold floats, got {tuple(log_prior.shape)} "
            f"{log_prior.dtype}"
        )
    _check_device("log_prior", log_prior, device)
    if not values:
        return
    if not (log_prior < torch.inf).all():
        raise ValueError("log_prior must hold no NaN and no +inf")
    if label_smoothing > 0 and (log_prior == -torch.inf).any():
        raise ValueError(
            "log_prior of -inf (a class that never occurs) has no finite loss with label_smoothing"
        )


def _check_mix(
    target_b: Tensor | None,
    mix: float | Tensor | None,
    rows: int,
    device: torch.device,
    values: bool,
) -> None:
    if (target_b is None) != (mix is None):
        missing, given = ("mix", "target_b") if mix is None else ("target_b", "mix")
        raise ValueError(f"{missing} is missing: {given} was given, and mixed labels need both")
    if isinstance(mix, Tensor):
        if mix.ndim > 0 and mix.shape != (rows,):
            raise ValueError(
                f"mix must be a scalar or have shape ({rows},), got {tuple(mix.shape)}"
            )
        if not mix.is_floating_point():
            raise ValueError(f"mix must hold floats, got {mix.dtype}")
        if mix.ndim > 0:
            _check_device("mix", mix, device)
        if values and not ((mix >= 0) & (mix <= 1)).all():
            raise ValueError("mix must be in [0, 1]")
        return
    if mix is None:
        return
    check_number("mix", mix)
    if not 0 <= mix <= 1:
        raise ValueError(f"mix must be in [0, 1], got {mix}")


def _check_row_weight(
    row_weight: Tensor | None, rows: int, device: torch.device, values: bool
) -> None:
    if row_weight is None:
        return
    _check_tensor("row_weight", row_weight)
    if row_weight.shape != (rows,) or row_weight.dtype not in LOGIT_DTYPES:
        raise ValueError(
            f"row_weight must have shape ({rows},) and hold floats, got {tuple(row_weight.shape)} "
            f"{row_weight.dtype}"
        )
    _check_device("row_weight", row_weight, device)
    if values and not ((row_weight >= 0) & (row_weight < torch.inf)).all():
        raise ValueError("row_weight must be finite and not negative")
