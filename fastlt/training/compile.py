"""Model and loss as one module: what DistributedDataParallel and torch.compile are given."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastlt.losses import Criterion, Step
from fastlt.models.classifier import Classifier
from fastlt.training.distributed import Ranks
from fastlt_kernels import ClassParallelLinear


class Forward(nn.Module):
    def __init__(self, model: Classifier, criterion: Criterion) -> None:
        super().__init__()
        self.model, self.criterion = model, criterion

    def forward(
        self,
        images: Tensor,
        target: Tensor,
        target_b: Tensor | None = None,
        mix: Tensor | None = None,
    ) -> Step:
        """images (N, 3, H, W), target and target_b (N,), mix () or (N,), of this rank."""
        return self.criterion.step(self.model, images, target, target_b, mix)


class CompiledForBatch:
    """A module compiled for batches of one length.

    Others, such as the last of an epoch, go through it as it is: to compile it for them as well
    would take longer than they do.
    """

    def __init__(self, module: nn.Module, mode: str, batch: int) -> None:
        self.module, self.compiled, self.batch = module, torch.compile(module, mode=mode), batch
        self.no_sync = getattr(module, "no_sync", nullcontext)

    def __call__(self, images: Tensor, *labels: Tensor | None) -> Step:
        return (self.compiled if len(images) == self.batch else self.module)(images, *labels)


def build_forward(
    model: Classifier, criterion: Criterion, ranks: Ranks, mode: str | None, batch: int
) -> Callable[..., Step]:
    """`forward(images, target, target_b, mix)`; with several ranks the gradients become those of
    the mean over ranks.

    mode: of torch.compile; None: not compiled. batch: images of a rank's usual batch.
    """
    forward: nn.Module = Forward(model, criterion)
    trains_anything = any(
        p.requires_grad
        for name, p in forward.named_parameters()
        if not _is_whole_already(model, name)
    )
    if ranks.world > 1 and trains_anything:
        own = [name for name, _ in forward.named_parameters() if _is_whole_already(model, name)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(forward, own)
        device = next(model.parameters()).device
        forward = DistributedDataParallel(
            forward, device_ids=[device] if device.type == "cuda" else None
        )
    return CompiledForBatch(forward, mode, batch) if mode else forward


def _is_whole_already(model: Classifier, name: str) -> bool:
    """Whether a parameter belongs to a head of which each rank has its own classes."""
    return isinstance(model.head, ClassParallelLinear) and name.startswith("model.head.")
