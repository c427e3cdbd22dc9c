"""Tensors on disk, in safetensors files, and what a head starts from."""

import errno
import os
import re
from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastlt.errors import UserError
from fastlt.models.heads import Head
from fastlt.models.weight_files import read_weights
from fastlt.utils.embeddings import read_embeddings

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


def start_head(head: Head, path: Path) -> None:
    """Copy `weight` (T or C, D) and `bias` of a file into the first rows of a head.

    `head.weight` and `head.bias`, as a trained model has them, will do as well.
    """
    found = {name.removeprefix("head."): tensor for name, tensor in read_weights(path).items()}
    fill_head(head, found.get("weight"), found.get("bias"), str(path))


def start_head_by_name(head: Head, place: str, names: Sequence[str]) -> None:
    """Copy the vectors of the classes' names (C,), each of length 1, into the rows of a head.

    place: `FILE.npz` or `FILE.npz:KEY`, such as CLIP's text features. Raises UserError where a
    class has no vector, or the vectors do not fit the head.
    """
    vectors = read_embeddings(place).of(names)
    known = [vector for vector in vectors if vector is not None]
    if missing := [name for name, vector in zip(names, vectors, strict=True) if vector is None]:
        more = f" and of {len(missing) - 1} more classes" if len(missing) > 1 else ""
        raise UserError(f"{place} has no vector of '{missing[0]}'{more}: add them to the file")
    fill_head(head, torch.from_numpy(np.stack(known)), None, place)


def fill_head(head: Head, rows: Tensor | None, bias: Tensor | None, place: str) -> None:
    """Copy rows (T or C, D), and a bias, into the first ones of a head.

    place: what they are from, for the UserError where they do not fit.
    """
    if (
        rows is None
        or rows.ndim != 2
        or rows.shape[1] != head.weight.shape[1]
        or len(rows) > len(head.weight)
    ):
        shape = "no `weight`" if rows is None else f"a weight of shape {tuple(rows.shape)}"
        raise UserError(
            f"{place} has {shape}; the head is {tuple(head.weight.shape)} and takes its first rows "
            "from it"
        )
    with torch.no_grad():
        head.weight[: len(rows)] = rows
        if bias is not None and head.bias is not None and not head.is_sharded:
            head.bias[: len(bias)] = bias


def is_vectors(place: str) -> bool:
    """Return whether a place is a file of vectors by name, not of weights."""
    return place.endswith(".npz") or ".npz:" in place
