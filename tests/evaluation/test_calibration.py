"""Temperatures, thresholds and priors, held to what they are for."""

import json

import numpy as np
import pytest
import torch
from helpers.method_cases import trained
from torch.nn import functional as F

from fastlt.errors import UserError
from fastlt.evaluation.calibration import (
    Calibration,
    best_temperature,
    log_prior_change,
    losses_by_temperature,
    lowest_for,
    read_calibration,
    shares_of,
    with_thresholds,
)
from fastlt.evaluation.evaluate import evaluate_run
from fastlt.evaluation.metrics import Predictions
from fastlt.losses import LOSSES, log_prior


@pytest.mark.parametrize("wanted", [0.5, 1.0, 1.7, 3.0])
def test_the_temperature_is_the_one_that_logits_were_multiplied_by(wanted):
    generator = torch.Generator().manual_seed(0)
    true = 2 * torch.randn(20_000, 5, generator=generator)
    labels = torch.multinomial(true.softmax(dim=1), 1, generator=generator)[:, 0]
    losses = sum(
        losses_by_temperature(part, y)
        for part, y in zip((wanted * true).split(7000), labels.split(7000), strict=True)
    )
    assert best_temperature(losses) == pytest.approx(wanted, rel=0.03)


def test_the_losses_are_cross_entropy_at_each_temperature():
    logits, labels = torch.randn(9, 4), torch.randint(4, (9,))
    losses = losses_by_temperature(logits, labels)
    assert losses.dtype == torch.float64
    at_one = F.cross_entropy(logits, labels, reduction="sum")
    assert float(losses[len(losses) // 2]) == pytest.approx(float(at_one), rel=1e-5)


def test_what_cannot_be_fitted_leaves_logits_as_they_are():
    assert best_temperature(torch.full((33,), torch.nan, dtype=torch.float64)) == 1.0


@pytest.mark.parametrize("seed", range(4))
def test_a_threshold_is_the_lowest_with_the_precision(seed):
    rng = np.random.default_rng(seed)
    confidence = rng.integers(0, 12, 60) / 12
    right = rng.random(60) < 0.3 + 0.6 * confidence
    for precision in (0.3, 0.7, 0.95):
        fitting = [c for c in np.unique(confidence) if right[confidence >= c].mean() >= precision]
        expected = min(fitting) if fitting else None
        assert lowest_for(confidence, right, precision) == expected


def test_thresholds_by_class_are_of_classes_with_enough_predictions():
    predicted = np.repeat([0, 1, 2], [6, 6, 2])
    label = np.where(np.arange(14) < 6, 0, 2)
    confidence = np.linspace(0.99, 0.3, 14)
    found = with_thresholds(
        Calibration(),
        Predictions(np.arange(14), label, predicted, confidence),
        ["a", "b", "c"],
        0.9,
    )
    assert found.by_class == {"a": pytest.approx(confidence[5]), "b": 1.0}
    assert found.threshold == pytest.approx(confidence[5]) and found.precision == 0.9
    assert found.coverage == pytest.approx(6 / 14)
    wrong = Predictions(np.arange(14), label + 1, predicted, confidence)
    with pytest.raises(UserError, match=r"no confidence has a precision of 0\.9"):
        with_thresholds(Calibration(), wrong, ["a", "b", "c"], 0.9)


def test_another_prior_is_bayes_rule():
    trained_on, used = [0.7, 0.2, 0.1], {"b": 1.0, "a": 1.0, "c": 2.0}
    logits = torch.randn(4, 3)
    likelihood = logits.softmax(dim=1) / torch.tensor(trained_on)
    expected = likelihood * torch.tensor([0.25, 0.25, 0.5])
    found = (logits + log_prior_change(trained_on, used, ["a", "b", "c"])).softmax(dim=1)
    torch.testing.assert_close(found, expected / expected.sum(dim=1, keepdim=True))
    for wrong, message in (({"a": 1}, "'b' is missing"), ({**used, "d": 1}, "'d' is none")):
        with pytest.raises(UserError, match=message):
            log_prior_change(trained_on, wrong, ["a", "b", "c"])


def test_a_class_that_cannot_occur_is_never_predicted():
    change = log_prior_change([0.5, 0.5], {"a": 0.0, "b": 1.0}, ["a", "b"])
    assert (torch.tensor([[9.0, 1.0]]) + change).softmax(dim=1).tolist() == [[0, 1]]


def test_losses_say_which_prior_predictions_keep():
    counts = torch.tensor([90.0, 9, 1])

    class Numbers:
        tau, drw_epoch = 0.25, 0

    for name, power in (("ce", 1), ("focal", 1), ("balanced-ce", 0.75), ("class-balanced", 0)):
        assert LOSSES[name].prior_left(Numbers) == power
    shares = torch.tensor(shares_of(counts, 0.75))
    logits = torch.randn(5, 3)  # trained with tau log n added, so without it n ** (1 - tau) is left
    full = (logits + log_prior(counts.long(), 0.25)).softmax(dim=1) / (counts / counts.sum())
    kept = logits.softmax(dim=1) / shares
    ratio = full / kept
    torch.testing.assert_close(ratio, ratio[:, :1].expand(-1, 3))


# --- of a run


@pytest.fixture(scope="module")
def run(small_pack, tmp_path_factory):
    return trained(small_pack, tmp_path_factory.mktemp("calibration") / "run", "plain")


def test_a_run_has_a_temperature_that_evaluation_finds_again(run):
    known = read_calibration(run)
    assert known.images == 9 and known.threshold is None
    (run / "calibration.json").unlink()
    evaluate_run(run)
    assert read_calibration(run).temperature == pytest.approx(known.temperature)


def test_evaluation_stores_thresholds_for_a_precision(run):
    before = read_calibration(run)
    result = evaluate_run(run, precision=0.3)
    known = read_calibration(run)
    assert known.model_dump() == result["calibration"]
    assert known.precision == 0.3 and known.threshold is not None and known.coverage > 0
    assert known.temperature == before.temperature
    with pytest.raises(UserError, match="not chosen on test images"):
        evaluate_run(run, split="test", precision=0.3)


def test_a_damaged_file_is_named(run, tmp_path):
    (tmp_path / "calibration.json").write_text(json.dumps({"temperature": -1}))
    with pytest.raises(UserError, match=r"calibration\.json is damaged"):
        read_calibration(tmp_path)
