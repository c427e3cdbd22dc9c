"""Features of images by a backbone, of length 1, and what is done with them: prototypes, and pairs that are nearly the same.

The matrices of similarities are never held: they are made block by block, on the device that makes the features.
"""

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
from fastlt.data.augment import Geometry
from fastlt.data.batch import normalise
from fastlt.data.loader import Loader
from fastlt.data.packed import Split
from fastlt.data.plan import evaluation_batches
from fastlt.errors import UserError
from fastlt.export import find_metadata, load_exported
from fastlt.model import build_model, weights_file
from fastlt.prepare import best_precision, find_device

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


def open_backbone(settings: FilterConfig) -> Backbone:
    """Raises UserError where there are no weights: features of random ones say nothing."""
    device = find_device(settings.device)
    if settings.weights and (told := _exported(settings.weights)) is not None:
        path, size, mean, std = told
        model, _ = load_exported(path)
        return Backbone(model.backbone.eval().to(device), size, mean, std, device, settings.weights)
    config = ModelConfig(name=settings.backbone, pretrained=True, weights=settings.weights)
    model = build_model(config, 1, settings.size)
    return Backbone(model.backbone.eval().to(device), settings.size, settings.mean, settings.std, device, settings.backbone)


def _exported(place: str) -> tuple[Path, int, Sequence[float], Sequence[float]] | None:
    """What the model of a run says of itself; None for other files."""
    path = weights_file(place)
    if not path.is_file():
        raise UserError(f"there is no file {path} with weights: see filter.weights")
    told = find_metadata(path)
    return (path, told["data"]["size"], told["data"]["mean"], told["data"]["std"]) if told else None


@torch.inference_mode()
def extract(backbone: Backbone, split: Split, batch: int, workers: int, advance: Callable[[int], None]) -> np.ndarray:
    """(n, D) float16 of length 1, in the order of the split."""
    geometry = Geometry("centre-crop", backbone.size, resize=backbone.size)
    is_half = backbone.device.type == "cuda" and best_precision(backbone.device) == "bf16"
    parts: list[np.ndarray] = []
    with closing(Loader(split, backbone.size, workers=workers, strict=False, device=backbone.device)) as loader:
        for made, images in loader.iterate(evaluation_batches(split, geometry, batch)):
            pixels = normalise(images.to(backbone.device), backbone.mean, backbone.std, channels_last=True)
            with torch.autocast(backbone.device.type, torch.bfloat16, enabled=is_half):
                features = backbone.model(pixels)
            parts.append(F.normalize(features.float(), dim=1).half().cpu().numpy())
            advance(len(made.images))
    return np.concatenate(parts)


def robust_mean(features: np.ndarray) -> np.ndarray:
    """(n, D) to (D,) of length 1: the mean of those nearest to it, half of them, found in a few rounds from the mean of all. What
    does not belong, up to nearly half of a class, does not move it far."""
    vectors = features.astype(np.float32)
    centre = unit(vectors.mean(axis=0))
    kept = max(1, round(CORE * len(vectors)))
    for _ in range(ROUNDS):
        nearest = np.argsort(-(vectors @ centre), kind="stable")[:kept]
        centre = unit(vectors[nearest].mean(axis=0))
    return centre


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / max(float(np.linalg.norm(vector)), 1e-12)


def near_pairs(
    queries: np.ndarray, known: np.ndarray, threshold: float, device: torch.device, earlier: bool = False
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs (P, 2) of indices (query, known) whose cosine is at least the threshold, and the cosines (P,), a block of queries at a
    time. The threshold is above 0. earlier: known is queries, and only pairs with an earlier one are wanted."""
    for start in range(0, len(queries), ROWS):
        rows = on(queries[start : start + ROWS], device)
        pairs, cosines = [], []
        for column in range(0, start + len(rows) if earlier else len(known), COLUMNS):
            similar = rows @ on(known[column : column + COLUMNS], device).T
            if earlier:
                similar = similar.tril(start - column - 1) if column + similar.shape[1] > start else similar
            found = (similar >= threshold).nonzero()
            cosines.append(similar[found[:, 0], found[:, 1]].cpu().numpy())
            pairs.append((found + found.new_tensor([start, column])).cpu().numpy())
        if pairs:
            yield np.concatenate(pairs), np.concatenate(cosines)


def on(features: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(features)).to(device).float()
