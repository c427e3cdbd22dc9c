"""Models as ONNX, for onnxruntime, TensorRT and all that reads it."""

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastlt.errors import MissingExtra, UserError

INPUT, OUTPUT = "images", "logits"
PIXELS = "pixels"  # the input with the preprocessing inside


class Halved(nn.Module):
    """A model in float16 that takes and gives float32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.half()

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, T) float32 of images (N, 3, H, W) float32."""
        return self.model(images.half()).float()


class FromPixels(nn.Module):
    """A model of pixels (N, H, W, 3) uint8 of any size: resized, cut and normalised inside.

    It gives logits (N, T) float32. Resizing is evaluation's, by weights of rows and columns.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, data: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.size = model, int(data["size"])
        self.resize = int(data["eval_resize"] or data["size"])
        self.register_buffer("mean", 255 * torch.tensor(data["mean"])[:, None, None])
        self.register_buffer("std", 255 * torch.tensor(data["std"])[:, None, None])

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the logits (N, T) of pixels (N, H, W, 3) uint8."""
        height, width = pixels.shape[1], pixels.shape[2]
        short = torch.sym_min(height, width)
        side = (2 * short * self.size + self.resize) // (2 * self.resize)  # rounded
        top, left = (height - side) // 2, (width - side) // 2
        square = pixels.narrow(1, top, side).narrow(2, left, side).permute(0, 3, 1, 2).float()
        weights = self.weights_of(torch.arange(side, dtype=torch.float32, device=pixels.device))
        columns = (square @ weights.T + 0.5).floor()  # Pillow rounds after either direction
        images = (weights @ columns + 0.5).floor()
        return self.model((images - self.mean) / self.std)

    def weights_of(self, positions: Tensor) -> Tensor:
        """Return the share (size, S) of each of S pixels in each of `size` that they become.

        positions (S,): 0 to S - 1. Shrunk, the pixels whose centres lie within it count alike;
        enlarged, the nearest two by their distance. It is Pillow's box and bilinear filter.
        """
        scale = (positions[-1] + 1) / self.size
        ends = torch.arange(self.size + 1, dtype=torch.float32, device=positions.device) * scale
        centres = (positions + 0.5)[None]
        within = (centres > ends[:-1, None]) & (centres <= ends[1:, None])
        near = (1 - (centres - (ends[:-1, None] + ends[1:, None]) / 2).abs()).clamp(min=0)
        weights = torch.where(scale >= 1, within.float(), near)
        return weights / weights.sum(dim=1, keepdim=True)


def check_onnx() -> Any:
    """Return onnxruntime. Raises MissingExtra where it, or what writes ONNX, is missing."""
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch's exporter imports it when called
    except ImportError as error:
        raise MissingExtra(
            "ONNX export needs onnx, onnxscript and onnxruntime: pip install 'fastlt[onnx]'"
        ) from error
    return onnxruntime


def write_onnx(
    model: nn.Module, data: dict[str, Any], path: Path, described: dict[str, str], pixels: bool
) -> None:
    """Write a model to ONNX with a free batch size, and a description as its metadata.

    data: size, eval_resize, mean and std of its images. pixels: with the preprocessing inside, for
    images of any size; else it takes normalised ones, (N, 3, size, size) float32.
    """
    size = int(data["size"])
    batch = torch.export.Dim("batch", min=1)
    sides = {1: torch.export.Dim("height", min=2), 2: torch.export.Dim("width", min=2)}
    example = (
        torch.zeros(2, size + 8, size + 12, 3, dtype=torch.uint8)
        if pixels
        else torch.zeros(2, 3, size, size)
    )
    with warnings.catch_warnings():  # of torch about itself
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            FromPixels(model, data).eval() if pixels else model,
            (example,),
            input_names=[PIXELS if pixels else INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: batch, **(sides if pixels else {})},),
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise UserError("torch could not export this model to ONNX")
    program.model.metadata_props.update(described)
    program.save(str(path), include_initializers=True, external_data=False)


def onnx_logits(path: Path, images: Tensor) -> Tensor:
    """Return the logits (N, T) by onnxruntime, on the CPU, of what the model takes."""
    onnxruntime = check_onnx()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(
            path.read_bytes(), options, providers=["CPUExecutionProvider"]
        )
        (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    except Exception as error:  # onnxruntime's are of many types, and below Exception alone
        raise UserError(
            f"onnxruntime does not run the ONNX model, so it was not kept: {error}"
        ) from error
    return torch.from_numpy(np.asarray(found)).float()


def onnx_description(classes: list[str], data: dict[str, Any]) -> dict[str, str]:
    """Return what a model says of itself in its metadata, each value as JSON."""
    values = {
        "classes": classes,
        "size": data["size"],
        "resize": data["eval_resize"] or data["size"],
        "mean": list(data["mean"]),
        "std": list(data["std"]),
    }
    return {name: json.dumps(value) for name, value in values.items()}
