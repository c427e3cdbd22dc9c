"""Optimisers, learning-rate schedules and averaged weights."""

import copy
import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from fastlt.config import OptimConfig, ScheduleConfig
from fastlt.errors import UserError


def build_optimizer(
    config: OptimConfig,
    method: nn.Module,
    batch: int,
    trained: tuple[str, ...] = ("",),
    trainable: Collection[str] | None = None,
) -> Optimizer:
    """Return the optimiser of a method's parameters whose names begin with one of `trained`.

    Each group carries `base_lr`, which the schedule multiplies. batch: images of a step's batch.
    trainable: names of the parameters that do not stand still; None: those that have gradients now.
    """
    scale = batch * config.accumulate / config.lr_base_batch if config.lr_base_batch else 1
    lr = config.lr * scale
    named = {
        id(parameter)
        for name, parameter in method.named_parameters()
        if name.startswith(trained)
        and (parameter.requires_grad if trainable is None else name in trainable)
    }
    groups = parameter_groups(config, method)
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if id(parameter) in named]
    groups = [group for group in groups if group["params"]]
    if config.name == "sgd":
        decay, momentum = config.weight_decay, config.momentum
        optimizer: Optimizer = SGD(
            groups, lr, momentum, weight_decay=decay, nesterov=config.nesterov, fused=True
        )
    else:
        optimizer = AdamW(groups, lr, config.betas, weight_decay=config.weight_decay, fused=True)
    for group in optimizer.param_groups:
        group["base_lr"] = lr * group.get("lr_scale", 1.0)
    return optimizer


def parameter_groups(config: OptimConfig, method: nn.Module) -> list[dict]:
    """Return the parameters of a method, or of a bare Classifier, by their rate and decay.

    SGD decays everything, as the CIFAR and ImageNet-LT protocols do; AdamW spares biases, norms and
    what timm names (position embeddings, class tokens). With layer decay a layer's rate is the
    smaller, the deeper it lies below the head (BEiT, arXiv 2106.08254), and the same are spared.
    """
    if config.backbone_lr != 1:
        return _slower_backbone(config, method)
    backbone: Any = getattr(method, "model", method).backbone
    names = spared_names(backbone)
    spared = {id(parameter) for name, parameter in backbone.named_parameters() if name in names}
    if config.layer_decay < 1:
        below = {id(parameter) for parameter in backbone.parameters()}
        above = [parameter for parameter in method.parameters() if id(parameter) not in below]
        decayed = _decay_groups(above, spared, config.weight_decay)
        return [*_layer_decay_groups(config, backbone), *decayed]
    if config.name == "sgd":
        return [{"params": list(method.parameters())}]
    return _decay_groups(list(method.parameters()), spared, config.weight_decay)


def _slower_backbone(config: OptimConfig, method: nn.Module) -> list[dict]:
    """Return the groups with the backbone's parameters apart, whose rate is a multiple."""
    backbone: Any = getattr(method, "model", method).backbone
    below = {id(parameter) for parameter in backbone.parameters()}
    parts = []
    for group in parameter_groups(config.model_copy(update={"backbone_lr": 1.0}), method):
        for is_below, scale in ((True, config.backbone_lr), (False, 1.0)):
            own = [p for p in group["params"] if (id(p) in below) is is_below]
            rate = scale * group.get("lr_scale", 1.0)
            parts.append({**group, "params": own, "lr_scale": rate})
    return [part for part in parts if part["params"]]


def _decay_groups(
    parameters: list[nn.Parameter], spared: set[int], weight_decay: float
) -> list[dict]:
    decayed = [p for p in parameters if p.ndim > 1 and id(p) not in spared]
    others = [p for p in parameters if p.ndim <= 1 or id(p) in spared]
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def spared_names(backbone: nn.Module) -> set[str]:
    """Return the names of parameters that a timm backbone wants without weight decay."""
    return backbone.no_weight_decay() if hasattr(backbone, "no_weight_decay") else set()  # type: ignore[operator]


