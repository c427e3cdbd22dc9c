"""Checkpoints: a folder per step with safetensors and JSON, whole or not there. Loading a foreign one never runs code.

RUN/checkpoints/step-00001234/  model.safetensors  optimizer.safetensors  [ema.safetensors]  state.json
"""

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from fastlt.classes import ClassSpace
from fastlt.errors import UserError
from fastlt.files import flush_to_disk, whole_folder


def class_space_id(space: ClassSpace) -> str:
    """Two runs with the same id give the same meaning to every row of the classifier."""
    return hashlib.sha256(json.dumps([space.target_names, space.auxiliary_names]).encode()).hexdigest()[:16]


def save_checkpoint(
    run: Path, step: int, model: nn.Module, optimizer: Optimizer, ema: nn.Module | None, state: dict[str, Any], keep: int
) -> None:
    """`state` is what else the run needs to go on, as JSON. Older checkpoints beyond `keep` are removed afterwards."""
    path = run / "checkpoints" / f"step-{step:08d}"
    if path.exists():
        return
    with whole_folder(path) as folder:
        save_file(dense(model.state_dict()), folder / "model.safetensors")
        save_file(optimizer_tensors(optimizer), folder / "optimizer.safetensors")
        if ema is not None:
            save_file(dense(ema.state_dict()), folder / "ema.safetensors")
        (folder / "state.json").write_text(json.dumps({"step": step, **state}), encoding="utf-8")
        for file in folder.iterdir():
            flush_to_disk(file)
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)


def checkpoints(run: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def remove_leftovers(run: Path) -> None:
    """What a killed run left half-written."""
    for path in [*run.glob(".*.partial"), *(run / "checkpoints").glob(".*.partial")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def read_state(checkpoint: Path) -> dict[str, Any]:
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        return {key: state[key] for key in ("step", "class_space", "pack", "at")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{checkpoint} is no readable checkpoint: remove it to go on from the one before") from error


def check_pack(checkpoint: Path, state: dict[str, Any], space: ClassSpace, pack_id: str) -> None:
    """Another class space gives the rows of the classifier another meaning; other images or pairs, the order and the prior."""
    if state["class_space"] == class_space_id(space) and state["pack"] != pack_id:
        raise UserError(
            f"the pack has changed since {checkpoint} was written: use the pack it was trained on, or another RUN folder"
        )
    if state["class_space"] != class_space_id(space):
        raise UserError(
            f"{checkpoint} belongs to another class space than the pack: use the pack it was trained on, or another RUN folder"
        )


def load_checkpoint(checkpoint: Path, model: nn.Module, optimizer: Optimizer | None = None, ema: nn.Module | None = None) -> None:
    """Fills model, optimiser and averaged weights in place. Raises UserError where the tensors do not fit."""
    load_weights(checkpoint / "model.safetensors", model)
    if optimizer is not None:
        fill_optimizer(optimizer, read_tensors(checkpoint / "optimizer.safetensors"))
    if ema is not None:
        load_weights(checkpoint / "ema.safetensors", ema)


def load_weights(path: Path, model: nn.Module) -> None:
    try:
        model.load_state_dict(read_tensors(path))
    except RuntimeError as error:
        raise UserError(f"{path} does not fit the model of this configuration: use another RUN folder") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises OSError or its own, undocumented, types
        raise UserError(f"{path} is missing or damaged: remove its folder to go on from the checkpoint before ({error})") from error


def dense(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU: safetensors refuses channels_last."""
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def optimizer_tensors(optimizer: Optimizer) -> dict[str, Tensor]:
    """`index.name` -> tensor for every state tensor, parameters counted through the groups."""
    state = optimizer.state_dict()["state"]
    return dense(
        {
            f"{i}.{name}": torch.as_tensor(value)
            for i, values in state.items()
            for name, value in values.items()
            if value is not None
        }
    )


def fill_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """State tensors take the memory format of their parameter: load_state_dict would leave channels_last behind."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        if tensor.shape == parameter.shape:
            tensor = torch.empty_like(parameter).copy_(tensor)
        optimizer.state[parameter][name] = tensor.to(parameter.device)
