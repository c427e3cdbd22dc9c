"""A classifier trained again on features, against the plain loss that it is to be the least of."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fastlt.__main__ import main
from fastlt.config import load_config
from fastlt.evaluation.evaluate import evaluate_post_hoc
from fastlt.evaluation.posthoc import BLOCK, look
from fastlt.evaluation.retrain import DECAYS, Retrained
from fastlt.models.classifier import Classifier
from fastlt.models.heads import LinearHead
from fastlt.training.loop import train


def clouds(count, classes, width, seed):
    """Features of imbalanced classes around centres of their own, and their log prior."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.geometric(0.4, count).clip(max=classes) - 1])
    centres = rng.normal(size=(classes, width))
    values = centres[labels] + rng.normal(size=(len(labels), width))
    counts = np.bincount(labels, minlength=classes)
    return (
        torch.tensor(20 * values, dtype=torch.float32),
        torch.tensor(labels),
        torch.log(torch.tensor(counts / counts.sum(), dtype=torch.float32)),
    )


@pytest.mark.parametrize("count", [60, BLOCK + 900])
@pytest.mark.parametrize("decay", [1e-3, 1e-1])
def test_it_is_the_minimum_of_balanced_cross_entropy_with_decay(count, decay):
    features, labels, prior = clouds(count, 5, 7, seed=count)
    again = Retrained(features, labels, prior)
    weight, bias = (tensor.double().requires_grad_() for tensor in again.fit(decay))
    scaled = features.double() / features.double().square().mean().sqrt()
    logits = scaled @ weight.T + bias + prior.double()
    loss = F.cross_entropy(logits, labels) + decay / 2 * weight.square().sum()
    gradients = torch.autograd.grad(loss, [weight, bias])
    assert max(gradient.abs().max() for gradient in gradients) < 2e-4
    assert weight.abs().max() > 0.05  # and not where it began


def test_logits_are_without_the_prior_and_more_decay_is_shorter_rows():
    features, labels, prior = clouds(300, 4, 6, seed=1)
    again = Retrained(features, labels, prior)
    net = Classifier(torch.nn.Identity(), LinearHead(6, 4))
    seen = look(net, features, prior)
    weight, bias = again.fit(1e-2)
    expected = (features / features.square().mean().sqrt()) @ weight.T + bias
    torch.testing.assert_close(again.logits(seen, 1e-2), expected)
    lengths = [float(again.fit(decay)[0].norm()) for decay in DECAYS]
    assert lengths == sorted(lengths, reverse=True)


@pytest.fixture(scope="module")
def run(small_pack, tmp_path_factory):
    folder = tmp_path_factory.mktemp("retrain") / "run"
    settings = ["model.name=resnet8", "data.workers=0", "train.epochs=2", "train.threads=1"]
    settings.append(f"data.pack={json.dumps(str(small_pack))}")
    from rich.console import Console

    train(load_config("cifar100-siblings", settings), folder, Console(quiet=True))
    return folder


def test_it_learns_from_training_images_of_targets_and_is_chosen_on_others(run, monkeypatch):
    from fastlt.evaluation import evaluate
    from fastlt.packing.reader import open_pack

    trained = []

    def kept(features, labels, prior, made=evaluate.retraining):
        trained.append((features, labels, prior))
        return made(features, labels, prior)

    monkeypatch.setattr(evaluate, "retraining", kept)
    results = evaluate_post_hoc(run, ["cosine", "retrain"], None, None, 0.34, None)
    assert list(results) == ["as trained", "cosine", "retrain"]
    assert results["retrain"]["strength"] in DECAYS
    assert results["retrain"]["images"] == 6
    (features, labels, prior) = trained[0]
    pack = open_pack(load_config(str(run / "config.toml")).data.pack)
    stored = np.bincount(pack.train.label)[: pack.space.num_targets]
    assert np.bincount(labels.numpy()).tolist() == stored.tolist()
    assert len(features) == stored.sum() < len(pack.train)
    torch.testing.assert_close(prior.exp(), torch.tensor(stored / stored.sum()).float())


def test_the_command_compares_it_with_the_masked_classifier(run, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["fastlt", "eval", str(run), "--post-hoc", "retrain"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    printed = capsys.readouterr().out
    assert "as trained" in printed and "retrain" in printed
