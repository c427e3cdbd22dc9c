"""Classifier heads: features (N, D) to logits (N, C), of which rows 0..T-1 are the targets.

A head is a class with the attributes of `Head`, listed in `HEADS` under the name that `model.head`
gives it. A new one needs nothing else: what it shares with others is said by its attributes, and
keys of its own in the section [model] are declared by its class `Numbers`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import cache
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from fastlt.config import Config, ModelConfig, Positive, Section, did_you_mean
from fastlt_kernels import ClassParallelLinear, shard_of


class Head(nn.Module, ABC):
    """The base of all heads. `weight` is (C, D): row j is of class j."""

    Numbers: ClassVar[type[Section]] = Section  # keys of [model] that it adds
    exported_as: ClassVar[str] = "linear"  # the name in HEADS of what `of_targets` returns
    is_linear: ClassVar[bool] = False  # logits are features @ weight.T + bias, and nothing else
    is_sharded: ClassVar[bool] = False  # each rank holds the rows of some classes
    limits_rows: ClassVar[bool] = True  # the length of a row counts, so it can be limited

    weight: Tensor
    bias: Any  # Tensor (C,), or None

    @classmethod
    @abstractmethod
    def build(cls, config: ModelConfig, features: int, classes: int) -> "Head":
        """Return a new head for features (N, D = features) and C = classes."""

    @abstractmethod
    def of_targets(self, targets: int) -> "Head":
        """Return the head that predicts classes 0..T-1, T = targets, as it is exported.

        Where the classes are sharded over ranks, all ranks call it together.
        """

    def exported(self) -> dict[str, Any]:
        """Return the keys of [model] by which what `of_targets` returns is built again."""
        return {"head": self.exported_as}


class LinearHead(Head):
    """A linear head: (N, D) features to (N, C) logits."""

    is_linear = True

    def __init__(self, features: int, classes: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, features))
        self.bias = nn.Parameter(torch.zeros(classes))
        nn.init.kaiming_normal_(self.weight)

    @classmethod
    def build(cls, config: ModelConfig, features: int, classes: int) -> Head:
        """Return a new head; see `Head.build`."""
        return cls(features, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, C) of features (N, D)."""
        return F.linear(x, self.weight, self.bias)

    def of_targets(self, targets: int) -> "LinearHead":
        """Return a linear head with rows 0..T-1."""
        return with_values(
            LinearHead(self.weight.shape[1], targets), self.weight[:targets], self.bias[:targets]
        )


class ScaledHead(LinearHead):
    """A linear head with a learned factor per class: learnable weight scaling (arXiv 1910.09217,
    section 4.3).
    """

    is_linear = False

    class Numbers(Section):
        """The key of the scaled head."""

        scale_alone: bool = False
        """Train the factors of the scaled head and nothing else of it."""

    def __init__(self, features: int, classes: int, scale_alone: bool):
        super().__init__(features, classes)
        self.scale = nn.Parameter(torch.ones(classes))
        for parameter in (self.weight, self.bias):
            parameter.requires_grad_(not scale_alone)

    @classmethod
    def build(cls, config: Any, features: int, classes: int) -> Head:
        """Return a new head; see `Head.build`."""
        return cls(features, classes, config.scale_alone)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, C) of features (N, D)."""
        return self.scale * super().forward(x)

    def of_targets(self, targets: int) -> LinearHead:
        """Return a linear head with rows 0..T-1, into which the factors are multiplied."""
        scale = self.scale[:targets]
        plain = super().of_targets(targets)
        return with_values(plain, plain.weight * scale[:, None], plain.bias * scale)


class CosineHead(Head):
    """A head with (N, C) logits `scale * cos(feature, class weight)` of (N, D) features.

    learnt: whether the scale is a parameter, by its logarithm, so that it stays above 0.
    """

    exported_as = "cosine"
    limits_rows = False

    class Numbers(Section):
        """The keys of the cosine head."""

        head_scale: Positive = 30.0
        """The factor on the cosines of the cosine head, or what it starts from."""
        head_scale_learnt: bool = False
        """Train this factor with the cosine head."""

    def __init__(self, features: int, classes: int, scale: float, learnt: bool = False):
        super().__init__()
        # Of length 1, as in the LDAM code: the length sets how far a step of the optimiser turns a
        # row.
        self.weight = nn.Parameter(
            F.normalize(torch.empty(classes, features).uniform_(-1, 1), dim=1)
        )
        self.bias = None
        self.fixed = scale
        self.log_scale = nn.Parameter(torch.tensor(scale).log()) if learnt else None

    @property
    def scale(self) -> Tensor | float:
        """The factor on the cosines."""
        return self.fixed if self.log_scale is None else self.log_scale.exp()

    def factor(self) -> float:
        """Return the scale as it is, as a number."""
        return self.fixed if self.log_scale is None else self.log_scale.detach().exp().item()

    @classmethod
    def build(cls, config: Any, features: int, classes: int) -> Head:
        """Return a new head; see `Head.build`."""
        return cls(features, classes, config.head_scale, config.head_scale_learnt)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, C) of features (N, D)."""
        return self.scale * F.linear(F.normalize(x, dim=1), F.normalize(self.weight, dim=1))

    def of_targets(self, targets: int) -> "CosineHead":
        """Return a cosine head with rows 0..T-1, whose scale is set."""
        return with_values(
            CosineHead(self.weight.shape[1], targets, self.factor()), self.weight[:targets]
        )

    def exported(self) -> dict[str, Any]:
        """Return the keys of [model]; see `Head.exported`."""
        return {
            "head": self.exported_as,
            "head_scale": self.factor(),
            "head_scale_learnt": False,
        }


