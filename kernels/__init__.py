"""Losses for long-tailed recognition with auxiliary classes and neighbour silencing.

- `neighbor_silencing_loss`: from logits
- `linear_neighbor_silencing_loss`: from features and classifier weight, in bounded memory
- `class_parallel_loss`: the same with the classes sharded over ranks; `ClassParallelLinear` holds
  the shard
- `..._outputs`: the same with the log-sum-exp and the predictions of the same pass
- `ClassGraph`: which classes silence which
- `reference_loss`: the specification, in plain dense torch
"""

from fastlt_kernels._impl.shards import shard_of
from fastlt_kernels.class_parallel import class_parallel_loss, class_parallel_outputs
from fastlt_kernels.class_parallel_linear import ClassParallelLinear
from fastlt_kernels.graph import ClassGraph
from fastlt_kernels.linear_loss import (
    linear_neighbor_silencing_loss,
    linear_neighbor_silencing_outputs,
)
from fastlt_kernels.logits_loss import (
    LossOutput,
    neighbor_silencing_loss,
    neighbor_silencing_outputs,
)
from fastlt_kernels.reference import reference_loss

__all__ = [
    "ClassGraph",
    "ClassParallelLinear",
    "LossOutput",
    "class_parallel_loss",
    "class_parallel_outputs",
    "linear_neighbor_silencing_loss",
    "linear_neighbor_silencing_outputs",
    "neighbor_silencing_loss",
    "neighbor_silencing_outputs",
    "reference_loss",
    "shard_of",
]
