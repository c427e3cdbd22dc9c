"""A classifier sharded over ranks by class; any number of ranks can load its checkpoints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastlt_kernels._impl.class_parallel_checks import check_classes, place_in
from fastlt_kernels._impl.products import is_autocast, logits_of, product_dtype
from fastlt_kernels._impl.shards import Group, gather, length, shard_of
from fastlt_kernels.class_parallel import class_parallel_loss

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

INIT_CLASSES = 1024  # drawn together from one seed, whatever the number of ranks


class ClassParallelLinear(nn.Module):
    """A linear classifier of which each rank of `group` holds some classes, by `shard_of`.

    weight (c, D) and bias (c,) are plain parameters, for any optimiser. Keep the module outside of
    DistributedDataParallel: its gradients are whole already. Initialised as nn.Linear is, uniform
    within 1 / sqrt(in_features), from `seed` alone: the shards are slices of the same matrix for
    any number of ranks.

    In a state_dict both are DTensors, sharded by class, so that torch.distributed.checkpoint saves
    and loads them with any number of ranks; `sharded` does that for an optimiser's buffers.
    load_state_dict also takes whole tensors of all classes. Raises RuntimeError where
    torch.distributed is not initialised.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        bias: bool = True,
        *,
        seed: int = 0,
        group: Group = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_classes(num_classes)
        self.in_features, self.num_classes, self.group = in_features, num_classes, group
        self.shard = shard_of(num_classes, *place_in(group))
        weights, biases = _initial(in_features, num_classes, self.shard, seed)
        self.weight = nn.Parameter(weights.to(device, dtype or torch.get_default_dtype()))
        self.bias = (
            nn.Parameter(biases.to(device, dtype or torch.get_default_dtype())) if bias else None
        )
        self.register_state_dict_post_hook(_shard_state)
        self.register_load_state_dict_pre_hook(_localise_state)

    def loss(self, features: Tensor, target: Tensor, **options: Any) -> Tensor:
        """Return `class_parallel_loss` with its options."""
        return class_parallel_loss(
            features,
            self.weight,
            target,
            num_classes=self.num_classes,
            bias=self.bias,
            group=self.group,
            **options,
        )

    @torch.no_grad()
    def forward(self, features: Tensor) -> Tensor:
        """Return all logits (n, num_classes) of this rank's features (n, D), without gradients.

        Features are as many on every rank; it is for evaluation.
        """
        device = features.device.type
        product = product_dtype(features, is_autocast(features))
        with torch.autocast(device, enabled=False):
            everyones = gather(features.to(product), self.group)  # (world, n, D)
            world, count = everyones.shape[:2]
            size = length(shard_of(self.num_classes, 0, world))  # only the last shards are shorter
            logits = everyones.new_zeros(world * count, size)
            logits_of(
                everyones.flatten(0, 1), self.weight, self.bias, logits[:, : length(self.shard)]
            )
            received = torch.empty_like(logits)
            dist.all_to_all_single(received, logits, group=self.group)
        return (
            received.view(world, count, size)
            .transpose(0, 1)
            .reshape(count, -1)[:, : self.num_classes]
        )

    def sharded(self, local: Tensor) -> DTensor:
        """Return a tensor (c, ...) of this rank's classes as its part of (num_classes, ...).

        It is the same memory.
        """
        from torch.distributed.device_mesh import (
            DeviceMesh,  # too slow to import for those who need none
        )
        from torch.distributed.tensor import DTensor, Shard

        local = local.detach()
        group = self.group or dist.group.WORLD
        assert group is not None
        mesh = DeviceMesh.from_group(group, local.device.type)
        shape = torch.Size([self.num_classes, *local.shape[1:]])
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            local, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
        )


def _shard_state(head: Any, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for name, _ in head.named_parameters(recurse=False):
        state[prefix + name] = head.sharded(state[prefix + name])


def _localise_state(head: Any, state: dict[str, Any], prefix: str, *_unused: Any) -> None:
    from torch.distributed.tensor import DTensor

    for name, parameter in head.named_parameters(recurse=False):
        value = state.get(prefix + name)
        if isinstance(value, DTensor):
            state[prefix + name] = value.to_local()
        elif value is not None and value.shape == (head.num_classes, *parameter.shape[1:]):
            state[prefix + name] = value[head.shard]


def _initial(width: int, classes: int, shard: slice, seed: int) -> tuple[Tensor, Tensor]:
    """Return weight (c, D) and bias (c,) of the shard."""
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(2**62, (-(-classes // INIT_CLASSES),), generator=generator).tolist()
    bound = width**-0.5 if width > 0 else 0.0
    weights, biases = torch.empty(length(shard), width), torch.empty(length(shard))
    for block, block_seed in enumerate(seeds):
        start, stop = block * INIT_CLASSES, min((block + 1) * INIT_CLASSES, classes)
        low, high = max(start, shard.start), min(stop, shard.stop)
        if low >= high:
            continue
        generator.manual_seed(block_seed)
        drawn_weights = torch.empty(stop - start, width).uniform_(
            -bound, bound, generator=generator
        )
        drawn_biases = torch.empty(stop - start).uniform_(-bound, bound, generator=generator)
        inside, outside = (
            slice(low - start, high - start),
            slice(low - shard.start, high - shard.start),
        )
        weights[outside], biases[outside] = drawn_weights[inside], drawn_biases[inside]
    return weights, biases
