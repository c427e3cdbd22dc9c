"""The checks of the class-parallel loss alone: a ValueError on every rank.

One alone would leave the others waiting.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from fastlt_kernels._impl.checks import check_integer, check_number, should_check_values
from fastlt_kernels._impl.shards import Group, gather, length
from fastlt_kernels.graph import ClassGraph


def place_in(group: Group) -> tuple[int, int]:
    """Return rank and world size.

    Raises RuntimeError without a process group, ValueError outside of this one.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            "a class-parallel classifier needs torch.distributed: call init_process_group first"
        )
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("group does not contain this process")
    return rank, dist.get_world_size(group)


def check_shard(weight: Tensor, classes: int, shard: slice, rank: int, world: int) -> None:
    """Raise ValueError where weight has not the rows of this rank's classes."""
    if weight.shape[0] != length(shard):
        raise ValueError(
            f"weight must have {length(shard)} rows, the part of {classes} classes that rank "
            f"{rank} of {world} has, "
            f"got {weight.shape[0]}"
        )


def check_classes(num_classes: int) -> None:
    """Raise ValueError where num_classes is no positive integer."""
    check_integer("num_classes", num_classes)
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")


def check_sampling(
    sample_rate: float,
    generator: torch.Generator | None,
    graph: ClassGraph | None,
    num_predicted: int,
) -> None:
    """Raise ValueError where the sampling of negatives is not possible."""
    check_number("sample_rate", sample_rate)
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"generator must be a torch.Generator, got {type(generator).__name__}")
    if not 0 < sample_rate <= 1:
        raise ValueError(f"sample_rate must be in (0, 1], got {sample_rate}")
    if sample_rate < 1 and graph is None:
        raise ValueError("sample_rate below 1 needs a graph, which says what the targets are")
    if sample_rate < 1 and graph is not None and num_predicted > graph.num_targets:
        raise ValueError(
            f"num_targets must be at most the graph's {graph.num_targets} where auxiliaries are "
            "sampled"
        )


def check_alike(
    features: Tensor,
    target_b: Tensor | None,
    wanted: bool,
    reduction: str,
    error: ValueError | None,
    group: Group,
) -> None:
    """Raise ValueError on every rank where one has a wrong argument, or they differ.

    The ranks would wait for each other for ever. It costs an exchange and a synchronisation, as
    other checks of values do.
    """
    if not should_check_values(features.device):
        return
    shape = features.shape if features.ndim == 2 else (0, 0)
    mine = [
        *shape,
        target_b is not None,
        wanted,
        ("mean", "sum", "none").index(reduction) if error is None else 0,
        error is not None,
    ]
    ranks = gather(torch.tensor(mine, dtype=torch.int64, device=features.device), group).tolist()
    if error is not None:
        return
    wrong = [rank for rank, theirs in enumerate(ranks) if theirs[-1]]
    if wrong:
        raise ValueError(f"rank {wrong[0]} was given a wrong argument, and says which")
    names = (
        "the number of features' rows",
        "the width of features",
        "target_b",
        "whether features need a gradient",
        "reduction",
    )
    for name, values in zip(names, zip(*ranks, strict=True), strict=False):
        if len(set(values)) > 1:
            raise ValueError(
                f"{name} must be the same on every rank, got {[int(v) for v in values]} on ranks "
                f"0..{len(ranks) - 1}"
            )
