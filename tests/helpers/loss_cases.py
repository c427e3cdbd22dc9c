"""Problems for the loss tests, made the same way everywhere, and how far a result may be from the
reference.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastlt_kernels import ClassGraph, reference_loss

SHAPES = [  # N, T, C, D: odd sizes, one row, no auxiliaries, many classes
    (1, 5, 23, 3),
    (7, 5, 507, 123),
    (9, 12, 12, 5),
    (13, 100, 1000, 16),
    (6, 1000, 20000, 8),
]
MIXES = [None, "scalar", "rows"]


@dataclass
class Case:
    features: Tensor
    weight: Tensor
    bias: Tensor
    target: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def inputs(self, dtype: torch.dtype) -> list[Tensor]:
        """Fresh leaves: features, weight, bias."""
        return [t.to(dtype).requires_grad_() for t in (self.features, self.weight, self.bias)]

    def logits(self, dtype: torch.dtype) -> Tensor:
        return (self.features @ self.weight.T + self.bias).to(dtype).requires_grad_()


def make_graph(targets: int, classes: int, seed: int = 0) -> ClassGraph:
    """0 to 8 owners for each auxiliary."""
    generator = torch.Generator().manual_seed(seed)
    owners = torch.randint(0, 9, (classes - targets,), generator=generator)
    auxiliary = torch.repeat_interleave(torch.arange(targets, classes), owners)
    target = torch.randint(0, targets, (len(auxiliary),), generator=generator)
    return ClassGraph.from_pairs(targets, classes, torch.stack([target, auxiliary], dim=1))


def make_case(
    rows: int,
    targets: int,
    classes: int,
    width: int,
    *,
    mix: str | None = None,
    seed: int = 0,
    **options: Any,
) -> Case:
    """float64, values that bfloat16 holds exactly; targets and auxiliaries both occur as labels."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).bfloat16().double()

    def labels() -> Tensor:
        of_target = torch.randint(0, targets, (rows,), generator=generator)
        anything = torch.randint(0, classes, (rows,), generator=generator)
        return torch.where(torch.arange(rows) % 2 == 0, of_target, anything)

    options = {
        "graph": make_graph(targets, classes, seed),
        "log_prior": normal(classes).log_softmax(dim=0),
        **options,
    }
    case = Case(
        normal(rows, width) * 2, normal(classes, width) / 2, normal(classes), labels(), options
    )
    if mix is not None:
        share = {"scalar": 0.3, "rows": torch.rand(rows, generator=generator, dtype=torch.float64)}[
            mix
        ]
        case.options |= {"target_b": labels(), "mix": share}
    return case


def random_case(seed: int) -> Case:
    """A case of any shape, with any options; many are odd, some have one row, no auxiliaries or no
    pairs.
    """
    generator = torch.Generator().manual_seed(1000 + seed)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    def one_of(*choices: Any) -> Any:
        return choices[number(0, len(choices))]

    targets = number(1, 60)
    classes = targets + one_of(0, number(1, 400), number(1, 400))
    options = {
        "silence": one_of(0.0, 0.03, 0.1, 1.0),
        "label_smoothing": one_of(0.0, 0.1),
        "mix": one_of(*MIXES),
    }
    case = make_case(
        one_of(1, number(2, 40), number(2, 40)),
        targets,
        classes,
        number(1, 30),
        seed=seed,
        **options,
    )
    graph = case.options["graph"]
    case.options["graph"] = one_of(
        graph,
        graph,
        graph.directed("target_rows"),
        ClassGraph.from_pairs(targets, classes, []),
        None,
    )
    case.options["log_prior"] = one_of(case.options["log_prior"], case.options["log_prior"], None)
    case.options["reduction"] = one_of("mean", "sum", "none")
    if one_of(True, False, False):
        case.target[:: number(1, 4)] = -100
    if one_of(True, False):
        case.options["row_weight"] = make_weights(len(case.target), seed)
    return case


def make_weights(rows: int, seed: int = 0) -> Tensor:
    """Row weights (N,) float64 from 0 to 3; of every third row exactly 0."""
    generator = torch.Generator().manual_seed(2000 + seed)
    weights = 3 * torch.rand(rows, generator=generator, dtype=torch.float64)
    return weights.masked_fill(torch.arange(rows) % 3 == 1, 0)


def loss_and_gradients(loss: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """The loss and its gradients; each row of an unreduced loss counts differently."""
    weights = torch.arange(1, loss.numel() + 1, dtype=loss.dtype).reshape(loss.shape) / loss.numel()
    return [loss.detach(), *torch.autograd.grad((loss * weights).sum(), inputs)]


def relative_error(got: Tensor, wanted: Tensor) -> float:
    """Largest deviation, relative to the largest value wanted."""
    return float((got.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


def assert_near(got: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-10) -> None:
    for g, w in zip(got, wanted, strict=True):
        assert g.shape == w.shape
        assert torch.isfinite(g).all()
        assert relative_error(g, w) <= tolerance


def assert_as_exact_as_eager(got: list[Tensor], eager: list[Tensor], wanted: list[Tensor]) -> None:
    """At most three times the error of eager PyTorch in the same dtype, plus 1e-5."""
    for g, e, w in zip(got, eager, wanted, strict=True):
        assert torch.isfinite(g).all()
        assert relative_error(g, w) <= 3 * relative_error(e, w) + 1e-5


def reference_of_linear(case: Case, inputs: list[Tensor], **options: Any) -> Tensor:
    """Materialised logits in the dtype of the inputs, and the dense formula in at least float32, as
    eager training does.
    """
    features, weight, bias = inputs
    logits = torch.nn.functional.linear(features, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return reference_loss(logits, case.target, **case.options, **options)
