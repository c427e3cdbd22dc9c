"""Latent categories, held to their formulas, loop by loop."""

import json
import math

import pytest
import torch
from helpers.method_cases import batch_of, config_of, prepared, trained
from torch.nn import functional as F

from fastlt.errors import UserError
from fastlt.methods.lcreg import (
    LatentClassifier,
    Method,
    augmented_logits,
    latent_features,
    latents_of,
    reconstruction_loss,
)
from fastlt.models.classifier import build_model


@pytest.fixture(params=range(3))
def drawn(request):
    """Random positions (B, P, D) and a bank (N, D), in float64."""
    generator = torch.Generator().manual_seed(request.param)
    b, p, n, d = (int(torch.randint(2, 7, (), generator=generator)) for _ in range(4))
    positions = torch.randn(b, p, d, generator=generator, dtype=torch.float64)
    return positions, torch.randn(n, d, generator=generator, dtype=torch.float64)


@pytest.fixture
def found(drawn):
    """Latents of random positions, in float64."""
    return latents_of(*drawn)


def test_shares_and_what_is_rebuilt_are_their_formulas(found):
    b, p, d = found.positions.shape
    generator = torch.Generator().manual_seed(9)
    bank = torch.randn(4, d, generator=generator, dtype=torch.float64)
    got = latents_of(found.positions, bank)
    for i in range(b):
        for j in range(p):
            products = torch.stack([found.positions[i, j] @ z / math.sqrt(d) for z in bank])
            shares = products.exp() / products.exp().sum()
            torch.testing.assert_close(got.shares[i, j], shares)
            rebuilt = sum(share * z for share, z in zip(shares, bank, strict=True))
            torch.testing.assert_close(got.rebuilt[i, j], rebuilt)


def test_the_reconstruction_is_a_squared_distance_that_features_do_not_feel(found, drawn):
    b, p, _ = found.positions.shape
    total = sum(
        (found.positions[i, j] - found.rebuilt[i, j]).square().sum()
        for i in range(b)
        for j in range(p)
    )
    expected = (total / (b * p)).float()
    for detach in (True, False):
        positions = found.positions.clone().requires_grad_()
        moved = drawn[1].clone().requires_grad_()
        loss = reconstruction_loss(latents_of(positions, moved), moved, detach)
        torch.testing.assert_close(loss, expected)
        loss.backward()
        assert moved.grad.abs().max() > 0 and (positions.grad is None) == detach


def test_features_of_a_latent_are_means_weighted_by_its_shares(found):
    got = latent_features(found)
    for i in range(len(found.positions)):
        for n in range(found.shares.shape[2]):
            weights = found.shares[i, :, n]
            expected = (weights[:, None] * found.positions[i]).sum(dim=0) / weights.sum()
            torch.testing.assert_close(got[i, n], expected.float())


def test_one_latent_rebuilds_the_mean_at_the_minimum():
    positions = torch.randn(5, 6, 4, dtype=torch.float64)
    bank = positions.mean(dim=(0, 1))[None].requires_grad_()
    found = latents_of(positions, bank)
    assert torch.equal(found.shares, torch.ones_like(found.shares))
    reconstruction_loss(found, bank, True).backward()
    assert bank.grad.abs().max() < 1e-6


def random_rows(n=5, d=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64)
    roots = torch.randn(n, d, d, generator=generator, dtype=torch.float64) / 2
    samples = torch.randn(4, n, d, generator=generator, dtype=torch.float64)
    return samples, rows, roots @ roots.transpose(1, 2)


@pytest.mark.parametrize("diagonal", [False, True])
def test_augmented_logits_are_the_closed_form(diagonal):
    samples, rows, covariance = random_rows()
    given = covariance.diagonal(dim1=1, dim2=2) if diagonal else covariance
    got = augmented_logits(samples, rows, given, torch.tensor(0.7))
    for n in range(5):
        full = torch.diag(given[n]) if diagonal else given[n]
        for j in range(5):
            apart = rows[j] - rows[n]
            expected = samples[:, n] @ rows[j] + 0.35 * apart @ full @ apart
            torch.testing.assert_close(got[:, n, j], expected)


def latent_loss_of(logits):
    latent = torch.arange(logits.shape[1]).expand(len(logits), -1)
    return F.cross_entropy(logits.flatten(0, 1), latent.flatten())


def test_without_spread_it_is_plain_cross_entropy():
    samples, rows, covariance = random_rows()
    plain = latent_loss_of(samples @ rows.T)
    for given, strength in ((covariance, 0.0), (torch.zeros_like(covariance), 0.9)):
        got = latent_loss_of(augmented_logits(samples, rows, given, torch.tensor(strength)))
        torch.testing.assert_close(got, plain)


def test_samples_cost_more_than_the_mean_and_less_than_the_closed_form():
    samples, rows, covariance = random_rows(seed=3)
    plain = latent_loss_of(samples @ rows.T)
    closed = latent_loss_of(augmented_logits(samples, rows, covariance, torch.tensor(1.0)))
    torch.manual_seed(0)
    root = torch.linalg.cholesky(covariance + 1e-9 * torch.eye(3))
    noise = torch.randn(4000, 4, 5, 3, dtype=torch.float64)
    moved = samples + torch.einsum("nde,sbne->sbnd", root, noise)
    sampled = latent_loss_of((moved @ rows.T).flatten(0, 1))
    assert plain < sampled < closed


