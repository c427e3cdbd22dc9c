"""Depthwise convolutions whose weights' gradient is our own on a CPU."""

import copy

import pytest
import torch
from helpers.method_cases import need_timm
from torch import nn

from fastlt.models.classifier import build_model
from fastlt.models.depthwise import DepthwiseConvolution, is_slow, quicken, weight_gradient
from fastlt.models.heads import section


@pytest.mark.parametrize("seed", range(12))
def test_gradients_are_those_of_torch(seed):
    draw = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=draw))

    kernel, stride = (number(1, 7), number(1, 7)), (number(1, 3), number(1, 3))
    padding = (number(0, kernel[0]), number(0, kernel[1]))
    sides = [max(1, k - 2 * p) + number(0, 5) for k, p in zip(kernel, padding, strict=True)]
    x = torch.randn(3, 5, *sides, generator=draw, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 1, *kernel, generator=draw, dtype=torch.float64, requires_grad=True)
    expected = nn.functional.conv2d(x, weight, None, stride, padding, groups=5)
    found = DepthwiseConvolution.apply(x, weight, stride, padding)
    assert torch.equal(found, expected)
    gradient = torch.randn(expected.shape, generator=draw, dtype=torch.float64)
    wanted = torch.autograd.grad(expected, (x, weight), gradient)
    torch.testing.assert_close(torch.autograd.grad(found, (x, weight), gradient), wanted)
    torch.testing.assert_close(
        weight_gradient(gradient, x.detach(), weight.detach(), stride, padding), wanted[1]
    )


@pytest.mark.parametrize("size", [32, 64])
def test_a_whole_model_has_the_same_gradients(size):
    need_timm()
    torch.manual_seed(0)
    plain = build_model(section()(name="tf_efficientnet_lite0"), 5, size).train()
    plain = plain.to(memory_format=torch.channels_last)
    quickened = copy.deepcopy(plain)
    quicken(quickened)
    assert quickened.state_dict().keys() == plain.state_dict().keys()
    images = torch.randn(8, 3, size, size)
    slow = []
    for module in quickened.modules():
        if type(module).__name__.startswith("Quick"):
            module.register_forward_pre_hook(
                lambda layer, given: slow.append(is_slow(layer, given[0]))
            )
    for model in (plain, quickened):
        model(images).square().sum().backward()
    assert any(slow) and not all(slow)
    for (name, one), other in zip(plain.named_parameters(), quickened.parameters(), strict=True):
        torch.testing.assert_close(other.grad, one.grad, rtol=1e-3, atol=1e-4, msg=name)
    plain.eval(), quickened.eval()
    with torch.no_grad():
        assert torch.equal(plain(images), quickened(images))


def test_others_stay_as_they_are():
    layers = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, groups=4, bias=True),
        nn.Conv2d(4, 4, 3, groups=4, dilation=2, bias=False),
        nn.Conv2d(4, 4, 3, groups=4, bias=False, padding_mode="reflect", padding=1),
        nn.Conv2d(4, 4, 3, groups=4, bias=False),
    )
    quicken(layers)
    assert [type(layer).__name__ for layer in layers] == [*["Conv2d"] * 4, "QuickConv2d"]
    x = torch.randn(1, 4, 4, 4)
    assert is_slow(layers[4], x) and not is_slow(layers[4], torch.randn(1, 4, 9, 9))
    layers[4].weight.requires_grad_(False)
    assert not is_slow(layers[4], x)
