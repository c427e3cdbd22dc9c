from functools import partial

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
    reference_of_linear,
)
from torch.nn import functional as F

from fastlt_benchmarks.timing import peak_bytes
from fastlt_kernels import linear_neighbor_silencing_loss, neighbor_silencing_loss
from fastlt_kernels._impl import chunks
from fastlt_kernels._impl.chunks import plan_chunks
from fastlt_kernels._impl.rows import describe_rows

OPERATORS = torch.ops.fastlt_kernels


def loss_of(case, inputs, **options):
    features, weight, bias = inputs
    return linear_neighbor_silencing_loss(
        features, weight, case.target, bias=bias, **{**case.options, **options}
    )


def result(case, inputs, **options):
    return loss_and_gradients(loss_of(case, inputs, **options), inputs)


def exact(case, **options):
    inputs = case.inputs(torch.float64)
    return loss_and_gradients(reference_of_linear(case, inputs, **options), inputs)


poisoned = pytest.mark.usefixtures("poisoned_memory")


@poisoned
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("silence", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_is_the_reference(shape, silence, label_smoothing, mix):
    case = make_case(*shape, mix=mix, silence=silence, label_smoothing=label_smoothing)
    assert_near(result(case, case.inputs(torch.float64)), exact(case))


@poisoned
@pytest.mark.parametrize("chunk_bytes", [2**29, 30_000])
@pytest.mark.parametrize("seed", range(30))
def test_any_case_is_the_reference(seed, chunk_bytes, monkeypatch):
    monkeypatch.setattr(chunks, "LEAST_CLASSES", 64)
    case = random_case(seed)
    assert_near(result(case, case.inputs(torch.float64), chunk_bytes=chunk_bytes), exact(case))


@poisoned
@pytest.mark.parametrize("chunk_bytes", [1, 5_000, 20_000, 10**9])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_chunks_do_not_show(reduction, chunk_bytes, monkeypatch):
    monkeypatch.setattr(chunks, "LEAST_CLASSES", 5)
    case = make_case(23, 20, 61, 7, mix="rows", label_smoothing=0.1)
    got = result(case, case.inputs(torch.float64), reduction=reduction, chunk_bytes=chunk_bytes)
    assert_near(got, exact(case, reduction=reduction))


in_the_interpreter = pytest.mark.skipif(
    torch.cuda.is_available(), reason="on a GPU, Triton does not take CPU tensors"
)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=in_the_interpreter)])
def test_a_batch_in_two_parts_is_the_same(backend):
    case = make_case(13, 20, 61, 7, mix="rows", label_smoothing=0.1)
    options = case.options
    inputs = case.inputs(torch.float32)
    whole = loss_and_gradients(loss_of(case, inputs, backend=backend, reduction="sum"), inputs)
    parts = []
    for part in (slice(0, 5), slice(5, 13)):
        features, weight, bias = inputs
        mixed = {"target_b": options["target_b"][part], "mix": options["mix"][part]}
        loss = linear_neighbor_silencing_loss(
            features[part],
            weight,
            case.target[part],
            bias=bias,
            backend=backend,
            reduction="sum",
            **{**options, **mixed},
        )
        parts.append(loss_and_gradients(loss, inputs))
    torch.testing.assert_close(
        [a + b for a, b in zip(*parts, strict=True)], whole, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("direction", ["target_rows", "aux_rows"])
def test_directions(direction):
    case = make_case(16, 20, 60, 7, mix="rows", silence=0.0)
    case.options["graph"] = case.options["graph"].directed(direction)
    assert_near(result(case, case.inputs(torch.float64)), exact(case))


def test_agrees_with_the_logits_loss_without_bias_prior_or_graph():
    case = make_case(9, 5, 33, 6)
    features, weight, _ = case.inputs(torch.float64)
    got = loss_and_gradients(
        linear_neighbor_silencing_loss(features, weight, case.target), [features, weight]
    )
    wanted = loss_and_gradients(
        neighbor_silencing_loss(features @ weight.T, case.target), [features, weight]
    )
    assert_near(got, wanted)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("silence", [0.0, 0.1])
@pytest.mark.parametrize("shape", [(1, 5, 23, 3), (33, 5, 507, 123), (16, 1000, 5000, 32)])
def test_low_precision(shape, silence, dtype, reduction):
    case = make_case(*shape, mix="scalar", silence=silence, label_smoothing=0.1)
    inputs, eager = case.inputs(dtype), case.inputs(dtype)
    got = result(case, inputs, reduction=reduction, chunk_bytes=60_000)
    assert got[0].dtype == torch.float32
    assert [g.dtype for g in got[1:]] == [dtype] * 3
    plain = loss_and_gradients(reference_of_linear(case, eager, reduction=reduction), eager)
    # In a mean the errors of eager's rows may cancel by luck: losses are compared row by row.
    first = 1 if reduction == "mean" else 0
    assert_as_exact_as_eager(got[first:], plain[first:], exact(case, reduction=reduction)[first:])


# one copy of the weight in bfloat16, or tile by tile
@pytest.mark.parametrize("chunk_bytes", [2**29, 30_000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_keeps_the_weight_gradient_in_float32(dtype, chunk_bytes):
    case = make_case(64, 50, 507, 32, mix="rows", label_smoothing=0.1)
    inputs, eager = case.inputs(torch.float32), case.inputs(torch.float32)
    with torch.autocast("cpu", dtype):
        loss = loss_of(case, inputs, chunk_bytes=chunk_bytes)
        plain = reference_of_linear(case, eager)
    got = loss_and_gradients(loss, inputs)
    assert [g.dtype for g in got] == [torch.float32] * 4
    assert_as_exact_as_eager(got[1:], loss_and_gradients(plain, eager)[1:], exact(case)[1:])


def test_autocast_makes_its_products_in_its_dtype():
    case = make_case(16, 5, 100, 64)
    case.features *= (
        1 + torch.rand(case.features.shape, generator=torch.Generator().manual_seed(0)) / 100
    )
    features, weight, bias = case.inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        lowered = loss_of(case, [features, weight, bias], reduction="none")
        rounded = loss_of(case, [features.bfloat16(), weight.bfloat16(), bias], reduction="none")
    torch.testing.assert_close(lowered, rounded, rtol=0, atol=0)
    assert (lowered - loss_of(case, [features, weight, bias], reduction="none")).abs().max() > 1e-3


def test_autocast_takes_lowered_features_with_float32_parameters():
    case = make_case(8, 5, 40, 16)
    features, weight, bias = case.inputs(torch.float32)
    features = features.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_of(case, [features, weight, bias])
    gradients = torch.autograd.grad(loss, [features, weight, bias])
    assert [g.dtype for g in gradients] == [torch.bfloat16, torch.float32, torch.float32]


def test_each_gradient_has_its_parameters_dtype_and_precision():
    """Under autocast a float32 bias may stand beside a bfloat16 weight."""
    features, weight = torch.zeros(3, 4), torch.zeros(7, 4, dtype=torch.bfloat16)
    bias = torch.zeros(7, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_neighbor_silencing_loss(
            features, weight, torch.tensor([0, 0, 1]), bias=bias, reduction="sum"
        )
    (gradient,) = torch.autograd.grad(loss, bias)
    torch.testing.assert_close(gradient[2:], torch.full((5,), 3 / 7), rtol=1e-2, atol=0)
    assert gradient.dtype == torch.float32


@pytest.mark.parametrize("chunk_bytes", [3_000, 2**29])
def test_many_chunks_do_not_wear_off_the_weight_gradient(chunk_bytes):
    """512 rows of one class, a few at a time: summed in bfloat16, most of the later rows would
    vanish.

    Allowed are two roundings to bfloat16, of each chunk's product and of the result.
    """
    features, weight = (
        torch.ones(512, 4, dtype=torch.bfloat16),
        torch.zeros(64, 4, dtype=torch.bfloat16, requires_grad=True),
    )
    target = torch.zeros(512, dtype=torch.int64)
    loss = linear_neighbor_silencing_loss(
        features, weight, target, reduction="sum", chunk_bytes=chunk_bytes
    )
    (gradient,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(
        gradient[0].float(), torch.full((4,), 512 * (1 / 64 - 1)), rtol=2**-7, atol=0
    )
    torch.testing.assert_close(
        gradient[1:].float(), torch.full((63, 4), 512 / 64), rtol=2**-7, atol=0
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_twice_over_one_graph(reduction):
    case = make_case(7, 5, 40, 6)
    inputs = case.inputs(torch.float64)
    loss = loss_of(case, inputs, reduction=reduction)
    first = torch.autograd.grad(loss.sum() * 3, inputs, retain_graph=True)
    second = torch.autograd.grad(loss.sum(), inputs)
    for three, one in zip(first, second, strict=True):
        torch.testing.assert_close(three, 3 * one)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "wanted",
    [(True, False, False), (False, True, False), (False, False, True), (False, False, False)],
)
def test_only_the_gradients_that_are_wanted(wanted, reduction):
    case = make_case(7, 5, 40, 6)
    inputs = [
        t.requires_grad_(w)
        for t, w in zip((case.features, case.weight, case.bias), wanted, strict=True)
    ]
    loss = loss_of(case, inputs, reduction=reduction)
    assert loss.requires_grad == any(wanted)
    reference = exact(case, reduction=reduction)
    assert_near([loss.detach()], reference[:1])
    for tensor, gradient, is_wanted in zip(inputs, reference[1:], wanted, strict=True):
        if is_wanted:
            assert_near(loss_and_gradients(loss, [tensor])[1:], [gradient])


def test_no_gradient_work_without_gradients():
    case = make_case(64, 50, 500, 64)
    inputs = case.inputs(torch.float32)
    steps = []
    for enabled in (True, False):
        activities = [torch.profiler.ProfilerActivity.CPU]
        with (
            torch.set_grad_enabled(enabled),
            torch.profiler.profile(activities=activities) as profiler,
        ):
            loss = loss_of(case, inputs)
        assert loss.requires_grad == enabled
        steps.append(
            sum(e.count for e in profiler.key_averages() if e.key in ("aten::mm", "aten::addmm"))
        )
    assert steps == [3, 1]  # the logits both times, and two products for the gradients


def test_differentiating_twice_is_refused():
    case = make_case(3, 4, 9, 2)
    inputs = case.inputs(torch.float64)
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(loss_of(case, inputs), inputs[0], create_graph=True)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradcheck(reduction):
    case = make_case(5, 4, 9, 2, mix="rows", label_smoothing=0.1)
    loss = lambda *inputs: loss_of(case, inputs, reduction=reduction, chunk_bytes=2_000)  # noqa: E731
    assert torch.autograd.gradcheck(loss, case.inputs(torch.float64))


@pytest.mark.parametrize("summed", [True, False])
def test_opcheck(summed):
    case = make_case(5, 4, 9, 2)
    graph, labels = case.options["graph"], torch.stack([case.target, case.target.flip(0)])
    shares = torch.full(labels.shape, 0.5, dtype=torch.float64)
    rows = describe_rows(labels, shares, None, graph, 9, 0.1, 0.1, 4)
    options = (*rows, torch.float64, 2_000, "torch")
    torch.library.opcheck(
        OPERATORS.linear_loss.default, (*case.inputs(torch.float64), *options, summed, [True] * 3)
    )
    plain = [t.detach() for t in case.inputs(torch.float64)]
    torch.library.opcheck(
        OPERATORS.linear_loss_gradients.default, (*plain, *options, [True, summed, True])
    )


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_memory_is_bounded(dtype, reduction):
    rows, classes, width, chunk_bytes = 512, 4096, 16, 2**20
    case = make_case(
        rows, 1000, classes, width, mix="rows", label_smoothing=0.1, reduction=reduction
    )
    inputs = case.inputs(torch.float32)

    def work(loss):
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            value = loss()
        value.sum().backward()

    def materialised():
        features, weight, bias = inputs
        return neighbor_silencing_loss(
            F.linear(features, weight, bias), case.target, backend="torch", **case.options
        )

    peak = partial(peak_bytes, device=torch.device("cpu"))
    for tensor in inputs:
        tensor.grad = torch.zeros_like(tensor)  # so that gradients count as temporaries both times
    gradients = 4 * (rows * width + classes * width + classes)
    logits = 4 * rows * classes
    # Those of the sum, kept for a second backward, and those returned; and vectors of N and C.
    assert (
        peak(lambda: work(lambda: loss_of(case, inputs, chunk_bytes=chunk_bytes)))
        < chunk_bytes + 2 * gradients + 2**17
    )
    assert peak(lambda: work(materialised)) > 2 * logits > 10 * chunk_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bias_needs_no_more_memory(dtype):
    rows, classes, width, chunk_bytes = 1024, 8192, 8, 2**22
    features, weight, bias = (
        torch.randn(*shape).to(dtype).requires_grad_()
        for shape in ((rows, width), (classes, width), (classes,))
    )
    target = torch.randint(classes, (rows,))
    for tensor in (features, weight, bias):
        tensor.grad = torch.zeros_like(tensor)
    peaks = [
        peak_bytes(
            lambda given=given: linear_neighbor_silencing_loss(
                features, weight, target, bias=given, chunk_bytes=chunk_bytes
            ).backward(),
            torch.device("cpu"),
        )
        for given in (None, bias)
    ]
    assert peaks[1] < peaks[0] + 2**18
    assert peaks[1] < chunk_bytes + 2**20


def test_plan():
    def plan(rows, classes, width, weight, product, chunk_bytes=2**29, device="cuda"):
        dtypes = {"weight_dtype": weight, "product": product, "total": torch.float32}
        return plan_chunks(
            rows,
            width,
            classes,
            slots=16,
            device=device,
            in_torch=device == "cpu",
            chunk_bytes=chunk_bytes,
            **dtypes,
        )

    fp32, bf16 = torch.float32, torch.bfloat16
    assert plan(1024, 10_000, 768, fp32, fp32) == (1024, 10_000, 10_000, False)
    assert plan(1024, 10_000, 768, fp32, fp32, device="cpu").rows == 512
    assert plan(1024, 10_000, 768, bf16, bf16, device="cpu").rows == 1024
    assert plan(1024, 10_000, 768, fp32, bf16).cast_weight_once
    # the last of 7 chunks has a bit less
    assert plan(16_384, 100_000, 768, bf16, bf16)[:2] == (
        2432,
        100_000,
    )
    # in the memory that would have summed the weight's gradient
    assert plan(4096, 100_000, 768, bf16, bf16).rows == 4096
    huge = plan(16_384, 1_000_000, 2048, fp32, bf16)
    assert not huge.cast_weight_once
    assert huge.products * 2048 * 2 <= 2**27
    assert huge.rows >= 8192  # and so the classes have to be cut
    assert 8192 <= huge.classes <= 2**29 // (2 * huge.rows)
    assert huge.classes % 64 == huge.products % 64 == 0
    assert plan(8, 1_000_000, 2048, fp32, fp32, chunk_bytes=1)[:2] == (1, 1024)


def test_compiles_whole_under_autocast_with_the_graph_closed_over():
    case = make_case(5, 4, 30, 3, mix="rows", silence=0.0, label_smoothing=0.1)
    inputs = case.inputs(torch.float32)

    def loss(features, weight, bias):
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(case, [features * 2, weight, bias])

    wanted = loss_and_gradients(loss(*inputs), inputs)
    compiled = loss_and_gradients(torch.compile(loss, fullgraph=True)(*inputs), inputs)
    assert_near(compiled, [t.double() for t in wanted], 1e-5)
