"""Probabilities that mean what they say, and the confidence below which a model is unsure.

Both are found on held-out images, kept in RUN/calibration.json, and go into every export.
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from torch.nn import functional as F

from fastlt.errors import UserError
from fastlt.evaluation.metrics import Predictions
from fastlt.utils.files import write_text

CALIBRATION = "calibration.json"
LOWEST, HIGHEST, STEPS = 0.2, 5.0, 33
FEWEST = 5  # predictions of a class that a threshold of its own is chosen on
Share = Annotated[float, Field(ge=0, le=1)]


class Calibration(BaseModel):
    """What is known of a model's confidence, by images that it was not trained on."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    temperature: Annotated[float, Field(gt=0)] = 1.0
    """What logits are divided by (temperature scaling, arXiv 1706.04599)."""
    images: int = 0
    """Images that it was fitted on."""
    precision: Share | None = None
    """The precision that thresholds were chosen for."""
    threshold: Share | None = None
    """The probability below which a prediction is unsure; None: not chosen."""
    coverage: Share | None = None
    """The share of the images that were above it."""
    by_class: dict[str, Share] = {}
    """The threshold of each class that had enough predictions; others take `threshold`."""


# --- temperature


def temperatures() -> Tensor:
    """Return the temperatures that are tried, (K,) float32, evenly spaced in their logarithm."""
    return torch.linspace(math.log(LOWEST), math.log(HIGHEST), STEPS).exp()


def losses_by_temperature(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the cross entropy at each of `temperatures()`, (K,) float64 on the CPU.

    logits (N, T) of targets, labels (N,) int64. Sums of several batches may be added.
    """
    logits = logits.float()
    sums = [
        F.cross_entropy(logits / temperature, labels, reduction="sum").double()
        for temperature in temperatures().tolist()
    ]
    return torch.stack(sums).cpu()


def best_temperature(losses: Tensor) -> float:
    """Return the temperature of the least cross entropy, by a parabola through the lowest three.

    losses (K,) float64, as of `losses_by_temperature`.
    """
    lowest = int(losses.argmin())
    logs = temperatures().double().log()
    if lowest in (0, len(losses) - 1) or not losses.isfinite().all():
        return float(logs[lowest].exp()) if losses.isfinite().all() else 1.0
    left, middle, right = losses[lowest - 1 : lowest + 2].tolist()
    curvature = left - 2 * middle + right
    shift = 0.5 * (left - right) / curvature if curvature > 0 else 0.0
    return float((logs[lowest] + shift * (logs[1] - logs[0])).exp())


def fitted(losses: list[Tensor], images: int) -> Calibration:
    """Return the calibration by losses (K,) of batches, as of `losses_by_temperature`."""
    temperature = best_temperature(torch.stack(losses).sum(dim=0)) if losses else 1.0
    return Calibration(temperature=temperature, images=images)


# --- thresholds


def with_thresholds(
    calibration: Calibration, predictions: Predictions, names: list[str], precision: float
) -> Calibration:
    """Return the calibration with thresholds for a wanted precision, of all images and by class.

    predictions: with calibrated confidences. Raises UserError where no confidence has the
    precision.
    """
    right = predictions.predicted == predictions.label
    threshold = lowest_for(predictions.confidence, right, precision)
    if threshold is None:
        raise UserError(
            f"no confidence has a precision of {precision:g} on these {len(right):,} images: ask "
            "for less with --precision"
        )
    by_class = {}
    for number, name in enumerate(names):
        own = predictions.predicted == number
        if own.sum() >= FEWEST:
            found = lowest_for(predictions.confidence[own], right[own], precision)
            by_class[name] = 1.0 if found is None else found
    return calibration.model_copy(
        update={
            "precision": precision,
            "threshold": threshold,
            "coverage": float((predictions.confidence >= threshold).mean()),
            "by_class": by_class,
        }
    )


def lowest_for(confidence: np.ndarray, right: np.ndarray, precision: float) -> float | None:
    """Return the lowest confidence at and above which the share of right predictions is wanted.

    confidence (n,) float, right (n,) bool. None where there is none.
    """
    order = np.argsort(-confidence, kind="stable")
    above = np.cumsum(right[order]) / np.arange(1, len(order) + 1)
    values = confidence[order]
    is_end = np.append(values[1:] != values[:-1], True)  # equal confidences go together
    fits = np.flatnonzero((above >= precision) & is_end)
    return None if not len(fits) else float(values[fits[-1]])


# --- files


def read_calibration(run: Path) -> Calibration:
    """Return what is known of a RUN's confidence; nothing is where it has not been fitted."""
    path = run / CALIBRATION
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return Calibration()
    return parsed(text, str(path))


def parsed(text: str, where: str) -> Calibration:
    """Return a calibration from JSON. UserError that names where it is from if it is damaged."""
    try:
        return Calibration.model_validate_json(text)
    except ValidationError as error:
        wrong = error.errors()[0]
        raise UserError(
            f"{where} is damaged ({wrong['msg']}): remove it, and `fastlt eval RUN` makes it anew"
        ) from error


def write_calibration(run: Path, calibration: Calibration) -> None:
    """Write RUN/calibration.json."""
    write_text(run / CALIBRATION, json.dumps(calibration.model_dump(), indent=1) + "\n")


# --- priors


def log_prior_change(trained: list[float], wanted: dict[str, float], names: list[str]) -> Tensor:
    """Return what is added to logits (N, T) so that they are of other shares of classes, (T,).

    trained (T,): the shares that the model answers to; wanted: share by name. Raises UserError
    where the names are not those of the classes.
    """
    unknown = [name for name in wanted if name not in names]
    missing = [name for name in names if name not in wanted]
    if unknown or missing:
        first = f"'{unknown[0]}' is none" if unknown else f"'{missing[0]}' is missing"
        raise UserError(f"the prior must name each class of the model once: {first}")
    shares = torch.tensor([wanted[name] for name in names], dtype=torch.float64)
    return ((shares / shares.sum()).log() - torch.tensor(trained).double().log()).float()


def shares_of(counts: Iterable[float], exponent: float) -> list[float]:
    """Return the shares (T,) that a model answers to, trained on these images of each class.

    exponent: 1 of a loss without a prior, 0 of one that balances the classes.
    """
    powers: Any = np.maximum(np.asarray(list(counts), np.float64), 1e-9) ** exponent
    return (powers / powers.sum()).tolist()
