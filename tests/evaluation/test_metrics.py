import numpy as np
import pytest

from fastlt.classes import ClassSpace
from fastlt.evaluation.metrics import (
    Predictions,
    calibration_error,
    confusions,
    harmonic_mean,
    score,
)

SPACE = ClassSpace(target_names=["a", "b", "c"], train_counts=[200, 50, 30], val_counts=[2, 2, 0])


def predictions(label, predicted, confidence=None):
    n = len(label)
    confidence = np.full(n, 0.5) if confidence is None else np.asarray(confidence)
    return Predictions(
        np.arange(n),
        np.asarray(label, np.int32),
        np.asarray(predicted, np.int32),
        confidence.astype(np.float32),
    )


def test_figures_of_a_case_worked_by_hand():
    result = score(predictions([0, 0, 1, 1], [0, 0, 1, 0]), SPACE)
    assert result["top1"] == 75
    assert (result["many"], result["medium"], result["few"]) == (100, 50, None)
    assert result["per_class"] == [100, 50, None]
    assert result["balanced_accuracy"] == 75
    assert result["worst_class"] == {"name": "b", "accuracy": 50}
    assert result["harmonic_mean"] == pytest.approx(200 / 3, abs=1e-3)
    assert result["groups"]["few"] == {"classes": 0, "accuracy": None}


def test_confusions_are_sparse_and_sorted():
    assert confusions(predictions([0, 0, 0, 1], [1, 1, 2, 1])) == [[0, 1, 2], [0, 2, 1]]


def test_calibration_error_against_its_definition():
    rng = np.random.default_rng(0)
    confidence, right = rng.random(5000), rng.random(5000) < 0.7
    expected = 0.0
    for low in np.arange(15) / 15:
        chosen = (confidence > low) & (confidence <= low + 1 / 15)
        if chosen.any():
            expected += chosen.mean() * abs(confidence[chosen].mean() - right[chosen].mean())
    assert calibration_error(confidence, right) == pytest.approx(expected, rel=1e-9)


def test_calibration_of_a_calibrated_and_of_an_overconfident_model():
    rng = np.random.default_rng(1)
    confidence = rng.random(200_000)
    assert calibration_error(confidence, rng.random(200_000) < confidence) < 0.01
    assert calibration_error(np.ones(10), np.zeros(10, bool)) == 1


def test_the_harmonic_mean_of_a_lost_class_is_zero():
    assert harmonic_mean(np.array([1.0, 0.0])) == 0
    assert harmonic_mean(np.array([0.5, 1.0])) == pytest.approx(2 / 3)
