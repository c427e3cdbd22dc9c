"""Classifiers of features that stand still, held to plain formulas."""

import json

import numpy as np
import pytest
import torch
from helpers.method_cases import trained
from scipy.optimize import minimize
from torch.nn import functional as F
from typer.testing import CliRunner

from fastlt.cli import app
from fastlt.evaluation.probe import (
    STRENGTHS,
    UNCHOSEN,
    Labelled,
    Probe,
    balanced_accuracy,
    choose_neighbours,
    choose_strength,
    linear_probe,
    nearest_mean,
    nearest_neighbours,
    prototypes,
    set_aside,
    standardised,
    with_one,
)
from fastlt_kernels import ClassGraph, reference_loss


@pytest.fixture
def clouds() -> Labelled:
    """Three classes of 40, 12 and 5 points around centres of their own, in 6 dimensions."""
    random = torch.Generator().manual_seed(1)
    labels = torch.tensor([0] * 40 + [1] * 12 + [2] * 5)
    centres = 2 * torch.randn(3, 6, generator=random)
    return Labelled(centres[labels] + torch.randn(len(labels), 6, generator=random), labels)


def test_means_and_prototypes(clouds):
    queries = torch.randn(9, 6, generator=torch.Generator().manual_seed(2))
    means = torch.stack([clouds.features[clouds.labels == c].mean(0) for c in range(3)])
    wanted = -((queries[:, None] - means[None]) ** 2).sum(-1)
    torch.testing.assert_close(nearest_mean(clouds, queries, 3), wanted, rtol=1e-4, atol=1e-4)
    unit = F.normalize(clouds.features)
    directions = F.normalize(torch.stack([unit[clouds.labels == c].mean(0) for c in range(3)]))
    torch.testing.assert_close(prototypes(clouds, queries, 3), F.normalize(queries) @ directions.T)


def test_neighbours_vote_by_likeness(clouds):
    queries = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))
    found = nearest_neighbours(clouds, queries, 3, 4)
    alike = F.normalize(queries).double() @ F.normalize(clouds.features).double().T
    for query, row in zip(alike, found, strict=True):
        wanted = np.zeros(3)
        for place in query.argsort(descending=True)[:4].tolist():
            wanted[clouds.labels[place]] += np.exp(float(query[place]) / 0.07)
        np.testing.assert_allclose(row.numpy(), wanted, rtol=1e-3)


def test_a_training_image_does_not_vote_for_itself():
    # each point has its twin in the other class: with itself it would always be right
    points = torch.randn(10, 4, generator=torch.Generator().manual_seed(4)).repeat(2, 1)
    twins = Labelled(points, torch.tensor([0] * 10 + [1] * 10))
    assert choose_neighbours(twins, 2) >= 1
    assert balanced_accuracy(nearest_neighbours(twins, points, 2, 1), twins.labels) >= 0.5


@pytest.mark.parametrize("silence", [1.0, 0.1, 0.0])
def test_a_linear_probe_is_at_the_minimum(clouds, silence):
    graph = ClassGraph.from_pairs(2, 3, [(0, 2)]) if silence < 1 else None
    prior = torch.tensor([0.7, 0.2, 0.1]).log()
    probe = Probe(3, prior, graph, silence)
    (features,) = standardised(clouds.features, [])
    found = linear_probe(clouds._replace(features=features), probe, 0.1, torch.zeros(3, 7))

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = torch.tensor(flat.reshape(3, 7), dtype=torch.float64, requires_grad=True)
        logits = with_one(features.double()) @ weights.T
        loss = reference_loss(
            logits, clouds.labels, graph=graph, log_prior=prior.double(), silence=silence
        )
        loss = loss + 0.05 * weights[:, :-1].square().sum()
        loss.backward()
        return float(loss), weights.grad.numpy().ravel()

    best = minimize(objective, np.zeros(21), jac=True, method="BFGS", options={"gtol": 1e-8})
    assert objective(found.double().numpy().ravel())[0] == pytest.approx(best.fun, abs=1e-5)


def test_strengths_are_chosen_on_images_that_the_probe_has_not_seen(clouds):
    aside = set_aside(clouds.labels, 3, 0.2)
    assert [int((clouds.labels[aside] == c).sum()) for c in range(3)] == [8, 2, 1]
    assert choose_strength(clouds, Probe(3), 3) in STRENGTHS
    single = Labelled(torch.eye(3), torch.arange(3))
    assert not set_aside(single.labels, 3, 0.2).any()
    assert choose_strength(single, Probe(3), 3) == UNCHOSEN


def test_standardised_by_the_training_images_alone():
    train, other = torch.randn(50, 3) * 4 + 2, torch.zeros(2, 3)
    seen, held = standardised(train, [other])
    torch.testing.assert_close(seen.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(held, (other - train.mean(0)) / train.std(0))


def test_balanced_accuracy_is_over_classes():
    scores = F.one_hot(torch.tensor([0, 0, 0, 0, 1]), 3).float()
    assert balanced_accuracy(scores, torch.tensor([0, 0, 0, 1, 1])) == pytest.approx(0.75)


# --- the command


def test_the_command_prints_all_and_keeps_features(small_pack, tmp_path):
    run = trained(small_pack, tmp_path / "run", "plain")
    (tmp_path / "out").mkdir()
    command = ["probe", str(small_pack), "--backbone", "resnet8", "--weights", str(run)]
    command += ["--size", "16", "--out", str(tmp_path / "out")]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    found = json.loads((tmp_path / "out/probe.json").read_text())
    names = [row["classifier"].partition(" (")[0] for row in found["rows"]]
    assert names == [
        "nearest class mean",
        "prototypes, cosine",
        "nearest neighbours",
        "linear, cross entropy",
        "linear, balanced softmax",
        "linear, with auxiliaries",
        "linear, silenced 0.1",
    ]
    assert all(0 <= row["top1"] <= 100 for row in found["rows"])
    again = CliRunner().invoke(app, command)
    assert json.loads((tmp_path / "out/probe.json").read_text()) == found
    assert again.exit_code == 0 and "linear, silenced 0.1" in again.output


def test_bad_input_is_one_sentence(small_pack, tmp_path):
    run = trained(small_pack, tmp_path / "run", "plain", "train.epochs=1")
    base = [
        "probe",
        str(small_pack),
        "--backbone",
        "resnet8",
        "--weights",
        str(run),
        "--size",
        "16",
    ]
    no_test = CliRunner().invoke(app, [*base, "--split", "test"])
    assert "has no test images: pack it with --test" in str(no_test.exception)
    np.savez(tmp_path / "text.npz", names=["a"], vectors=np.ones((1, 3), np.float32))
    text = CliRunner().invoke(app, [*base, "--text", str(tmp_path / "text.npz")])
    assert "has no vector of" in str(text.exception)
