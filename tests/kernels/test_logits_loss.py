import pytest
import torch
from helpers.loss_cases import (
    MIXES,
    SHAPES,
    assert_as_exact_as_eager,
    assert_near,
    loss_and_gradients,
    make_case,
    random_case,
)

from fastlt_kernels import (
    ClassGraph,
    linear_neighbor_silencing_loss,
    logits_loss,
    neighbor_silencing_loss,
    reference_loss,
)


@pytest.fixture(autouse=True, params=[2**62, 0], ids=["plain", "blocks"])
def way(request, monkeypatch):
    """Both ways that "auto" has on a CPU."""
    monkeypatch.setattr(logits_loss, "FUSE_FROM_LOGITS", request.param)


def both(case, dtype=torch.float64, **options):
    """Loss and gradient of the reference in float64, and of the tested loss in `dtype`."""
    wanted, logits = case.logits(torch.float64), case.logits(dtype)
    options = {**case.options, **options}
    return (
        loss_and_gradients(reference_loss(wanted, case.target, **options), [wanted]),
        loss_and_gradients(neighbor_silencing_loss(logits, case.target, **options), [logits]),
    )


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("silence", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_reference(shape, silence, label_smoothing, mix):
    wanted, got = both(make_case(*shape, mix=mix, silence=silence, label_smoothing=label_smoothing))
    assert_near(got, wanted)


@pytest.mark.parametrize("seed", range(30))
def test_any_case_is_the_reference(seed):
    wanted, got = both(random_case(seed))
    assert_near(got, wanted)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("direction", ["both", "target_rows", "aux_rows"])
def test_reductions_and_directions(reduction, direction):
    case = make_case(8, 20, 60, 7, mix="rows")
    case.options["graph"] = case.options["graph"].directed(direction)
    wanted, got = both(case, reduction=reduction)
    assert_near(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("silence", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(7, 5, 507, 123), (16, 1000, 5000, 8)])
def test_low_precision(shape, silence, dtype):
    case = make_case(*shape, mix="rows", silence=silence, label_smoothing=0.1, log_prior=None)
    logits = case.logits(dtype)
    exact = logits.detach().double().requires_grad_()
    eager = case.logits(dtype)
    got = loss_and_gradients(neighbor_silencing_loss(logits, case.target, **case.options), [logits])
    assert got[0].dtype == torch.float32
    assert got[1].dtype == dtype
    assert_as_exact_as_eager(
        got,
        loss_and_gradients(reference_loss(eager, case.target, **case.options), [eager]),
        loss_and_gradients(reference_loss(exact, case.target, **case.options), [exact]),
    )


def test_large_logits_stay_finite():
    case = make_case(6, 5, 40, 4, silence=0.0, label_smoothing=0.1)
    logits = (case.logits(torch.float32).detach() * 1e4).requires_grad_()
    loss, gradient = loss_and_gradients(
        neighbor_silencing_loss(logits, case.target, **case.options), [logits]
    )
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()


def test_gradcheck():
    case = make_case(3, 4, 9, 2, mix="rows", label_smoothing=0.1)
    assert torch.autograd.gradcheck(
        lambda z: neighbor_silencing_loss(z, case.target, **case.options),
        [case.logits(torch.float64)],
    )


def test_twice_over_one_graph():
    case = make_case(5, 4, 30, 3)
    logits = case.logits(torch.float64)
    loss = neighbor_silencing_loss(logits, case.target, **case.options)
    loss.backward(retain_graph=True)
    once = logits.grad.clone()
    loss.backward()
    torch.testing.assert_close(logits.grad, 2 * once)


def test_autocast_changes_nothing():
    case = make_case(5, 4, 30, 3)
    logits = case.logits(torch.bfloat16)
    plain = loss_and_gradients(
        neighbor_silencing_loss(logits, case.target, **case.options), [logits]
    )
    with torch.autocast("cpu", torch.bfloat16):
        loss = neighbor_silencing_loss(logits, case.target, **case.options)
    assert loss.dtype == torch.float32
    assert_near(loss_and_gradients(loss, [logits]), [t.double() for t in plain], 0)


def test_compiles_whole_with_the_graph_as_an_argument():
    case = make_case(5, 4, 30, 3, mix="rows", silence=0.0, label_smoothing=0.1)
    graph = case.options.pop("graph")

    def loss(logits, target, graph):
        return neighbor_silencing_loss(logits, target, graph=graph, **case.options)

    logits = case.logits(torch.float32)
    wanted = loss_and_gradients(loss(logits, case.target, graph), [logits])
    compiled = torch.compile(loss, fullgraph=True)(logits, case.target, graph)
    assert_near(loss_and_gradients(compiled, [logits]), [t.double() for t in wanted], 1e-5)


def test_a_number_for_mix_does_not_recompile():
    case = make_case(5, 4, 30, 3, mix="scalar")
    del case.options["mix"]
    logits = case.logits(torch.float32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(mix):
        return neighbor_silencing_loss(logits, case.target, mix=mix, **case.options)

    for mix in [
        0.05 * i for i in range(1, 13)
    ]:  # more than the number of graphs that torch.compile allows
        torch.testing.assert_close(
            compiled(mix), neighbor_silencing_loss(logits, case.target, mix=mix, **case.options)
        )


def test_under_torch_func():
    case = make_case(3, 4, 9, 2)
    logits = case.logits(torch.float64).detach()
    wanted = loss_and_gradients(
        reference_loss(logits.requires_grad_(), case.target, **case.options), [logits]
    )[1]
    loss = lambda z, **options: neighbor_silencing_loss(z, case.target, **case.options, **options)  # noqa: E731
    torch.testing.assert_close(torch.func.grad(loss)(logits.detach()), wanted)
    tangent = torch.ones_like(wanted)
    torch.testing.assert_close(
        torch.func.jvp(loss, (logits.detach(),), (tangent,))[1], wanted.sum()
    )
    assert torch.autograd.gradgradcheck(lambda z: loss(z, backend="torch"), [logits])
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda z: loss(z, backend="triton"))(logits.detach().float())
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.grad(lambda x: linear_neighbor_silencing_loss(x, case.weight, case.target))(
            case.features
        )


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_gradients_per_sample(backend):
    case = make_case(5, 4, 9, 2, label_smoothing=0.1)
    logits = case.logits(torch.float64)
    neighbor_silencing_loss(logits, case.target, reduction="sum", **case.options).backward()

    def one(row, label):
        return neighbor_silencing_loss(row[None], label[None], backend=backend, **case.options)

    found = torch.func.vmap(torch.func.grad(one))(logits.detach(), case.target)
    torch.testing.assert_close(found, logits.grad)
    priors = torch.randn(3, 9, dtype=torch.float64)
    losses = torch.func.vmap(
        lambda prior: neighbor_silencing_loss(logits, case.target, log_prior=prior, backend=backend)
    )(priors)
    torch.testing.assert_close(
        losses,
        torch.stack([neighbor_silencing_loss(logits, case.target, log_prior=p) for p in priors]),
    )


def test_no_graph_break_where_one_would_be_let_pass():
    """A graph that breaks is no error without fullgraph=True, and slow."""
    case = make_case(5, 4, 9, 2, mix="rows", label_smoothing=0.1)
    weight = case.weight.clone().requires_grad_()

    def losses(features):
        logits = torch.nn.functional.linear(features, weight)
        linear = linear_neighbor_silencing_loss(features, weight, case.target, **case.options)
        return linear + neighbor_silencing_loss(logits, case.target, **case.options)

    assert torch._dynamo.explain(losses)(case.features).graph_break_count == 0


in_the_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU, Triton does not take CPU tensors"
)
every_backend = pytest.mark.parametrize(
    "backend", ["auto", "torch", pytest.param("triton", marks=in_the_interpreter)]
)


