"""Exported models: targets only. The auxiliary rows of the classifier are physically gone."""

import json
import warnings
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastlt.config import Config
from fastlt.errors import MissingExtra, UserError
from fastlt.models.classifier import Classifier, build_model
from fastlt.models.heads import section
from fastlt.models.weights import copies, load_weights, write_tensors
from fastlt.utils.files import whole_file

# `module:function` that gives a model the architecture of its method; by name, as it stands above.
METHODS = "fastlt.methods:built"
# of logits between torch and onnxruntime, relative to their largest magnitude
MAX_DIFFERENCE = 1e-3


def targets_only(model: Classifier, num_targets: int) -> dict[str, Tensor]:
    """Return the tensors, on the CPU, of the model with a head of the targets alone."""
    return copies(model.predicting(num_targets).state_dict())


def export_safetensors(
    model: Classifier,
    config: Config,
    target_names: list[str],
    path: Path,
    prior: list[float] | None = None,
) -> None:
    """Write the weights, and as metadata all that is needed to build the model again.

    The metadata are under one key, for their order would be random. prior (T,): the shares of the
    classes that the model answers to; None: not known.
    """
    head = {"head": model.head.exported_as, "scale_alone": False}
    description = {
        "model": {**config.model.model_dump(mode="json"), **head},
        "data": config.data.model_dump(mode="json", include={"size", "eval_resize", "mean", "std"}),
        "method": config.method.model_dump(mode="json"),
        "classes": target_names,
        **({} if prior is None else {"prior": prior}),
    }
    with whole_file(path) as temporary:
        tensors = targets_only(model, len(target_names))
        write_tensors(temporary, tensors, {"fastlt": json.dumps(description)})


def read_metadata(path: Path) -> dict[str, Any]:
    """Return what a model of fastlt says of itself. UserError where it is none."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read the model {path}: {error}") from error
    if "fastlt" not in metadata:
        raise UserError(f"{path} was not written by fastlt: it lacks the description of its model")
    return json.loads(metadata["fastlt"])


def find_metadata(path: Path) -> dict[str, Any] | None:
    """Return what `read_metadata` does; None where there is no such file, or it is of others."""
    try:
        return read_metadata(path)
    except UserError:
        return None


def load_exported(path: Path) -> tuple[Classifier, list[str]]:
    """Return the model in evaluation mode on the CPU, and the names of its classes."""
    metadata = read_metadata(path)
    start = {"pretrained": False, "weights": "", "head_weights": ""}
    config = section().model_validate({**metadata["model"], **start})
    model = build_model(config, len(metadata["classes"]), metadata["data"]["size"])
    model = resolve_name(METHODS)(metadata.get("method", {"name": "plain"}), model)
    load_weights(path, model)
    return model.eval(), metadata["classes"]


class FromPixels(nn.Module):
    """A model of pixels (N, H, W, 3) uint8, so that nobody has to know mean and deviation.

    It gives logits (N, T) float32.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: list[float], std: list[float]):
        super().__init__()
        self.model = model
        self.register_buffer("mean", 255 * torch.tensor(mean))
        self.register_buffer("std", 255 * torch.tensor(std))

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the logits (N, T) of pixels (N, H, W, 3) uint8."""
        return self.model(((pixels.float() - self.mean) / self.std).permute(0, 3, 1, 2))


def export_onnx(source: Path, path: Path) -> float:
    """Write RUN/model.safetensors as ONNX with a free batch size, checked in onnxruntime.

    Returns the largest difference of logits relative to their magnitude. Raises UserError where
    torch and onnxruntime disagree.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch's exporter imports it when called
    except ImportError as error:
        raise MissingExtra(
            "ONNX export needs onnx, onnxscript and onnxruntime: pip install 'fastlt[onnx]'"
        ) from error
    model, _ = load_exported(source)
    data = read_metadata(source)["data"]
    whole = FromPixels(model, data["mean"], data["std"]).eval()
    pixels = torch.randint(
        0,
        256,
        (5, data["size"], data["size"], 3),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(0),
    )
    with whole_file(path) as temporary:
        write_onnx(whole, pixels[:2], temporary)
        session = onnxruntime.InferenceSession(
            temporary.read_bytes(), providers=["CPUExecutionProvider"]
        )
        with torch.inference_mode():
            expected = whole(pixels)
        try:
            got = torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])
        except Exception as error:  # onnxruntime's are of many types, and below Exception alone
            raise UserError(
                f"onnxruntime does not run the ONNX model, so it was not kept: {error}"
            ) from error
        difference = float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
        if difference > MAX_DIFFERENCE or not torch.equal(got.argmax(1), expected.argmax(1)):
            raise UserError(
                "the ONNX model gives other logits than torch (relative difference "
                f"{difference:.1e}), so it was not kept"
            )
    return difference


def write_onnx(model: nn.Module, example: Tensor, path: Path) -> None:
    """Write a model to ONNX with a free batch size."""
    batch = torch.export.Dim("batch", min=1)
    with warnings.catch_warnings():  # of torch about itself
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.onnx.export(
            model,
            (example,),
            input_names=["pixels"],
            output_names=["logits"],
            dynamic_shapes={"pixels": {0: batch}},
            dynamo=True,
            verbose=False,
        )
    if program is None:
        raise UserError("torch could not export this model to ONNX")
    program.save(str(path), include_initializers=True, external_data=False)


def export_run(run: Path, to: Path) -> str:
    """`fastlt export`: by the ending of `to`. Returns a sentence about what was checked."""
    if to.is_dir():
        raise UserError(f"{to} is a folder: name a file that ends in .safetensors or .onnx")
    source = run / "model.safetensors"
    metadata = read_metadata(source)
    if to.suffix == ".onnx":
        difference = export_onnx(source, to)
        return (
            f"{len(metadata['classes'])} classes; onnxruntime predicts as torch does (logits "
            f"within {difference:.1e}, relative)"
        )
    if to.suffix == ".safetensors":
        with whole_file(to) as temporary:
            temporary.write_bytes(source.read_bytes())
        return f"{len(metadata['classes'])} classes, targets only"
    raise UserError(f"cannot export to '{to.name}': the name must end in .safetensors or .onnx")
