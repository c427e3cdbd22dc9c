"""Features of images by a backbone, of length 1, and what is done with them: prototypes, and pairs
that are nearly the same.

The matrices of similarities are never held: they are made block by block, on the device that makes
the features.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlt.config import ModelConfig
from fastlt.curate.settings import FilterConfig
from fastlt.data.augment import normalise
from fastlt.data.geometry import Geometry
from fastlt.data.loader import Loader
from fastlt.data.plan import evaluation_batches
from fastlt.data.prefetch import to_device
from fastlt.errors import UserError
from fastlt.models.classifier import build_model
from fastlt.models.device import best_precision, find_device
from fastlt.models.export import find_metadata, load_exported
from fastlt.models.weights import weights_file
from fastlt.packing.reader import Split
from fastlt.utils.files import sha256_of

ROWS, COLUMNS = 2048, 32768  # of similarities at a time: 256 MB
ROUNDS = 5  # of the robust mean
CORE = 0.5  # share of a class that is trusted


class Backbone(NamedTuple):
    model: nn.Module  # (N, 3, size, size) to (N, D)
    size: int
    mean: Sequence[float]
    std: Sequence[float]
    device: torch.device
    name: str
    digest: str = ""  # of the weights, where they are in a file

    @property
    def key(self) -> str:
        """Of what makes the features what they are."""
        told = [self.digest or self.name, self.size, *self.mean, *self.std]
        return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def open_backbone(settings: FilterConfig) -> Backbone:
    """Raises UserError where there are no weights: features of random ones say nothing."""
    device = find_device(settings.device)
    if settings.weights and (told := _exported(settings.weights)) is not None:
        path, size, mean, std = told
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
    """What the model of a run says of itself; None for other files."""
    path = weights_file(place)
    if not path.is_file():
        raise UserError(
            f"there is no file {path} with weights: name a RUN, or a safetensors file of the "
            "backbone"
        )
    told = find_metadata(path)
    return (path, told["data"]["size"], told["data"]["mean"], told["data"]["std"]) if told else None


@torch.inference_mode()
def extract(
    backbone: Backbone, split: Split, batch: int, workers: int, advance: Callable[[int], None]
) -> np.ndarray:
    """(n, D) float16 of length 1, in the order of the split."""
    geometry = Geometry("centre-crop", backbone.size, resize=backbone.size)
    is_half = backbone.device.type == "cuda" and best_precision(backbone.device) == "bf16"
    parts: list[np.ndarray] = []
    with closing(
        Loader(split, backbone.size, workers=workers, strict=False, device=backbone.device)
    ) as loader:
        for made, images in loader.iterate(evaluation_batches(split, geometry, batch)):
            pixels = normalise(
                to_device(images, backbone.device), backbone.mean, backbone.std, channels_last=True
            )
            with torch.autocast(backbone.device.type, torch.bfloat16, enabled=is_half):
                features = backbone.model(pixels)
            parts.append(F.normalize(features.float(), dim=1).half().cpu().numpy())
            advance(len(made.images))
    return np.concatenate(parts)


def robust_mean(features: np.ndarray) -> np.ndarray:
    """(n, D) to (D,) of length 1: the mean of those nearest to it, half of them, found in a few
    rounds from the mean of all. What does not belong, up to nearly half of a class, does not move
    it far.
    """
    vectors = features.astype(np.float32)
    centre = unit(vectors.mean(axis=0))
    kept = max(1, round(CORE * len(vectors)))
    for _ in range(ROUNDS):
        nearest = np.argsort(-(vectors @ centre), kind="stable")[:kept]
        centre = unit(vectors[nearest].mean(axis=0))
    return centre


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


def nearest(
    queries: np.ndarray, known: np.ndarray, threshold: float, device: torch.device
) -> Iterator[tuple[int, int]]:
    """(query, known) for each query that has one whose cosine to it is at least the threshold: the
    nearest of those.
    """
    for start in range(0, len(queries), ROWS):
        found = _nearest_of(
            on(queries[start : start + ROWS], device),
            known,
            np.arange(len(known)),
            threshold,
            device,
        )
        for row in np.flatnonzero(found >= 0).tolist():
            yield start + row, int(found[row])


def later_copies(
    features: np.ndarray, threshold: float, device: torch.device
) -> Iterator[tuple[int, int]]:
    """(image, earlier) for each image that has an earlier one whose cosine to it is at least the
    threshold, and that is no such copy itself. In memory there are never more than a block's
    similarities, however many are alike.
    """
    is_copy = np.zeros(len(features), bool)
    for start in range(0, len(features), ROWS):
        rows = on(features[start : start + ROWS], device)
        found = _nearest_of(rows, features, np.flatnonzero(~is_copy[:start]), threshold, device)
        among = (rows @ rows.T >= threshold).cpu().numpy()
        for row in np.flatnonzero(found < 0).tolist():
            earlier = np.flatnonzero(among[row, :row] & (found[:row] < 0))
            found[row] = start + earlier[0] if len(earlier) else -1
        is_copy[start : start + len(rows)] = found >= 0
        for row in np.flatnonzero(found >= 0).tolist():
            yield start + row, int(found[row])


def _nearest_of(
    rows: Tensor, known: np.ndarray, usable: np.ndarray, threshold: float, device: torch.device
) -> np.ndarray:
    """(n,) int64: of the usable known ones the nearest to each row, -1 where none reaches the
    threshold.
    """
    best = torch.full((len(rows),), threshold, device=device)
    found = torch.full((len(rows),), -1, dtype=torch.int64, device=device)
    for begin in range(0, len(usable), COLUMNS):
        block = usable[begin : begin + COLUMNS]
        cosine, place = (rows @ on(known[block], device).T).max(dim=1)
        better = (cosine > best) | ((cosine == best) & (found < 0))
        best = torch.where(better, cosine, best)
        found = torch.where(better, torch.from_numpy(block).to(device)[place], found)
    return found.cpu().numpy()


def on(features: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(features)).to(device).float()
