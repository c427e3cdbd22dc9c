"""Model and loss as one module: what DistributedDataParallel and torch.compile are given."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastlt.distributed import Ranks
from fastlt.losses import Criterion, Step
from fastlt.model import Classifier
from fastlt_kernels import ClassParallelLinear


class Forward(nn.Module):
    def __init__(self, model: Classifier, criterion: Criterion) -> None:
        super().__init__()
        self.model, self.criterion = model, criterion

    def forward(self, images: Tensor, target: Tensor, target_b: Tensor | None = None, mix: Tensor | None = None) -> Step:
        """images (N, 3, H, W), target and target_b (N,), mix () or (N,), of this rank."""
        return self.criterion.step(self.model, images, target, target_b, mix)


def build_forward(model: Classifier, criterion: Criterion, ranks: Ranks, mode: str | None) -> Callable[..., Step]:
    """`forward(images, target, target_b, mix)`; with several ranks the gradients become those of the mean over ranks.

    mode: of torch.compile; None: not compiled.
    """
    forward: nn.Module = Forward(model, criterion)
    trains_anything = any(p.requires_grad for name, p in forward.named_parameters() if not _is_whole_already(model, name))
    if ranks.world > 1 and trains_anything:
        own = [name for name, _ in forward.named_parameters() if _is_whole_already(model, name)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(forward, own)
        device = next(model.parameters()).device
        forward = DistributedDataParallel(forward, device_ids=[device] if device.type == "cuda" else None)
    return torch.compile(forward, mode=mode) if mode else forward


def _is_whole_already(model: Classifier, name: str) -> bool:
    """Whether a parameter belongs to a head of which each rank has its own classes."""
    return isinstance(model.head, ClassParallelLinear) and name.startswith("model.head.")
