"""The Triton kernels against the specification: on a GPU where there is one, else in Triton's
interpreter.
"""

import itertools
import os
import subprocess
import sys

import pytest
import torch
from helpers.loss_cases import (
    MIXES,
    assert_as_exact_as_eager,
    loss_and_gradients,
    make_case,
    random_case,
    reference_of_linear,
)

from fastlt_kernels import (
    linear_neighbor_silencing_loss,
    linear_neighbor_silencing_outputs,
    neighbor_silencing_loss,
    neighbor_silencing_outputs,
    reference_loss,
)

triton_rows = pytest.importorskip(
    "fastlt_kernels._impl.triton_rows", reason="triton is not installed"
)
from fastlt_kernels._impl import chunks, rows  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = [(1, 5, 23, 3), (3, 40, 507, 12), (9, 12, 12, 5), (5, 100, 203, 16)]
CUTS = ["whole", "long", "parts"]

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture
def cut(request, monkeypatch):
    """Rows of some hundred classes go the way of longer ones: several blocks, in one program or in
    parts.
    """
    if request.param != "whole":
        cut = triton_rows.Cut(block=64, warps=1, parts=3 if request.param == "parts" else 1)
        monkeypatch.setattr(triton_rows, "plan_cut", lambda *_: cut)
    return request.param


every_cut = pytest.mark.parametrize("cut", CUTS, indirect=True)


def on_device(options):
    return {k: v.to(DEVICE) if hasattr(v, "to") else v for k, v in options.items()}


def check_logits(case, dtype, **options):
    options = {**case.options, **options}
    exact, eager = (
        case.logits(dtype).detach().to(t).requires_grad_() for t in (torch.float64, dtype)
    )
    logits = case.logits(dtype).detach().to(DEVICE).requires_grad_()
    before = logits.detach().clone()
    loss = neighbor_silencing_loss(
        logits, case.target.to(DEVICE), backend="triton", **on_device(options)
    ).cpu()
    got = loss_and_gradients(loss, [logits])
    assert got[0].dtype == torch.float32
    assert got[1].dtype == dtype
    assert torch.equal(logits.detach(), before)
    plain = loss_and_gradients(reference_loss(eager.float(), case.target, **options), [eager])
    wanted = loss_and_gradients(reference_loss(exact, case.target, **options), [exact])
    assert_as_exact_as_eager([t.cpu() for t in got], plain, wanted)


# Every combination on one shape; other shapes and cuts with all of them on, where the interpreter
# runs.
COMBINATIONS = [
    (shape, silence, label_smoothing, mix, cut)
    for shape, silence, label_smoothing, mix, cut in itertools.product(
        SHAPES, [0.0, 0.1], [0.0, 0.1], MIXES, CUTS
    )
    if DEVICE == "cuda"
    or silence == label_smoothing == 0.1
    or (shape, cut) == (SHAPES[-1], "whole")
]


@pytest.mark.parametrize(
    ("shape", "silence", "label_smoothing", "mix", "cut"), COMBINATIONS, indirect=["cut"]
)
def test_logits(shape, silence, label_smoothing, mix, cut):
    check_logits(
        make_case(*shape, mix=mix, silence=silence, label_smoothing=label_smoothing),
        torch.float32,
        reduction="none",
    )


@every_cut
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(8))
def test_any_logits(seed, dtype, cut):
    check_logits(random_case(seed), dtype)


