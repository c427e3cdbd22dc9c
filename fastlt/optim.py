"""Optimisers, learning-rate schedules and averaged weights."""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fastlt.config import OptimConfig, ScheduleConfig
from fastlt.errors import UserError
from fastlt.model import CifarResNet, Classifier


def build_optimizer(config: OptimConfig, model: Classifier, batch: int) -> Optimizer:
    """Each group carries `base_lr`; the schedule multiplies it."""
    lr = config.lr * batch / config.lr_base_batch if config.lr_base_batch else config.lr
    groups = parameter_groups(config, model)
    if config.name == "sgd":
        optimizer: Optimizer = SGD(groups, lr, config.momentum, weight_decay=config.weight_decay, nesterov=config.nesterov)
    else:
        optimizer = AdamW(groups, lr, config.betas, weight_decay=config.weight_decay, fused=next(model.parameters()).is_cuda)
    for group in optimizer.param_groups:
        group["base_lr"] = lr * group.get("lr_scale", 1.0)
    return optimizer


def parameter_groups(config: OptimConfig, model: Classifier) -> list[dict]:
    """SGD decays everything, as the CIFAR and ImageNet-LT protocols do; AdamW spares biases and norms; with layer decay, the
    deeper a layer lies below the head, the smaller its rate (BEiT, arXiv 2106.08254)."""
    if config.layer_decay < 1:
        return [*_layer_decay_groups(config, model.backbone), *_decay_groups(model.head, config.weight_decay)]
    if config.name == "sgd":
        return [{"params": list(model.parameters())}]
    return _decay_groups(model, config.weight_decay)


def _decay_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    matrices = [p for p in module.parameters() if p.ndim > 1]
    vectors = [p for p in module.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _layer_decay_groups(config: OptimConfig, backbone: nn.Module) -> list[dict]:
    if isinstance(backbone, CifarResNet):
        raise UserError("optim.layer_decay is for timm backbones: set it to 1 for the CIFAR ResNets")
    from timm.optim import param_groups_layer_decay  # present: the backbone came from timm

    groups = param_groups_layer_decay(backbone, weight_decay=config.weight_decay, layer_decay=config.layer_decay)
    for group in groups:
        group["lr_scale"] *= config.layer_decay  # timm gives the topmost layer it sees 1, but here the head lies above it
    return groups


def lr_factor(config: ScheduleConfig, epochs: int) -> Callable[[float], float]:
    """The schedule: epochs done, as a float, to the factor on the base rate."""
    return {"cosine": _cosine, "step": _step, "one-cycle": _one_cycle}[config.name](config, epochs)


def _cosine(config: ScheduleConfig, epochs: int) -> Callable[[float], float]:
    def factor(epoch: float) -> float:
        if epoch < config.warmup_epochs:
            return epoch / config.warmup_epochs
        progress = (epoch - config.warmup_epochs) / max(1e-9, epochs - config.warmup_epochs)
        return config.final_lr + (1 - config.final_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor


def _step(config: ScheduleConfig, epochs: int) -> Callable[[float], float]:
    """Constant within an epoch, warm-up included, as in the published CIFAR-100-LT code."""
    steps = sorted((int(epoch), value) for epoch, value in config.steps.items())

    def factor(epoch: float) -> float:
        whole = math.floor(epoch)
        if whole < config.warmup_epochs:
            return (whole + 1) / config.warmup_epochs
        return next((value for start, value in reversed(steps) if whole >= start), 1.0)

    return factor


def _one_cycle(config: ScheduleConfig, epochs: int) -> Callable[[float], float]:
    """Up from 1/25 over the first 30 %, down to almost nothing, both as a half cosine (as torch's OneCycleLR)."""

    def factor(epoch: float) -> float:
        peak = 0.3 * epochs
        start, end, progress = (1 / 25, 1.0, epoch / peak) if epoch < peak else (1.0, 1 / 250_000, (epoch - peak) / (epochs - peak))
        return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor


def set_lr(optimizer: Optimizer, factor: float) -> float:
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return optimizer.param_groups[-1]["lr"]  # of the head


def averaged(config: OptimConfig, model: nn.Module) -> AveragedModel | None:
    """Exponential moving average of the weights; the batch-norm statistics are copied."""
    if not config.ema:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(config.ema))


def clip(model: nn.Module, norm: float) -> None:
    if norm:
        torch.nn.utils.clip_grad_norm_(model.parameters(), norm)
