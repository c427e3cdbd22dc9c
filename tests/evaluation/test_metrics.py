import numpy as np
import pytest

from fastlt.classes import ClassSpace
from fastlt.evaluation.metrics import (
    Predictions,
    calibration,
    confusions,
    distribution_error,
    harmonic_mean,
    score,
)
from fastlt.utils.groups import Grouping

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
    assert result["harmonic_mean"] is None  # c has no image
    assert result["groups"]["few"] == {"classes": 0, "accuracy": None}


def test_confusions_are_sparse_and_sorted():
    assert confusions(predictions([0, 0, 0, 1], [1, 1, 2, 1])) == [[0, 1, 2], [0, 2, 1]]


def test_calibration_errors_against_their_definitions():
    rng = np.random.default_rng(0)
    confidence, right = rng.random(5000), rng.random(5000) < 0.7
    gaps = []
    for low in np.arange(15) / 15:
        chosen = (confidence > low) & (confidence <= low + 1 / 15)
        if chosen.any():
            gap = abs(confidence[chosen].mean() - right[chosen].mean())
            gaps.append((chosen.mean(), gap))
    found = calibration(confidence, right)
    assert found["ece"] == pytest.approx(100 * sum(share * gap for share, gap in gaps), abs=1e-4)
    assert found["mce"] == pytest.approx(100 * max(gap for _, gap in gaps), abs=1e-4)


def test_calibration_of_a_calibrated_and_of_an_overconfident_model():
    rng = np.random.default_rng(1)
    confidence = rng.random(200_000)
    assert calibration(confidence, rng.random(200_000) < confidence)["mce"] < 2
    assert calibration(np.ones(10), np.zeros(10, bool)) == {"ece": 100, "mce": 100}


def test_the_predictive_distribution_beside_that_of_training():
    label = np.repeat([0, 1, 2], 280)
    as_trained = np.repeat([0, 1, 2], [600, 150, 90])  # 200 : 50 : 30
    assert distribution_error(predictions(label, label), SPACE) == 0
    assert distribution_error(predictions(label, as_trained), SPACE) == pytest.approx(1, abs=1e-3)
    # the mean over classes of log(p / q), over that of log(p / n)
    half = np.repeat([0, 1, 2], [420, 210, 210])
    expected = (
        np.log((1 / 3) / (np.array([420, 210, 210]) / 840)).mean()
        / np.log((1 / 3) / (np.array([200, 50, 30]) / 280)).mean()
    )
    assert distribution_error(predictions(label, half), SPACE) == pytest.approx(expected, abs=1e-3)
    all_first = distribution_error(predictions(label, label * 0), SPACE)
    assert all_first > 5  # classes that are never predicted cost log(1e6)


def test_a_balanced_training_set_gives_no_predictive_distribution():
    for counts in ([50, 50], [50, 40]):
        even = ClassSpace(target_names=["a", "b"], train_counts=counts, val_counts=[2, 2])
        assert distribution_error(predictions([0, 0, 1, 1], [0, 0, 0, 1]), even) is None


def test_the_harmonic_mean_is_given_only_where_it_is_defined():
    assert harmonic_mean(np.array([1.0, 0.0])) is None
    assert harmonic_mean(np.array([1.0, np.nan])) is None
    assert harmonic_mean(np.array([0.5, 1.0])) == pytest.approx(2 / 3)


def test_groups_are_those_of_the_given_rule():
    found = predictions([0, 0, 1, 1], [0, 0, 1, 0])
    thirds = score(found, SPACE, Grouping("thirds"))
    assert (thirds["many"], thirds["medium"], thirds["few"]) == (100, 50, None)
    moved = score(found, SPACE, Grouping(many_images=10**6, few_images=10**6))
    assert (moved["many"], moved["medium"], moved["few"]) == (None, None, 75)
    assert moved["groups"]["many"] == {"classes": 0, "accuracy": None}
