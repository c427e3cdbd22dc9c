"""From predictions to figures, in percent but for PDC; a group without images is None."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from fastlt.classes import ClassSpace
from fastlt.utils.groups import Grouping

CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Predictions:
    """The predictions on evaluated images, masked to the targets."""

    image: np.ndarray  # (n,) int64, index into the val split
    label: np.ndarray  # (n,) int32
    predicted: np.ndarray  # (n,) int32
    confidence: np.ndarray  # (n,) float32, softmax over the targets of the predicted class


def concatenate_predictions(parts: list[Predictions]) -> Predictions:
    """Return the predictions of several ranks in the order of the images."""
    if len(parts) == 1:
        return parts[0]
    columns = {
        name: np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])
    }
    order = np.argsort(columns["image"], kind="stable")
    return Predictions(**{name: values[order] for name, values in columns.items()})


def score(
    predictions: Predictions, space: ClassSpace, grouping: Grouping | None = None
) -> dict[str, Any]:
    """The figures of result.json that one evaluation gives."""
    right = predictions.predicted == predictions.label
    per_class = class_accuracies(predictions, space.num_targets)
    groups = {name: _group(per_class, members) for name, members in space.groups(grouping).items()}
    present = per_class[~np.isnan(per_class)]
    worst = int(np.nanargmin(per_class))
    harmonic = harmonic_mean(per_class)
    return {
        "top1": _percent(right.mean()),
        **{name: group["accuracy"] for name, group in groups.items()},
        "balanced_accuracy": _percent(present.mean()),
        "worst_class": {"name": space.target_names[worst], "accuracy": _percent(per_class[worst])},
        "harmonic_mean": None if harmonic is None else _percent(harmonic),
        **calibration(predictions.confidence, right),
        "pdc": distribution_error(predictions, space),
        "per_class": [None if np.isnan(value) else _percent(value) for value in per_class],
        "groups": groups,
    }


def class_accuracies(predictions: Predictions, num_targets: int) -> np.ndarray:
    """Return the recall of each target, (T,) float64; NaN where it has no evaluated image."""
    total = np.bincount(predictions.label, minlength=num_targets)
    right = np.bincount(
        predictions.label[predictions.predicted == predictions.label], minlength=num_targets
    )
    return np.divide(right, total, out=np.full(num_targets, np.nan), where=total > 0)


def harmonic_mean(accuracies: np.ndarray) -> float | None:
    """Return the harmonic mean of accuracies (T,) float.

    It is None where it is not defined: a class is never recognised, or has no image (NaN).
    """
    defined = bool((accuracies > 0).all())
    return float(len(accuracies) / (1 / accuracies).sum()) if defined else None


def calibration(confidence: np.ndarray, right: np.ndarray) -> dict[str, float]:
    """Return the expected and the maximum calibration error (arXiv 1706.04599), in percent.

    confidence (n,) float, right (n,) bool. They are the mean over images and the largest of the
    distances of confidence and accuracy in equally wide bins.
    """
    confidence = np.nan_to_num(confidence)  # of a model that has diverged
    place = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
    count = np.bincount(place, minlength=CALIBRATION_BINS)
    off = confidence - right.astype(np.float64)
    gap = np.abs(np.bincount(place, off, minlength=CALIBRATION_BINS))[count > 0]
    return {
        "ece": _percent(gap.sum() / len(confidence)),
        "mce": _percent((gap / count[count > 0]).max()),
    }


def distribution_error(predictions: Predictions, space: ClassSpace) -> float | None:
    """Return the predictive distribution calibration, PDC, of Xu et al. 2023 (arXiv 2302.14284).

    It is KL(p || q) / KL(p || n) of the shares of the targets in the evaluated images, p, in the
    predictions, q, and in the training images, n, each with 1e-6 for an empty one: 0 where classes
    are predicted as often as they come, 1 where as often as they were trained on. None where they
    were trained on about as often as they come: KL(p || n) is below 0.05 nats, and there is nothing
    to compare with.
    """
    counts = [
        np.bincount(predictions.label, minlength=space.num_targets),
        np.bincount(predictions.predicted, minlength=space.num_targets),
        np.array(space.train_counts[: space.num_targets]),
    ]
    true, predicted, trained = (count / max(1, count.sum()) for count in counts)
    least = divergence(true, trained)
    return round(divergence(true, predicted) / least, 4) if least > 0.05 else None


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """Return KL(p || q) of shares (T,) in nats, with 1e-6 added to each."""
    return float((p * (np.log(p + 1e-6) - np.log(q + 1e-6))).sum())


def confusions(predictions: Predictions) -> list[list[int]]:
    """Return [true, predicted, count] of every confusion that happened, most frequent first."""
    wrong = predictions.predicted != predictions.label
    pairs = np.stack([predictions.label[wrong], predictions.predicted[wrong]], axis=1)
    values, counts = np.unique(pairs, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [
        [int(true), int(predicted), int(count)]
        for (true, predicted), count in zip(values[order], counts[order], strict=True)
    ]


def _group(per_class: np.ndarray, members: list[int]) -> dict[str, Any]:
    """The mean over the group's classes that have evaluated images, as the long-tail papers report
    it.
    """
    values = per_class[members]
    values = values[~np.isnan(values)]
    return {"classes": len(members), "accuracy": _percent(values.mean()) if len(values) else None}


def _percent(share: float) -> float:
    return round(100 * float(share), 4)
