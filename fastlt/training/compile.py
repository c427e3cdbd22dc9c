"""A method as DistributedDataParallel and torch.compile make it."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastlt.losses import Step
from fastlt.methods.method import Base
from fastlt.training.distributed import Ranks


class CompiledForBatch:
    """A module compiled for batches of one length.

    Others, such as the last of an epoch, go through it as it is: to compile it for them as well
    would take longer than they do.
    """

    def __init__(self, module: nn.Module, mode: str, batch: int) -> None:
        self.module, self.compiled, self.batch = module, torch.compile(module, mode=mode), batch
        self.no_sync = getattr(module, "no_sync", nullcontext)

    def __call__(self, images: Tensor, *labels: Tensor | None) -> Step:
        """Return the step of a batch, compiled where it is of the usual length."""
        return (self.compiled if len(images) == self.batch else self.module)(images, *labels)


def build_forward(method: Base, ranks: Ranks, mode: str | None, batch: int) -> Callable[..., Step]:
    """Return `forward(images, target, target_b, mix)`.

    With several ranks the gradients become those of the mean over ranks. mode: of torch.compile;
    None: not compiled. batch: images of a rank's usual batch.
    """
    forward: nn.Module = method
    trains_anything = any(
        parameter.requires_grad
        for name, parameter in method.named_parameters()
        if not _is_whole_already(method, name)
    )
    if ranks.world > 1 and trains_anything:
        own = [name for name, _ in method.named_parameters() if _is_whole_already(method, name)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(method, own)
        device = next(method.parameters()).device
        forward = DistributedDataParallel(
            method, device_ids=[device] if device.type == "cuda" else None
        )
    return CompiledForBatch(forward, mode, batch) if mode else forward


def _is_whole_already(method: Base, name: str) -> bool:
    """Return whether a parameter belongs to a head of which each rank has its own classes."""
    return method.model.head.is_sharded and name.startswith("model.head.")