@pytest.fixture
def trainer(small_pack, tmp_path):
    with prepared(small_pack, tmp_path / "run", "lcreg", "method.latents=6") as trainer:
        yield trainer


def test_running_covariances_are_those_of_all_samples(trainer):
    method = trainer.method.double()
    samples = torch.randn(23, 6, 64, dtype=torch.float64)
    for part in samples.split([3, 7, 1, 12]):
        method.observe(part)
    torch.testing.assert_close(method.means, samples.mean(dim=0))
    for n in range(6):
        expected = samples[:, n].T.cov(correction=0)
        torch.testing.assert_close(method.covariance[n], expected)
    method.covariance = torch.zeros(6, 64, dtype=torch.float64)
    method.samples.zero_()
    method.means.zero_()
    for part in samples.split([3, 7, 1, 12]):
        method.observe(part)
    torch.testing.assert_close(method.covariance, samples.var(dim=0, correction=0))


def test_many_features_have_a_diagonal_covariance(trainer, monkeypatch):
    assert trainer.method.covariance.shape == (6, 64, 64)
    monkeypatch.setattr("fastlt.methods.lcreg.FULL_UP_TO", 63)
    config = trainer.config.method
    method = Method(config, trainer.model, trainer.method.task)
    assert method.covariance.shape == (6, 64)


def test_switched_off_it_is_the_configured_loss_to_the_bit(small_pack, tmp_path):
    off = ["method.reconstruction_weight=0", "method.latent_weight=0", "method.sees_latents=false"]
    with (
        prepared(small_pack, tmp_path / "a", "lcreg", *off) as ours,
        prepared(small_pack, tmp_path / "b", "plain") as plain,
    ):
        plain.model.backbone.load_state_dict(ours.model.backbone.state_dict())
        plain.model.head.load_state_dict(ours.model.head.state_dict())
        images, target = batch_of(ours)
        losses = [trainer.method(images, target).loss for trainer in (ours, plain)]
        assert torch.equal(*losses)
        for loss in losses:
            loss.backward()
        for part in ("backbone", "head"):
            pairs = zip(
                getattr(ours.model, part).parameters(),
                getattr(plain.model, part).parameters(),
                strict=True,
            )
            assert all(torch.equal(one.grad, other.grad) for one, other in pairs)


def test_the_loss_is_the_weighted_sum_of_three(trainer):
    method, model = trainer.method, trainer.model
    images, target = batch_of(trainer)
    method.begin(1)
    step = method(images, target)
    logits, found = model.with_latents(images)
    samples = latent_features(found)
    spread = augmented_logits(samples, method.rows, method.covariance, method.strength)
    expected = method.loss(logits, target)
    expected = (
        expected + 0.1 * reconstruction_loss(found, model.bank, True) + 0.1 * latent_loss_of(spread)
    )
    torch.testing.assert_close(step.loss, expected)
    assert method.strength == pytest.approx(0.5 * 1 / 2) and method.samples == 8
    method.begin(0)
    assert method.strength == 0


def test_permuted_latents_leave_logits_and_loss_alone(trainer):
    method, model = trainer.method, trainer.model
    images, target = batch_of(trainer)
    model.eval()
    method.begin(1)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    before, _ = model.with_latents(images), method.observe(torch.randn(9, 6, 64))
    state = {name: value.clone() for name, value in method.state_dict().items()}
    loss = method(images, target).loss
    for name in ("model.bank", "rows", "means", "covariance"):
        state[name] = state[name][order]
    method.load_state_dict(state)
    torch.testing.assert_close(model.with_latents(images)[0], before[0])
    torch.testing.assert_close(method(images, target).loss, loss)


def test_the_entropy_of_usage_is_that_of_the_epoch(trainer):
    method = trainer.method
    method.begin(0)
    first, second = (torch.rand(3, 4, 6).softmax(dim=2) for _ in range(2))
    method.count(first, torch.tensor(3.0))
    method.begin(0)  # as a run that goes on amid the epoch
    method.count(second, torch.tensor(5.0))
    share = torch.cat([first, second]).mean(dim=(0, 1))
    expected = float(-(share * share.log()).sum())
    found = method.metrics()
    assert found["latent_entropy"] == pytest.approx(expected, rel=1e-5)
    assert found["reconstruction"] == 4
    method.begin(1)
    assert method.metrics() == {"latent_entropy": 0, "reconstruction": 0}


def test_the_model_predicts_with_the_rows_of_targets(trainer):
    model, images = trainer.model.eval(), batch_of(trainer)[0]
    part = model.predicting(3)
    assert isinstance(part, LatentClassifier) and part.head.weight.shape == (3, 128)
    torch.testing.assert_close(part(images), model(images)[:, :3])


def test_another_head_is_refused(small_pack):
    config = config_of(small_pack, "lcreg", "model.head=cosine")
    with pytest.raises(UserError, match=r"lcreg has a head of its own: set model.head=linear"):
        Method.build(config.method, build_model(config.model, 5, 16))


def test_a_training_learns_to_rebuild_without_collapse(small_pack, tmp_path):
    settings = ["train.epochs=6", "method.latents=8", "augment.mixup=0.4"]
    run = trained(
        small_pack, tmp_path / "run", "lcreg", *settings, "method.reconstruction_weight=1"
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(line["latent_entropy"] > 0.3 * math.log(8) for line in lines)
    assert lines[-1]["reconstruction"] < 0.7 * lines[0]["reconstruction"]
