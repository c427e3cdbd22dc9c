"""Exported models: targets only. The auxiliary rows of the classifier are physically gone."""

import json
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastlt.config import Config
from fastlt.decode.deep import Scale, limits_of
from fastlt.errors import UserError
from fastlt.models.adapt import FULL, stays
from fastlt.models.classifier import Classifier, build_model
from fastlt.models.heads import section
from fastlt.models.weights import copies, load_weights, write_tensors
from fastlt.utils.files import whole_file

# `module:function` that gives a model the architecture of its method; by name, as it stands above.
METHODS = "fastlt.methods:built"


def targets_only(model: Classifier, num_targets: int) -> dict[str, Tensor]:
    """Return the tensors, on the CPU, of the model with a head of the targets alone."""
    return copies(model.predicting(num_targets).state_dict())


def export_safetensors(
    model: Classifier,
    config: Config,
    target_names: list[str],
    path: Path,
    prior: list[float] | None = None,
    scale: Scale | None = None,
) -> None:
    """Write the weights, and as metadata all that is needed to build the model again.

    The metadata are under one key, for their order would be random. prior (T,): the shares of the
    classes that the model answers to; None: not known. scale: of images of more than eight bits.
    """
    head = {**model.head.exported(), "scale_alone": False}
    adapt = config.model.adapt if stays(config.model.adapt) else FULL
    description: dict[str, Any] = {
        "model": {**config.model.model_dump(mode="json"), **head, "adapt": adapt},
        "data": config.data.model_dump(mode="json", include={"size", "eval_resize", "mean", "std"}),
        "method": config.method.model_dump(mode="json"),
        "classes": target_names,
    }
    if prior is not None:
        description["prior"] = prior
    if scale:
        description["scale"] = limits_of(scale)
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
    load_weights(path, model, metadata.get("classifier", ""))
    return model.eval(), metadata["classes"]