@every_backend
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_what_is_ignored_or_silenced_may_be_infinite(label_smoothing, backend):
    """A masked logit that the label silences, and an ignored row of NaN."""
    graph = ClassGraph.from_pairs(2, 4, [(1, 2), (1, 3)])
    logits = torch.tensor(
        [[0.5, 1.0, -torch.inf, 2.0], [torch.nan, torch.inf, 0.0, 1.0]], requires_grad=True
    )
    options = {
        "graph": graph,
        "silence": 0.0,
        "label_smoothing": label_smoothing,
        "backend": backend,
    }
    loss = neighbor_silencing_loss(logits, torch.tensor([1, -100]), **options)
    (gradient,) = torch.autograd.grad(loss, logits)
    p = torch.softmax(torch.tensor([0.5, 1.0]), 0)
    mass = torch.tensor([label_smoothing / 2, 1 - label_smoothing / 2])
    torch.testing.assert_close(loss.detach(), -(mass * p.log()).sum())
    torch.testing.assert_close(gradient, torch.tensor([[*(p - mass), 0, 0], [0, 0, 0, 0]]))


@every_backend
def test_an_ignored_row_whose_stand_in_has_no_finite_sum(backend):
    """An ignored label is looked up as class 0."""
    prior = torch.tensor([-torch.inf, 0.0, 0.0])
    graph = ClassGraph.from_pairs(1, 3, [(0, 1), (0, 2)])
    logits = torch.zeros(2, 3, requires_grad=True)
    loss = neighbor_silencing_loss(
        logits, torch.tensor([-100, 1]), graph=graph, log_prior=prior, silence=0.0, backend=backend
    )
    torch.testing.assert_close(
        torch.autograd.grad(loss, logits)[0], torch.tensor([[0, 0, 0], [0, -0.5, 0.5]])
    )


def test_batched_gradients():
    case = make_case(3, 4, 9, 2)
    logits = case.logits(torch.float64)
    loss = neighbor_silencing_loss(logits, case.target, **case.options)
    scales = torch.tensor([1.0, 3.0], dtype=torch.float64)
    one, three = torch.autograd.grad(loss, logits, scales, is_grads_batched=True)[0]
    torch.testing.assert_close(three, 3 * one)
