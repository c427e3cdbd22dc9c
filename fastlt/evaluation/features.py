"""The features of images by a backbone, of length 1."""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from fastlt.config import ModelConfig
from fastlt.data.geometry import Geometry
from fastlt.data.loader import Loader
from fastlt.data.plan import evaluation_batches
from fastlt.errors import UserError
from fastlt.evaluation.feature_settings import FeatureSettings
from fastlt.evaluation.forward import output_of
from fastlt.models.classifier import build_model
from fastlt.models.device import best_precision, find_device
from fastlt.models.export import find_metadata, load_exported
from fastlt.models.weight_files import weights_file
from fastlt.packing.reader import Split
from fastlt.utils.files import sha256_of


class Backbone(NamedTuple):
    """A model without its head, on its device, and how its images are prepared."""

    model: nn.Module  # (N, 3, size, size) to (N, D)
    size: int
    mean: Sequence[float]
    std: Sequence[float]
    device: torch.device
    name: str
    digest: str = ""  # of the weights, where they are in a file

    @property
    def key(self) -> str:
        """A digest of what the features depend on: weights, size and normalisation."""
        parts = [self.digest or self.name, self.size, *self.mean, *self.std]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def open_backbone(settings: FeatureSettings) -> Backbone:
    """Return the backbone that the settings name.

    Raises UserError where there are no weights: features of random ones say nothing.
    """
    device = find_device(settings.device)
    if settings.weights and (found := _exported(settings.weights)) is not None:
        path, size, mean, std = found
        model, _ = load_exported(path)
        return Backbone(
            model.backbone.eval().to(device),
            size,
            mean,
            std,
            device,
            settings.weights,
            sha256_of(path),
        )
    config = ModelConfig(name=settings.backbone, pretrained=True, weights=settings.weights)
    try:
        model = build_model(config, 1, settings.size)
    except UserError as error:
        raise UserError(
            str(error)
            .replace("model.weights", "filter.weights")
            .replace("model.name", "filter.backbone")
        ) from error
    digest = sha256_of(weights_file(settings.weights)) if settings.weights else ""
    return Backbone(
        model.backbone.eval().to(device),
        settings.size,
        settings.mean,
        settings.std,
        device,
        settings.backbone,
        digest,
    )


def _exported(place: str) -> tuple[Path, int, Sequence[float], Sequence[float]] | None:
    """Return the weights of a run with size, mean and std of its images; None for other files."""
    path = weights_file(place)
    if not path.is_file():
        raise UserError(
            f"there is no file {path} with weights: name a RUN, or a safetensors file of the "
            "backbone"
        )
    metadata = find_metadata(path)
    if not metadata:
        return None
    return path, metadata["data"]["size"], metadata["data"]["mean"], metadata["data"]["std"]


@torch.inference_mode()
def extract(
    backbone: Backbone, split: Split, batch: int, workers: int, advance: Callable[[int], None]
) -> np.ndarray:
    """Return the features of a split in its order, (n, D) float16 of length 1.

    `advance` is called after each batch with the number of its images.
    """
    geometry = Geometry("centre-crop", backbone.size, resize=backbone.size)
    is_half = backbone.device.type == "cuda" and best_precision(backbone.device) == "bf16"
    dtype = torch.bfloat16 if is_half else torch.float32
    parts: list[np.ndarray] = []
    with closing(
        Loader(split, backbone.size, workers=workers, strict=False, device=backbone.device)
    ) as loader:
        for made, images in loader.iterate(evaluation_batches(split, geometry, batch)):
            features = output_of(
                backbone.model, images, backbone.mean, backbone.std, backbone.device, dtype
            )
            parts.append(F.normalize(features.float(), dim=1).half().cpu().numpy())
            advance(len(made.images))
    return np.concatenate(parts)
