"""Losses for long-tailed recognition with auxiliary classes: neighbour silencing, on logits or straight from features.

neighbor_silencing_loss           from logits
linear_neighbor_silencing_loss    from features and classifier weight, in bounded memory
..._outputs                       the same with the log-sum-exp and the predictions of the same pass
ClassGraph                        which classes silence which
reference_loss                    the specification, in plain dense torch
"""

from fastlt_kernels.graph import ClassGraph
from fastlt_kernels.linear_loss import linear_neighbor_silencing_loss, linear_neighbor_silencing_outputs
from fastlt_kernels.logits_loss import LossOutput, neighbor_silencing_loss, neighbor_silencing_outputs
from fastlt_kernels.reference import reference_loss

__all__ = [
    "ClassGraph",
    "LossOutput",
    "linear_neighbor_silencing_loss",
    "linear_neighbor_silencing_outputs",
    "neighbor_silencing_loss",
    "neighbor_silencing_outputs",
    "reference_loss",
]
