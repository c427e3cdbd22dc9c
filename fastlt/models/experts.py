"""Several experts on one stem: last stages and linear heads of their own, weighed by a gate."""

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastlt.errors import UserError
from fastlt.models.backbones import CifarResNet
from fastlt.models.heads import Head, LinearHead


class Experts(nn.Module):
    """K copies of a backbone's last blocks, whose maps stand one after another in the batch.

    The first is as the blocks were. Parameters of the others are multiplied by draws of N(1,
    spread^2), or all would learn alike.
    """

    def __init__(self, blocks: Any, count: int, spread: float) -> None:
        super().__init__()
        copies = [nn.ModuleList(copy.deepcopy([*blocks])) for _ in range(count)]
        self.copies: Any = nn.ModuleList(copies)
        for parameter in self.copies[1:].parameters():
            parameter.data.mul_(1 + spread * torch.randn_like(parameter))

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        """Return the maps (K * N, ...) of all experts for those of the stem (N, ...)."""
        found = []
        for blocks in self.copies:
            maps = x
            for block in blocks:
                maps = block(maps, **options)
            found.append(maps)
        return torch.cat(found)


def divide(backbone: Any, count: int, spread: float) -> None:
    """Give a backbone K = `count` last stages; its features become (N, K * D), expert by expert.

    Where a backbone has blocks and no stages, they are the last quarter of them.
    """
    names = ("layer4", "stages", "layers", "blocks")
    name = next((name for name in names if hasattr(backbone, name)), None)
    if name is None:
        raise UserError(
            f"experts need a last stage, and {type(backbone).__name__} has none that is known: set "
            "model.name to a CIFAR ResNet, or to a ResNet, ConvNeXt, Swin or ViT of timm"
        )
    parts, start = getattr(backbone, name), 0
    if isinstance(parts[-1], nn.Sequential):
        parts = parts[-1]
    elif name != "layer4":
        share = 3 if isinstance(backbone, CifarResNet) else 4
        start = len(parts) - max(1, len(parts) // share)
    parts[start] = Experts(parts[start:], count, spread)
    del parts[start + 1 :]
    # Others ask a backbone for features as well, and expect a row for each image.
    backbone.register_forward_hook(partial(side_by_side, count))


def side_by_side(count: int, backbone: nn.Module, inputs: Any, features: Tensor) -> Tensor:
    """Return features (K * N, D) as (N, K * D)."""
    return features.unflatten(0, (count, -1)).transpose(0, 1).flatten(1)


class GatedHead(Head):
    """K linear heads and a gate: features (N, K * D) of the experts to logits (N, C).

    weight is (C, K * D), with the rows of all experts side by side, and bias (K * C,).
    """

    def __init__(self, weight: Tensor, bias: Tensor, gate: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = nn.Parameter(bias.detach().clone())
        self.gate = copy.deepcopy(gate)
        self.count = gate.out_features

    @classmethod
    def build(cls, config: Any, features: int, classes: int) -> "GatedHead":
        """Return a new head of K = config.experts; see `Head.build`."""
        return cls.of_head(LinearHead(features, classes), config.experts, config.spread)

    @classmethod
    def of_head(cls, head: Head, count: int, spread: float) -> "GatedHead":
        """Return K = `count` heads that start as a linear one, varied as those of `Experts`."""
        width = head.weight.shape[1]
        rows = head.weight.detach().repeat(1, count)
        rows[:, width:] *= 1 + spread * torch.randn_like(rows[:, width:])
        return cls(rows, head.bias.repeat(count), nn.Linear(count * width, count))

    def each(self, x: Tensor) -> Tensor:
        """Return the logits (N, K, C) of all experts for features (N, K * D)."""
        shape = (self.count, -1)
        z = torch.einsum("nkd,ckd->nkc", x.unflatten(1, shape), self.weight.unflatten(1, shape))
        return z + self.bias.unflatten(0, shape)

    def fused(self, x: Tensor, each: Tensor) -> Tensor:
        """Return sum_k g_k z_k, (N, C) float32, with the gate g = softmax(W_g x)."""
        return (self.gate(x).float().softmax(dim=1)[:, :, None] * each).sum(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, C) of features (N, K * D)."""
        return self.fused(x, self.each(x))

    def of_targets(self, targets: int) -> "GatedHead":
        """Return a head with rows 0..T-1 of every expert."""
        bias = self.bias.unflatten(0, (self.count, -1))[:, :targets].flatten()
        return GatedHead(self.weight[:targets], bias, self.gate)