@pytest.mark.parametrize(
    ("cut", "reduction"),
    [*((cut, "mean") for cut in CUTS), ("whole", "sum"), ("whole", "none")],
    indirect=["cut"],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_in_low_precision(reduction, dtype, cut):
    check_logits(
        make_case(5, 5, 207, 12, mix="rows", label_smoothing=0.1), dtype, reduction=reduction
    )


@every_cut
@pytest.mark.parametrize(
    "options",
    [{"graph": None}, {"log_prior": None}, {"silence": 1.0}, {"graph": None, "log_prior": None}],
)
def test_logits_without(options, cut):
    check_logits(make_case(6, 5, 107, 4, **options), torch.float32)


@every_cut
@pytest.mark.parametrize("direction", ["target_rows", "aux_rows"])
def test_directions(direction, cut):
    case = make_case(8, 20, 160, 7, mix="scalar")
    case.options["graph"] = case.options["graph"].directed(direction)
    check_logits(case, torch.float32)


@every_cut
def test_ignored_rows(cut):
    case = make_case(8, 20, 160, 7, mix="rows", label_smoothing=0.1)
    case.target[1], case.target[4], case.options["target_b"][4] = -100, -100, -100
    check_logits(case, torch.float32)
    case.target[:] = -100
    case.options["target_b"][:] = -100
    check_logits(case, torch.float32)


@every_cut
def test_classes_of_no_prior_and_huge_logits(cut):
    case = make_case(6, 5, 140, 4, silence=0.0)
    case.options["log_prior"][60:130] = -torch.inf  # whole blocks of classes that never occur
    case.target[:] = torch.arange(6)
    case.features *= 1e3
    check_logits(case, torch.float32)


# odd, or so wide that the kernels read whole vectors beyond the classes
@pytest.mark.parametrize("stride", [130, 144])
def test_rows_that_are_not_packed(stride):
    case = make_case(7, 5, 107, 4)
    wide = torch.full((7, stride), torch.nan, device=DEVICE)
    wide[:, :107] = case.logits(torch.float32).detach()
    losses = [
        neighbor_silencing_loss(
            z, case.target.to(DEVICE), backend="triton", **on_device(case.options)
        )
        for z in (wide[:, :107], wide[:, :107].contiguous(), wide[:, :107].t().contiguous().t())
    ]
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])


@every_cut
def test_outputs(cut):
    case = make_case(9, 20, 160, 7, mix="rows")
    logits = case.logits(torch.float32).detach()
    logits[:, 7] = logits[:, 3]  # of equals, the first
    outputs = neighbor_silencing_outputs(
        logits.to(DEVICE),
        case.target.to(DEVICE),
        num_targets=20,
        backend="triton",
        **on_device(case.options),
    )
    assert torch.equal(outputs.prediction.cpu(), logits[:, :20].argmax(dim=1))
    plain = neighbor_silencing_outputs(
        logits, case.target, num_targets=20, backend="torch", **case.options
    )
    torch.testing.assert_close(outputs.log_sum_exp.cpu(), plain.log_sum_exp)
    torch.testing.assert_close(outputs.loss.cpu(), plain.loss)
    assert torch.equal(plain.prediction, outputs.prediction.cpu())


@pytest.mark.parametrize("least", [16, 2**30])  # class tiles, or whole rows
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16]
    if DEVICE == "cpu"
    else [torch.float32, torch.bfloat16, torch.float16],
)
def test_linear(dtype, reduction, least, monkeypatch):
    monkeypatch.setattr(chunks, "LEAST_CLASSES", 32)
    monkeypatch.setattr(chunks, "CPU_LEAST_ROWS", least)
    monkeypatch.setattr(chunks, "GPU_ROWS", 1 if least == 2**30 else 1024)
    case = make_case(13, 30, 150, 16, mix="rows", label_smoothing=0.1)
    inputs = [t.detach().to(DEVICE).requires_grad_() for t in case.inputs(dtype)]
    options = {**on_device(case.options), "reduction": reduction, "chunk_bytes": 12_000}
    features, weight, bias = inputs
    loss = linear_neighbor_silencing_loss(
        features, weight, case.target.to(DEVICE), bias=bias, backend="triton", **options
    )
    got = [t.cpu() for t in loss_and_gradients(loss.cpu(), inputs)]
    exact, eager = case.inputs(torch.float64), case.inputs(dtype)
    assert_as_exact_as_eager(
        got,
        loss_and_gradients(reference_of_linear(case, eager, reduction=reduction), eager),
        loss_and_gradients(reference_of_linear(case, exact, reduction=reduction), exact),
    )


@pytest.mark.parametrize("seed", range(8))
def test_any_linear(seed, monkeypatch):
    monkeypatch.setattr(chunks, "LEAST_CLASSES", 64)
    case = random_case(seed)
    inputs = [t.detach().to(DEVICE).requires_grad_() for t in case.inputs(torch.float32)]
    features, weight, bias = inputs
    options = {**on_device(case.options), "bias": bias, "chunk_bytes": 40_000, "backend": "triton"}
    got = loss_and_gradients(
        linear_neighbor_silencing_loss(features, weight, case.target.to(DEVICE), **options).cpu(),
        inputs,
    )
    exact, eager = case.inputs(torch.float64), case.inputs(torch.float32)
    assert_as_exact_as_eager(
        [t.cpu() for t in got],
        loss_and_gradients(reference_of_linear(case, eager), eager),
        loss_and_gradients(reference_of_linear(case, exact), exact),
    )


