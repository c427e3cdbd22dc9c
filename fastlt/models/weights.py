"""Tensors on disk, in safetensors files."""

import errno
import os
import re
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastlt.errors import UserError

UMASK = os.umask(0)  # which cannot be asked for without being set
os.umask(UMASK)


def copies(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous copies on the CPU: safetensors refuses channels_last."""
    return {
        name: torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
        for name, tensor in tensors.items()
        if not hasattr(tensor, "to_local")
    }


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write tensors to a safetensors file. Raise OSError, as others do, where it cannot."""
    try:
        save_file(tensors, path, metadata)
        path.chmod(0o666 & ~UMASK)  # safetensors lets nobody else read it
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file of a checkpoint. UserError where it is damaged."""
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises OSError or its own, undocumented, types
        raise UserError(
            f"{path} is missing or damaged: remove its folder to go on from the checkpoint before "
            f"({error})"
        ) from error


def load_weights(
    path: Path, model: nn.Module, classifier: str = "", still: Collection[str] = ()
) -> None:
    """Fill a model with the tensors of a file. UserError where they do not fit.

    classifier: the name of the head in a file that has names of timm; "": it has ours. still:
    names of tensors that the file may lack.
    """
    own_only = getattr(getattr(model, "head", None), "is_sharded", False)
    tensors = read_tensors(path)
    if classifier:
        tensors = of_timm(tensors, classifier)
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=not (own_only or still))
        lacking = [name for name in missing if name not in still]
        if unexpected or any(not (own_only and name.startswith("head.")) for name in lacking):
            raise RuntimeError(f"{len(missing)} tensors are missing, {len(unexpected)} unknown")
    except RuntimeError as error:
        raise UserError(
            f"{path} does not fit the model of this configuration: use another RUN folder"
        ) from error


def of_timm(tensors: dict[str, Tensor], classifier: str) -> dict[str, Tensor]:
    """Return the tensors of a model of timm under the names of a Classifier."""
    start = f"{classifier}."
    return {
        f"head.{name.removeprefix(start)}" if name.startswith(start) else f"backbone.{name}": tensor
        for name, tensor in tensors.items()
    }
