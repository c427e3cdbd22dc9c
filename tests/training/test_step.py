"""An optimiser step: as torch's own, but for gradients not finite and float16's scale."""

import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from fastlt.config import OptimConfig
from fastlt.models.backbones import CifarResNet
from fastlt.models.classifier import Classifier
from fastlt.models.heads import LinearHead
from fastlt.training.optim import build_optimizer
from fastlt.training.step import FIRST_SCALE, GROWS_AFTER, Updater


def small_model() -> Classifier:
    torch.manual_seed(0)
    return Classifier(CifarResNet(8), LinearHead(64, 4)).to(memory_format=torch.channels_last)


def loss_of(model: nn.Module, seed: int) -> torch.Tensor:
    return (
        model(torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed)))
        .square()
        .mean()
    )


@pytest.mark.parametrize("scales", [False, True])
@pytest.mark.parametrize("clip", [0.0, 0.05])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_finite_steps_are_those_of_the_plain_optimiser(name, clip, scales):
    ours, theirs = small_model(), small_model()
    config = OptimConfig(name=name, lr=0.05, clip=clip)
    updater, optimizer = (
        Updater(build_optimizer(config, ours, 8), clip, scales),
        build_optimizer(config, theirs, 8),
    )
    for seed in range(4):
        (loss_of(ours, seed) * updater.scale).backward()
        norm = updater.step()
        loss_of(theirs, seed).backward()
        wanted = clip_grad_norm_(theirs.parameters(), clip or torch.inf)
        optimizer.step()
        optimizer.zero_grad()
        torch.testing.assert_close(norm, wanted, rtol=1e-4, atol=0)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        # Adam divides by tiny roots
        torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-5 if name == "sgd" else 3e-3)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("first", [True, False])
def test_a_gradient_that_is_not_finite_changes_nothing(name, value, first):
    model = small_model()
    updater = Updater(build_optimizer(OptimConfig(name=name), model, 8), 1.0, False)
    if not first:
        loss_of(model, 0).backward()
        updater.step()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    loss_of(model, 1).backward()
    next(model.parameters()).grad[0, 0, 0, 0] = value
    assert not updater.step().isfinite()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    loss_of(model, 2).backward()
    assert updater.step().isfinite()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_the_scale_falls_at_an_overflow_and_rises_again():
    parameter = nn.Parameter(torch.zeros(3))
    updater = Updater(torch.optim.SGD([parameter], 0.1, fused=True), 0.0, True)

    def step(value: float) -> float:
        parameter.grad = torch.full((3,), value)
        updater.step()
        return updater.scale.item()

    assert step(torch.inf) == FIRST_SCALE / 2
    scales = [step(1.0) for _ in range(GROWS_AFTER)]
    assert scales[-2:] == [FIRST_SCALE / 2, FIRST_SCALE] and set(scales[:-1]) == {FIRST_SCALE / 2}
    again = Updater(torch.optim.SGD([parameter], 0.1, fused=True), 0.0, True)
    again.load({**updater.state(), "good_steps": GROWS_AFTER - 1})
    parameter.grad = torch.ones(3)
    again.step()
    assert again.scale == 2 * FIRST_SCALE