def _layer_decay_groups(config: OptimConfig, backbone: nn.Module) -> list[dict]:
    if not hasattr(backbone, "group_matcher"):  # by which timm tells a model's layers
        raise UserError(
            "optim.layer_decay is for timm backbones: set it to 1 for the CIFAR ResNets"
        )
    from timm.optim import param_groups_layer_decay  # present: the backbone came from timm

    spared = tuple(spared_names(backbone))
    groups = param_groups_layer_decay(
        backbone, config.weight_decay, spared, layer_decay=config.layer_decay
    )
    for group in groups:
        # timm gives the topmost layer it sees 1, but here the head lies above it
        group["lr_scale"] *= config.layer_decay
    return groups


def lr_factor(config: ScheduleConfig, epochs: int) -> Callable[[float], float]:
    """Return the schedule: from epochs done, as a float, to the factor on the base rate."""
    shapes = {"cosine": _cosine, "step": _step, "one-cycle": _one_cycle}
    factor = shapes[config.name](config, epochs)

    def scaled(epoch: float) -> float:
        return factor(epoch) * (config.head_only_lr if epoch < config.head_only_epochs else 1.0)

    return scaled


def _cosine(config: ScheduleConfig, epochs: int) -> Callable[[float], float]:
    def factor(epoch: float) -> float:
        if epoch < config.warmup_epochs:
            return epoch / config.warmup_epochs
        progress = (epoch - config.warmup_epochs) / max(1e-9, epochs - config.warmup_epochs)
        return config.final_lr + (1 - config.final_lr) * 0.5 * (
            1 + math.cos(math.pi * min(1.0, progress))
        )

    return factor


def _step(config: ScheduleConfig, epochs: int) -> Callable[[float], float]:
    """Constant within an epoch, warm-up included, as in the published CIFAR-100-LT code."""
    steps = sorted((int(epoch), value) for epoch, value in config.steps.items())

    def factor(epoch: float) -> float:
        whole = math.floor(epoch)
        if whole < config.warmup_epochs:
            return min(1.0, (whole + 1) / config.warmup_epochs)
        return next((value for start, value in reversed(steps) if whole >= start), 1.0)

    return factor


def _one_cycle(config: ScheduleConfig, epochs: int) -> Callable[[float], float]:
    """Up from 1/25 over the first 30 %, down to almost nothing, both as a half cosine (as torch's
    OneCycleLR).
    """

    def factor(epoch: float) -> float:
        peak = 0.3 * epochs
        start, end, progress = (
            (1 / 25, 1.0, epoch / peak)
            if epoch < peak
            else (1.0, 1 / 250_000, (epoch - peak) / (epochs - peak))
        )
        return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor


def set_lr(optimizer: Optimizer, factor: float) -> None:
    """Set the rate of each group to `factor` times its base rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


class Averaged:
    """The exponential moving average of a method's weights and batch-norm statistics.

    The decay warms up as (1 + n) / (10 + n) over the steps n, or the first, random weights would
    linger.
    """

    def __init__(self, method: Any, decay: float):
        self.average = copy.deepcopy(method).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, method: nn.Module, steps: int) -> None:
        """Move the average towards the method as it is.

        steps: optimiser steps so far, from the caller, so that it needs no state of its own and no
        wait for the device.
        """
        weight = 1 - min(self.decay, (1 + steps) / (10 + steps))
        mine, theirs = tensors_of(self.average), tensors_of(method)
        smooth = [i for i, tensor in enumerate(mine) if tensor.is_floating_point()]
        torch._foreach_lerp_(
            [mine[i] for i in smooth], [theirs[i].detach() for i in smooth], weight
        )
        for i in set(range(len(mine))) - set(smooth):
            mine[i].copy_(theirs[i])


def tensors_of(net: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of a module."""
    return [*net.parameters(), *net.buffers()]


@torch.no_grad()
def copy_tensors(source: nn.Module, to: nn.Module) -> None:
    """Give a module the parameters and buffers of another one of its kind."""
    for theirs, mine in zip(tensors_of(source), tensors_of(to), strict=True):
        mine.copy_(theirs)
