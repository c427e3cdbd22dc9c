"""Row weights: against PyTorch's own class weights, and at their edges.

Random cases of every backend carry weights as well: see `random_case`.
"""

import itertools

import pytest
import torch
from helpers.loss_cases import (
    MIXES,
    assert_near,
    loss_and_gradients,
    make_case,
    make_weights,
    reference_of_linear,
)
from torch.nn import functional as F

from fastlt_kernels import (
    linear_neighbor_silencing_loss,
    logits_loss,
    neighbor_silencing_loss,
    reference_loss,
)

in_the_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU, Triton does not take CPU tensors"
)
WAYS = ["plain", "blocks", pytest.param("triton", marks=in_the_interpreter)]
every_way = pytest.mark.parametrize("way", WAYS)
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


@pytest.fixture
def of_logits(way, monkeypatch):
    """The loss of logits by a way, which is also the dtype that it takes."""
    monkeypatch.setattr(logits_loss, "FUSE_FROM_LOGITS", 2**62 if way == "plain" else 0)
    dtype = torch.float32 if way == "triton" else torch.float64

    def loss(case, logits=None, **options):
        logits = case.logits(dtype) if logits is None else logits
        backend = "triton" if way == "triton" else "auto"
        options = {**case.options, **options, "backend": backend}
        loss = neighbor_silencing_loss(logits, case.target, **options)
        return loss_and_gradients(loss, [logits])

    return loss


def of_features(case, **options):
    inputs = case.inputs(torch.float64)
    features, weight, bias = inputs
    loss = linear_neighbor_silencing_loss(
        features, weight, case.target, bias=bias, **{**case.options, **options}
    )
    return loss_and_gradients(loss, inputs)


@every_reduction
def test_the_reference_has_torchs_class_weights(reduction):
    case = make_case(9, 4, 12, 3, log_prior=None, graph=None)
    case.target[2] = -100
    of_class = torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = of_class[case.target.clamp(min=0)]
    logits, other = case.logits(torch.float64), case.logits(torch.float64)
    got = reference_loss(logits, case.target, row_weight=weights, reduction=reduction)
    wanted = F.cross_entropy(other, case.target, weight=of_class, reduction=reduction)
    assert_near(loss_and_gradients(got, [logits]), loss_and_gradients(wanted, [other]))


@pytest.mark.parametrize(
    ("way", "label_smoothing"),
    [
        *itertools.product(["plain", "blocks"], [0.0, 0.1]),
        pytest.param("triton", 0.1, marks=in_the_interpreter),
    ],
)
@every_reduction
@pytest.mark.parametrize("mix", MIXES)
def test_logits_are_the_reference(way, reduction, mix, label_smoothing, of_logits):
    case = make_case(6, 5, 207, 4, mix=mix, label_smoothing=label_smoothing)
    case.options |= {"row_weight": make_weights(6), "reduction": reduction}
    exact = case.logits(torch.float64)
    wanted = loss_and_gradients(reference_loss(exact, case.target, **case.options), [exact])
    assert_near(of_logits(case), wanted, 1e-5 if way == "triton" else 1e-10)


@every_reduction
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("chunk_bytes", [5_000, 2**29])
def test_linear_is_the_reference(reduction, mix, chunk_bytes):
    case = make_case(11, 5, 207, 4, mix=mix, label_smoothing=0.1)
    case.options |= {"row_weight": make_weights(11), "reduction": reduction}
    inputs = case.inputs(torch.float64)
    wanted = loss_and_gradients(reference_of_linear(case, inputs), inputs)
    assert_near(of_features(case, chunk_bytes=chunk_bytes), wanted)


@every_way
@every_reduction
def test_ones_are_the_bits_of_no_weights(way, reduction, of_logits):
    case = make_case(5, 5, 207, 4, mix="rows", label_smoothing=0.1)
    plain = of_logits(case, reduction=reduction)
    weighted = of_logits(case, reduction=reduction, row_weight=torch.ones(5))
    assert all(torch.equal(a, b) for a, b in zip(plain, weighted, strict=True))


@every_way
@every_reduction
def test_a_row_of_weight_zero_has_no_say(way, reduction, of_logits):
    """Not even where its logits are infinite."""
    case = make_case(6, 5, 40, 4, label_smoothing=0.1)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5, 0.0, 1.0])
    case.options |= {"row_weight": weights, "reduction": reduction}
    logits = case.logits(torch.float32 if way == "triton" else torch.float64)
    spoilt = logits.detach().clone()
    spoilt[1, 3], spoilt[4] = torch.inf, -torch.inf
    wanted, got = of_logits(case, logits), of_logits(case, spoilt.requires_grad_())
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other)
    assert got[1][1].abs().max() == got[1][4].abs().max() == 0


@every_way
def test_where_all_weights_are_zero_the_mean_is_zero(way, of_logits):
    loss, gradient = of_logits(make_case(6, 5, 40, 4), row_weight=torch.zeros(6))
    assert loss == 0
    assert gradient.abs().max() == 0


def test_where_all_weights_are_zero_the_linear_mean_is_zero():
    loss, *gradients = of_features(make_case(6, 5, 40, 4), row_weight=torch.zeros(6))
    assert loss == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@every_reduction
def test_half_precision_is_near_the_reference(reduction, dtype):
    case = make_case(16, 20, 500, 8, mix="rows")
    case.options |= {"row_weight": make_weights(16), "reduction": reduction}
    logits = case.logits(dtype)
    exact = logits.detach().double().requires_grad_()
    got = loss_and_gradients(neighbor_silencing_loss(logits, case.target, **case.options), [logits])
    wanted = loss_and_gradients(reference_loss(exact, case.target, **case.options), [exact])
    assert got[0].dtype == torch.float32
    assert_near(got[:1], wanted[:1], 1e-5)
    assert_near(got[1:], wanted[1:], 8 * torch.finfo(dtype).eps)


@every_reduction
def test_gradcheck(reduction):
    case = make_case(4, 4, 9, 2, mix="rows", label_smoothing=0.1)
    case.options |= {"row_weight": make_weights(4), "reduction": reduction}
    assert torch.autograd.gradcheck(
        lambda z: neighbor_silencing_loss(z, case.target, **case.options),
        [case.logits(torch.float64)],
    )
    assert torch.autograd.gradcheck(
        lambda f, w, b: linear_neighbor_silencing_loss(f, w, case.target, bias=b, **case.options),
        case.inputs(torch.float64),
    )


@every_way
def test_weights_get_no_gradient(way, of_logits):
    weights = torch.ones(6, requires_grad=True)
    of_logits(make_case(6, 5, 40, 4), row_weight=weights)
    assert weights.grad is None
    logits = make_case(6, 5, 40, 4).logits(torch.float64).detach()
    assert not neighbor_silencing_loss(
        logits, torch.zeros(6, dtype=torch.long), row_weight=weights
    ).requires_grad


def test_compiles_whole():
    case = make_case(5, 4, 30, 3, mix="rows", label_smoothing=0.1)

    def loss(logits, weights):
        return neighbor_silencing_loss(logits, case.target, row_weight=weights, **case.options)

    logits, weights = case.logits(torch.float32), make_weights(5).float()
    wanted = loss_and_gradients(loss(logits, weights), [logits])
    compiled = torch.compile(loss, fullgraph=True)(logits, weights)
    assert_near(loss_and_gradients(compiled, [logits]), [t.double() for t in wanted], 1e-5)
