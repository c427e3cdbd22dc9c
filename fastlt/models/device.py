"""The device and the precision that a model runs in."""

import torch

from fastlt.config import Config
from fastlt.errors import UserError
from fastlt.models.classifier import Classifier
from fastlt.models.depthwise import quicken

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def choose_device(config: Config, local: int = 0) -> tuple[torch.device, torch.dtype]:
    """Return the device and the dtype of autocast, and set torch's threads and TF32.

    local: the number of this process on this machine; each takes a GPU of its own.
    """
    device = find_device(config.train.device)
    if device.type == "cuda" and device.index is None:
        device = find_device(f"cuda:{local}")
        torch.cuda.set_device(device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if config.train.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = config.train.tf32
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    return device, PRECISIONS[
        config.train.precision if config.train.precision != "auto" else best_precision(device)
    ]


def best_precision(device: torch.device) -> str:
    """Return the name of the fastest precision that a device trains well in."""
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def find_device(name: str) -> torch.device:
    """Return the device of that name. Raises UserError where torch finds none such."""
    try:
        device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
        )
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"train.device={name}, but torch finds no such device here: set train.device=auto"
        ) from error
    return device


def on_device(model: Classifier, config: Config, device: torch.device) -> Classifier:
    """Return the model on the device, in the memory format of the configuration."""
    model = model.to(device)
    if device.type == "cpu":
        quicken(model)
    return model.to(memory_format=torch.channels_last) if config.train.channels_last else model  # type: ignore[call-overload]