class BatchNormHead(LinearHead):
    """A linear head on features (N, D) that batch norm has brought to mean 0 and deviation 1, as
    linear probes of self-supervised models have it (MAE, arXiv 2111.06377, appendix A).
    """

    is_linear = False

    def __init__(self, features: int, classes: int):
        super().__init__(features, classes)
        self.norm = nn.BatchNorm1d(features, eps=1e-6, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, C) of features (N, D)."""
        return super().forward(self.norm(x))

    def of_targets(self, targets: int) -> LinearHead:
        """Return a linear head with rows 0..T-1, into which the norm is folded."""
        plain = super().of_targets(targets)
        norm: Any = self.norm
        weight = plain.weight / (norm.running_var + norm.eps).sqrt()
        return with_values(plain, weight, plain.bias - weight @ norm.running_mean)


class ClassParallelHead(ClassParallelLinear, Head):  # type: ignore[misc]
    """A linear head of which each rank holds the rows of some classes."""

    is_sharded = True

    @classmethod
    def build(cls, config: ModelConfig, features: int, classes: int) -> Head:
        """Return a new head; see `Head.build`. Needs a process group."""
        return cls(features, classes, seed=int(torch.randint(2**31, ())))

    @torch.no_grad()
    def of_targets(self, targets: int) -> LinearHead:
        """Return a linear head with rows 0..T-1 on every rank; all ranks call it together."""
        head = LinearHead(self.in_features, targets)
        return with_values(head, *(self._gathered(part, targets) for part in self.parameters()))

    def _gathered(self, part: Tensor, targets: int) -> Tensor:
        """Return rows 0..T-1 of a parameter of which this rank holds some."""
        world, rows = dist.get_world_size(self.group), []
        for rank in range(world):
            shard = shard_of(self.num_classes, rank, world)
            count = max(0, min(shard.stop, targets) - shard.start)
            sent = part.new_zeros(count, *part.shape[1:])
            if rank == dist.get_rank(self.group):
                sent.copy_(part[:count])
            if count:
                dist.broadcast(sent, rank, group=self.group)
            rows.append(sent)
        return torch.cat(rows)


HEADS: dict[str, type[Head]] = {
    "linear": LinearHead,
    "cosine": CosineHead,
    "batch-norm": BatchNormHead,
    "scaled": ScaledHead,
    "class-parallel": ClassParallelHead,
}


@torch.no_grad()
def with_values(head: Any, *values: Tensor) -> Any:
    """Return the head with these values for its parameters, in their order, on their device."""
    for parameter, value in zip(head.parameters(), values, strict=True):
        parameter.data = value.detach().clone()
    return head


@cache
def section(method: str = "plain") -> type[ModelConfig]:
    """Return the class of the section [model]: with the keys of every head."""
    numbers = dict.fromkeys(head.Numbers for head in HEADS.values() if head.Numbers is not Section)
    doc = {"__doc__": ModelConfig.__doc__, "__module__": __name__}
    return type("ModelConfig", (*numbers, ModelConfig), doc)


def misfits(config: Config) -> Iterator[tuple[bool, str]]:
    """Yield whether settings of [model] contradict each other, and what to do about it."""
    model: Any = config.model
    head = HEADS.get(model.head)
    names = ", ".join(HEADS)
    yield (
        head is None,
        f"there is no head '{model.head}'{did_you_mean(model.head, list(HEADS))}: "
        f"model.head is one of {names}",
    )
    yield (
        model.scale_alone and model.head != "scaled",
        "model.scale_alone is for model.head=scaled: set it to false",
    )
    yield (
        model.head_scale_learnt and model.head != "cosine",
        "model.head_scale_learnt is for model.head=cosine: set it to false",
    )
    yield (
        config.optim.max_norm < 1
        and head is not None
        and (head.is_sharded or not head.limits_rows),
        f"optim.max_norm is for linear heads, not for model.head={model.head}: set it to 1",
    )
