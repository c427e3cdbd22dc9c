"""Models as programs of torch.export, which torch loads without their Python code."""

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

DESCRIPTION = "description.json"


def write_program(model: nn.Module, data: dict[str, Any], path: Path, classes: list[str]) -> None:
    """Write a model of images (N, 3, size, size) float32, with a free batch size, as a .pt2 file.

    Its extra file `description.json` holds the classes, and size, resize, mean and std of images.
    """
    size = int(data["size"])
    example = torch.zeros(2, 3, size, size)
    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
        described = {"classes": classes, **data}
        torch.export.save(program, path, extra_files={DESCRIPTION: json.dumps(described)})


def program_logits(path: Path, images: Tensor) -> Tensor:
    """Return the logits (N, T) of images (N, 3, size, size) by a .pt2 file."""
    return torch.export.load(path).module()(images)
