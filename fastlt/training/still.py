"""The part of a model that training does not change: left out of checkpoints, which name it by its
digest instead.
"""

import hashlib
from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import nn

from fastlt.config import Config
from fastlt.models.adapt import FULL, still_modules
from fastlt.models.classifier import Classifier


class Still(NamedTuple):
    """What stands still."""

    names: frozenset[str] = frozenset()  # of tensors of the model
    digest: str = ""  # SHA-256 of their values; empty where nothing is left out


NOTHING_STILL = Still()


def still_part(config: Config, model: Classifier, trainable: Collection[str]) -> Still:
    """Return what stands still under `model.adapt`; nothing where the whole model is trained.

    trainable: names of parameters of the model.
    """
    if config.model.adapt == FULL:
        return NOTHING_STILL
    own = {id(parameter) for name, parameter in model.named_parameters() if name in trainable}
    names = {name for name, parameter in model.named_parameters() if id(parameter) not in own}
    if not config.schedule.shift_bn:  # which moves the statistics of what stands still
        names |= still_buffers(model, own, config.model.adapt)
    return Still(frozenset(names), digest_of(model, names))


def still_buffers(model: Classifier, own: set[int], adapt: str) -> set[str]:
    """Return the names of the buffers of modules that stay in evaluation mode."""
    modules = still_modules(model.backbone, own, adapt)
    still = {id(buffer) for module in modules for buffer in module.buffers()}
    return {name for name, buffer in model.named_buffers() if id(buffer) in still}


@torch.no_grad()
def digest_of(model: nn.Module, names: Collection[str]) -> str:
    """Return the SHA-256 of the names and values of tensors, in the order of their names."""
    digest = hashlib.sha256()
    tensors = model.state_dict()
    for name in sorted(names & tensors.keys()):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
