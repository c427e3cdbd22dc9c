"""Files of weights that the user names: safetensors, or of torch without code in them."""

import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fastlt.errors import UserError

TORCH_FILES = (".pth", ".pt", ".bin", ".ckpt", ".tar")
# under which trainers keep the weights in their checkpoints, as timm looks for them
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "teacher", "student")


def weights_file(place: str) -> Path:
    """Return the file of a place: the model, where it is a RUN or an exported folder."""
    path = Path(place)
    if path.is_dir() and not (path / "model.safetensors").is_file():
        raise UserError(f"{path} has no model.safetensors: name a run that has finished")
    return path / "model.safetensors" if path.is_dir() else path


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file that the user named. UserError where it is none.

    No code of the file is run: of torch's files, those are read that hold tensors and plain values.
    """
    if path.suffix not in TORCH_FILES:
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"cannot read the weights {path}: it must be a safetensors file, or one of torch "
                f"that ends in {', '.join(TORCH_FILES[:3])} ({error})"
            ) from error
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path} with weights") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors, and code of a file is not run: save its state_dict() "
            "alone, or as safetensors"
        ) from error
    except Exception as error:  # of damaged bytes torch's reader raises about anything
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"cannot read the weights {path}: {reason}") from error
    return unwrapped(found, path)


def unwrapped(found: Any, path: Path) -> dict[str, Tensor]:
    """Return the tensors by name of what a file of torch holds. UserError where there are none."""
    for _ in range(2):  # {"model": {"state_dict": ...}}
        inner = next((found[key] for key in WRAPPERS if _is_table(found, key)), None)
        found = found if inner is None else inner
    tensors = (
        {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
        if isinstance(found, dict)
        else {}
    )
    if not tensors:
        keys = ", ".join(map(str, list(found)[:3])) if isinstance(found, dict) else "no table"
        raise UserError(f"{path} holds no tensors by name (it has {keys}): save a state_dict()")
    return tensors


def _is_table(found: Any, key: str) -> bool:
    return isinstance(found, dict) and isinstance(found.get(key), dict)
