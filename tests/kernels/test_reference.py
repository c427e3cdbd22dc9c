"""The specification against figures worked out by hand, and against PyTorch's own cross entropy."""

import math

import pytest
import torch
from torch.nn import functional as F

from fastlt_kernels import (
    ClassGraph,
    linear_neighbor_silencing_loss,
    neighbor_silencing_loss,
    reference_loss,
)

GRAPH = ClassGraph.from_pairs(2, 4, [(0, 2), (0, 3), (1, 3)])
LOG_PRIOR = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
ZERO = torch.zeros(4, 4, dtype=torch.float64)
EACH = torch.arange(4)


def linear(logits, target, **options):
    """The linear loss of an identity classifier."""
    return linear_neighbor_silencing_loss(
        logits, torch.eye(logits.shape[1], dtype=logits.dtype), target, **options
    )


every_loss = pytest.mark.parametrize("loss", [reference_loss, neighbor_silencing_loss, linear])


@every_loss
@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        # S(0) = {2, 3}, S(1) = {3}, S(2) = {0}, S(3) = {0, 1}: the siblings 2 and 3 do not silence
        # each other.
        ({}, [math.log(2.2), math.log(3.1), math.log(3.1), math.log(2.2)]),
        ({"silence": 0.0}, [math.log(2), math.log(3), math.log(3), math.log(2)]),
        ({"silence": 1.0}, [math.log(4)] * 4),
        (
            {"graph": GRAPH.directed("target_rows")},
            [math.log(2.2), math.log(3.1), math.log(4), math.log(4)],
        ),
        (
            {"log_prior": LOG_PRIOR},
            [
                math.log(0.73 / 0.4),
                math.log(0.91 / 0.3),
                math.log(0.64 / 0.2),
                math.log(0.37 / 0.1),
            ],
        ),
        # Label 0: K = 2 unsilenced classes, 0.9 of the mass on class 0 and 0.1 on class 1; label 1:
        # K = 3; and so on.
        (
            {"log_prior": LOG_PRIOR, "label_smoothing": 0.2, "silence": 0.0},
            [
                math.log(0.7) - 0.9 * math.log(0.4) - 0.1 * math.log(0.3),
                math.log(0.9) - 0.8 * math.log(0.3) - 0.2 / 3 * math.log(0.4 * 0.3 * 0.2),
                math.log(0.6) - 0.8 * math.log(0.2) - 0.2 / 3 * math.log(0.3 * 0.2 * 0.1),
                math.log(0.3) - 0.9 * math.log(0.1) - 0.1 * math.log(0.2),
            ],
        ),
        # Each label with its own silenced set: the loss is linear in the two.
        (
            {"target_b": torch.tensor([1, 0, 3, 3]), "mix": 0.3},
            [
                0.3 * math.log(a) + 0.7 * math.log(b)
                for a, b in [(2.2, 3.1), (3.1, 2.2), (3.1, 2.2), (2.2, 2.2)]
            ],
        ),
    ],
)
def test_worked_out_by_hand(loss, options, wanted):
    got = loss(ZERO, EACH, **{"graph": GRAPH, "reduction": "none", **options})
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64))


@every_loss
def test_gradient_by_hand(loss):
    logits = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        loss(logits, torch.tensor([0]), graph=GRAPH, label_smoothing=0.2), logits
    )
    softmax = torch.tensor([[1, 1, 0.1, 0.1]], dtype=torch.float64) / 2.2
    torch.testing.assert_close(
        gradient, softmax - torch.tensor([[0.9, 0.1, 0, 0]], dtype=torch.float64)
    )


@every_loss
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    "options", [{"graph": GRAPH, "silence": 1.0}, {}, {"graph": ClassGraph.from_pairs(2, 4, [])}]
)
def test_without_silencing_is_cross_entropy(loss, label_smoothing, reduction, options):
    logits = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = loss(
        logits,
        EACH,
        label_smoothing=label_smoothing,
        reduction=reduction,
        log_prior=LOG_PRIOR,
        **options,
    )
    wanted = F.cross_entropy(
        logits + LOG_PRIOR, EACH, label_smoothing=label_smoothing, reduction=reduction
    )
    torch.testing.assert_close(got, wanted)


@every_loss
def test_mixing_is_linear(loss):
    logits = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    other, share = EACH.flip(0), torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    options = {"graph": GRAPH, "label_smoothing": 0.1, "silence": 0.0, "reduction": "none"}
    wanted = share * loss(logits, EACH, **options) + (1 - share) * loss(logits, other, **options)
    torch.testing.assert_close(loss(logits, EACH, target_b=other, mix=share, **options), wanted)
    torch.testing.assert_close(
        loss(logits, EACH, target_b=other, mix=torch.tensor(0.5), **options)[2], wanted[2]
    )


@every_loss
def test_every_class_silenced_by_one_label_or_the_other(loss):
    """With one target and its one auxiliary, mixed, each class is silenced by a label."""
    graph = ClassGraph.from_pairs(1, 2, [(0, 1)])
    logits = torch.tensor([[3.0, -50.0]], dtype=torch.float64, requires_grad=True)
    mixed = {"target_b": torch.tensor([1]), "mix": 0.4, "graph": graph}
    hard = loss(logits, torch.tensor([0]), silence=0.0, **mixed)
    assert hard.item() == 0
    assert torch.autograd.grad(hard, logits)[0].abs().max() == 0
    soft = loss(logits, torch.tensor([0]), silence=0.5, **mixed)
    wanted = 0.4 * math.log1p(0.5 * math.exp(-53)) + 0.6 * (
        math.log(0.5) + 53 + math.log1p(2 * math.exp(-53))
    )
    assert soft.item() == pytest.approx(wanted, rel=1e-12)


@every_loss
def test_a_class_that_never_occurs_may_have_no_prior(loss):
    prior = torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=torch.float64).log()
    logits = torch.randn(
        2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    ).requires_grad_()
    got = loss(logits, torch.tensor([0, 1]), graph=GRAPH, log_prior=prior)
    torch.testing.assert_close(got, F.cross_entropy(logits[:, :2], torch.tensor([0, 1])))
    assert torch.isfinite(torch.autograd.grad(got, logits)[0]).all()


@every_loss
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_rows_have_no_say(loss, reduction):
    logits = torch.randn(
        4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    ).requires_grad_()
    target = torch.tensor([0, -100, 2, -100])
    got = loss(logits, target, reduction=reduction, log_prior=LOG_PRIOR)
    wanted = F.cross_entropy(logits + LOG_PRIOR, target, reduction=reduction)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(got.sum(), logits), torch.autograd.grad(wanted.sum(), logits)
    )


@every_loss
def test_where_all_rows_are_ignored_the_mean_is_zero(loss):
    logits = torch.randn(
        4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4)
    ).requires_grad_()
    prior = torch.tensor([-torch.inf, 0, 0, 0], dtype=torch.float64)
    got = loss(logits, torch.full((4,), -100), graph=GRAPH, log_prior=prior)
    assert got == 0
    assert torch.autograd.grad(got, logits)[0].abs().max() == 0
