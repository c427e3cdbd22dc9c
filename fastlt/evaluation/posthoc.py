"""What a trained classifier can be made into without training its backbone, and how strongly:
chosen on images that are then not scored.

Each method maps what a head sees of an image to other logits. Strengths of one that may change who
wins are chosen by balanced accuracy; of one that changes confidence alone, by the log-likelihood.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastlt.config import did_you_mean
from fastlt.errors import UserError
from fastlt.evaluation.metrics import Predictions
from fastlt.models.classifier import Classifier

BLOCK = 4096  # images whose logits are held at a time


class Seen(NamedTuple):
    """The images as the head sees them, n of them."""

    logits: Tensor  # (n, T) float32, as trained
    products: Tensor  # (n, T), features times rows of the weight
    values: Tensor  # (n, D), features
    features: Tensor  # (n, 1), lengths of features
    rows: Tensor  # (T,), lengths
    log_prior: Tensor  # (T,)


class Method(NamedTuple):
    """A post-hoc method: its logits, and the strengths that are tried."""

    logits: Callable[[Seen, float], Tensor]  # and the strength
    strengths: np.ndarray
    changes_winner: bool  # with its strength


def tau_norm(seen: Seen, tau: float) -> Tensor:
    """Return logits by rows divided by their length to the power of tau, without bias.

    Kang et al. 2020, arXiv 1910.09217, section 4.2.
    """
    return seen.products / seen.rows**tau


def logit_adjustment(seen: Seen, tau: float) -> Tensor:
    """Return logits less tau times the log of the class's share of the training images.

    Menon et al. 2021, arXiv 2007.07314, eq. 9.
    """
    return seen.logits - tau * seen.log_prior


def cosine(seen: Seen, scale: float) -> Tensor:
    """Return logits by the cosine between feature and row: neither length counts."""
    return scale * seen.products / (seen.features * seen.rows).clamp(min=1e-12)


def angular(seen: Seen, scale: float) -> Tensor:
    """Return logits by the angle between feature and row (Wang and Yan 2022, arXiv 2212.01565).

    The same class wins as with the cosine, with another confidence.
    """
    return -scale * torch.acos(
        (seen.products / (seen.features * seen.rows).clamp(min=1e-12)).clamp(-1, 1)
    )


SCALES = np.geomspace(1, 256, 33)
METHODS = {
    "tau-norm": Method(tau_norm, np.linspace(0, 2, 41), True),
    "logit-adjustment": Method(logit_adjustment, np.linspace(0, 3, 61), True),
    "cosine": Method(cosine, SCALES, False),
    "angular": Method(angular, SCALES, False),
}


RETRAIN = "retrain"  # is made of training images: see retrain.py


class Features(NamedTuple):
    """The features of evaluated images, on the device of the model."""

    image: np.ndarray  # (n,) int64, index into the val split
    label: np.ndarray  # (n,) int64
    values: Tensor  # (n, D) float32

    def take(self, which: np.ndarray) -> "Features":
        """Return the features of some images; which (n,) bool."""
        return Features(
            self.image[which],
            self.label[which],
            self.values[torch.from_numpy(which).to(self.values.device)],
        )


def check_methods(names: list[str], model: Classifier) -> None:
    """Raise UserError for methods that do not exist, or change nothing about the model.

    Also for models that do not predict by rows of a head, which all methods change.
    """
    if not model.predicts_by_head:
        raise UserError(
            "--post-hoc is for models that predict by rows of a head, and this one routes: leave "
            "it out"
        )
    for name in names:
        known = [*METHODS, RETRAIN]
        if name not in known:
            raise UserError(
                f"there is no post-hoc method '{name}'{did_you_mean(name, known)}; "
                f"methods: {', '.join(known)}"
            )
        if not applies(name, model):
            raise UserError(
                f"--post-hoc {name} changes nothing about a cosine head, whose rows all count as "
                "of one length"
            )


def applies(name: str, model: Classifier) -> bool:
    """Return whether a method changes anything about a model."""
    return name != "tau-norm" or model.head.limits_rows


def set_aside(labels: np.ndarray, share: float) -> np.ndarray:
    """Return which of the images (n,) strengths are chosen on, bool.

    They are taken evenly from each class, at least one of those that have two.
    """
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        count = min(len(places) - 1, max(1, round(share * len(places))))
        chosen[places[np.linspace(0, len(places) - 1, count).astype(int)] if count > 0 else []] = (
            True
        )
    return chosen


@torch.inference_mode()
def choose(method: Method, model: Classifier, found: Features, log_prior: Tensor) -> float:
    """The best of the strengths; the smallest of equals."""
    strengths = method.strengths
    label = torch.from_numpy(found.label).to(found.values.device)
    right = torch.zeros(len(strengths), len(log_prior), dtype=torch.float64, device=label.device)
    likelihood = torch.zeros(len(strengths), dtype=torch.float64, device=label.device)
    for start in range(0, len(label), BLOCK):
        seen = look(model, found.values[start : start + BLOCK], log_prior)
        true = label[start : start + BLOCK]
        for i, strength in enumerate(strengths):
            logits = method.logits(seen, float(strength))
            right[i] += torch.bincount(true[logits.argmax(dim=1) == true], minlength=len(log_prior))
            likelihood[i] += logits.log_softmax(dim=1).gather(1, true[:, None]).sum()
    total = torch.bincount(label, minlength=len(log_prior))
    balanced = (right[:, total > 0] / total[total > 0]).mean(dim=1)
    return float(strengths[int((balanced if method.changes_winner else likelihood).argmax())])


@torch.inference_mode()
def apply(
    method: Method | None, strength: float, model: Classifier, found: Features, log_prior: Tensor
) -> Predictions:
    """Return the predictions with a method of a strength; without one, as trained."""
    parts = []
    for start in range(0, len(found.label), BLOCK):
        seen = look(model, found.values[start : start + BLOCK], log_prior)
        logits = seen.logits if method is None else method.logits(seen, strength)
        parts.append([part.cpu().numpy() for part in logits.softmax(dim=1).max(dim=1)])
    confidence, predicted = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Predictions(
        found.image, found.label.astype(np.int32), predicted.astype(np.int32), confidence
    )


@torch.inference_mode()
def look(model: Classifier, features: Tensor, log_prior: Tensor) -> Seen:
    """Return what the head sees of features (n, D)."""
    weight = model.head.weight.float()
    products = features @ weight.T
    return Seen(
        model.head(features).float(),
        products,
        features,
        features.norm(dim=1, keepdim=True),
        weight.norm(dim=1),
        log_prior,
    )