def test_linear_outputs_of_both_backends():
    case = make_case(13, 30, 150, 16, mix="rows")
    features, weight, bias = (t.detach().to(DEVICE) for t in case.inputs(torch.float32))
    both = [
        linear_neighbor_silencing_outputs(
            features,
            weight,
            case.target.to(DEVICE),
            num_targets=30,
            bias=bias,
            backend=backend,
            **on_device(case.options),
        )
        for backend in ("triton", "torch")
    ]
    assert torch.equal(both[0].prediction, both[1].prediction)
    assert torch.equal(
        both[0].prediction, torch.nn.functional.linear(features, weight, bias)[:, :30].argmax(dim=1)
    )
    torch.testing.assert_close(both[0].log_sum_exp, both[1].log_sum_exp)


def test_second_backward_is_right():
    case = make_case(5, 4, 30, 3)
    logits = case.logits(torch.float32).detach().to(DEVICE).requires_grad_()
    loss = neighbor_silencing_loss(
        logits, case.target.to(DEVICE), backend="triton", **on_device(case.options)
    )
    (three,) = torch.autograd.grad(loss * 3, logits, retain_graph=True)
    kept = three.clone()
    (one,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(three, 3 * one)
    assert torch.equal(three, kept)


def test_scaling_in_place():
    values = torch.randn(10_001, device=DEVICE)
    wanted = values * 0.3
    triton_rows.scale_(values, torch.tensor(0.3, device=DEVICE))
    torch.testing.assert_close(values, wanted)
    triton_rows.scale_(values, torch.tensor(1.0, device=DEVICE))
    torch.testing.assert_close(values, wanted)


def test_half_precision_gradients_survive_a_loss_scale():
    """Divided by the rows first, small gradients would vanish in half precision; a scale of 65536
    is infinite in it.
    """
    logits = torch.zeros(64, 5000, dtype=torch.float16, device=DEVICE, requires_grad=True)
    loss = neighbor_silencing_loss(
        logits, torch.zeros(64, dtype=torch.int64, device=DEVICE), backend="triton"
    )
    (gradient,) = torch.autograd.grad(loss * 65536, logits)
    torch.testing.assert_close(gradient[0, 1].item(), 65536 / 64 / 5000, rtol=1e-3, atol=0)
    assert torch.isfinite(gradient).all()


@pytest.mark.slow
def test_opcheck():
    case = make_case(5, 4, 30, 3, label_smoothing=0.1)
    labels = torch.stack([case.target, case.target.flip(0)]).to(DEVICE)
    shares = torch.full(labels.shape, 0.5, device=DEVICE)
    described = rows.describe_rows(
        labels, shares, None, case.options["graph"].to(DEVICE), 30, 0.1, 0.1, 4
    )
    for summed, backend in itertools.product((True, False), ("torch", "triton")):
        logits = case.logits(torch.float32).detach().to(DEVICE).requires_grad_()
        torch.library.opcheck(
            torch.ops.fastlt_kernels.logits_loss.default,
            (logits, *described, backend, summed, True),
        )
        arguments = (logits.detach(), *described, backend, torch.zeros_like(shares))
        torch.library.opcheck(torch.ops.fastlt_kernels.logits_loss_gradient.default, arguments)


def test_compiles_whole():
    case = make_case(5, 4, 30, 3, mix="rows")
    layer = torch.nn.Linear(3, 30).to(DEVICE)
    inputs, target, options = (
        case.features.float().to(DEVICE),
        case.target.to(DEVICE),
        on_device(case.options),
    )

    def loss(inputs):
        return neighbor_silencing_loss(layer(inputs), target, backend="triton", **options)

    wanted = torch.autograd.grad(loss(inputs) * 2, layer.weight)
    got = torch.autograd.grad(torch.compile(loss, fullgraph=True)(inputs) * 2, layer.weight)
    torch.testing.assert_close(got, wanted)


def test_plan_of_programs():
    plan = triton_rows.plan_cut
    for rows_, classes, labels in [
        (1024, 1000, 1),
        (16_384, 100, 2),
        (1, 1, 1),
        (1, 10**6, 1),
        (4096, 10**6, 2),
        (64, 50_000, 1),
    ]:
        cut = plan(rows_, classes, labels, 132)
        assert cut.block & (cut.block - 1) == 0
        assert cut.parts == 1 or cut.block < classes
        assert 1 <= cut.warps <= 32
    assert plan(16_384, 2000, 1, 132).block >= 2000 > plan(16_384, 2000, 2, 132).block // 2
    assert plan(4, 10**6, 1, 132).parts > 32
    assert plan(16_384, 10**6, 1, 132).parts == 1


COMPILE = """
import itertools
import sys
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from fastlt_kernels._impl import row_kernels

integers = {"labels", "graph_rows", "indptr", "indices", "blocks", "bests"}
names = ("whole_rows", "long_rows", "part_terms", "part_gradient")
for name, left_out, labels in itertools.product(names, sys.argv[2:], (1, 2)):
    kernel = getattr(row_kernels, name)
    constants = {"LABELS": labels, "BLOCK": 1024, "LANE": 8, "ALIGNED": 8}
    constants |= {name: None for name in set(left_out.split(",")) & set(kernel.arg_names)}
    scalars = dict.fromkeys(("stride", "out_stride"), "i64")
    scalars |= dict.fromkeys(("log_silence", "label_smoothing"), "fp32")
    counts = ("rows", "classes", "width", "first", "span", "split", "num_predicted", "steps")
    scalars |= dict.fromkeys(counts, "i32")
    signature = {}
    for argument in kernel.arg_names:
        floats = "*bf16" if argument in ("logits", "out") else "*fp32"
        pointer = "*i64" if argument in integers else floats
        kind = scalars.get(argument, pointer)
        signature[argument] = "constexpr" if argument in constants else kind
    places = {(kernel.arg_names.index(key),): value for key, value in constants.items()}
    target = GPUTarget("cuda", int(sys.argv[1]), 32)
    compile(ASTSource(kernel, signature, places), target=target, options={"num_warps": 8})
"""


def python_without_interpreter(code, *arguments):
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


SILENCING, SMOOTHING, PREDICTION = (
    "graph_rows,indptr,indices",
    "smoothing,logit_sums",
    "best_logits,bests",
)


LEFT_OUT = [
    "",
    "blocks",
    f"{SILENCING},blocks",
    f"{SMOOTHING},{PREDICTION}",
    f"{SILENCING},blocks,{SMOOTHING},{PREDICTION},log_prior",
]


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_kernels_compile_for_a_gpu_that_is_not_there(capability):
    """The interpreter takes programs that the compiler does not."""
    done = python_without_interpreter(COMPILE, str(capability), *LEFT_OUT)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(DEVICE == "cuda", reason="here there is a GPU")
def test_without_a_gpu_triton_is_refused():
    code = (
        "import torch, fastlt_kernels as k; k.neighbor_silencing_loss(torch.zeros(1, 2), "
        "torch.tensor([0]), backend='triton')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "ValueError: backend 'triton' needs a GPU" in done.stderr


def test_float64_is_refused():
    with pytest.raises(ValueError, match="backend 'triton' computes in float32"):
        neighbor_silencing_loss(
            torch.zeros(1, 2, dtype=torch.float64), torch.tensor([0]), backend="triton"
        )


@pytest.mark.skipif(
    DEVICE == "cpu", reason="needs a GPU with 10 GB of free memory: 2^31 logits and more"
)
def test_more_than_2_to_the_31_logits():
    rows_, classes = 2200, 1_000_000
    logits = torch.zeros(rows_, classes, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    target = torch.arange(rows_, device=DEVICE) * 400
    losses = neighbor_silencing_loss(logits, target, reduction="none")
    torch.testing.assert_close(losses, torch.full_like(losses, 13.815511), rtol=1e-5, atol=0)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    torch.testing.assert_close(gradient[-1, target[-1]].item(), -1.0, rtol=1e-2, atol=0)
    assert gradient[-1, -1] > 0


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU: CUDA graphs")
def test_is_captured_by_a_cuda_graph():
    """A host synchronisation anywhere would end the capture."""
    case = make_case(64, 30, 5000, 32, mix="rows", label_smoothing=0.1)
    inputs = [t.detach().to(DEVICE).requires_grad_() for t in case.inputs(torch.float32)]
    target, options = case.target.to(DEVICE), on_device(case.options)

    def work():
        features, weight, bias = inputs
        loss = linear_neighbor_silencing_loss(
            features, weight, target, bias=bias, chunk_bytes=2**20, **options
        )
        return [loss, *torch.autograd.grad(loss, inputs)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    with torch.no_grad():
        inputs[0].mul_(0.5)
    graph.replay()
    torch.testing.assert_close(captured, work())
