"""Every bad argument is a ValueError that names the argument, from both losses."""

import pytest
import torch

from fastlt_kernels import ClassGraph, linear_neighbor_silencing_loss, neighbor_silencing_loss
from fastlt_kernels._impl.checks import should_check_values

ROWS, CLASSES, WIDTH = 3, 6, 4
TARGET = torch.tensor([0, 2, 5])
GRAPH = ClassGraph.from_pairs(2, CLASSES, [(0, 2), (1, 5)])
FEATURES, WEIGHT = torch.zeros(ROWS, WIDTH), torch.zeros(CLASSES, WIDTH)


def from_logits(target, **options):
    return neighbor_silencing_loss(torch.zeros(ROWS, CLASSES), target, **options)


def from_features(target, **options):
    return linear_neighbor_silencing_loss(FEATURES, WEIGHT, target, **options)


both_losses = pytest.mark.parametrize("loss", [from_logits, from_features])


@both_losses
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("silence", {"silence": -0.1}),
        ("silence", {"silence": 1.1}),
        ("silence", {"silence": float("nan")}),
        ("label_smoothing", {"label_smoothing": 1.0}),
        ("label_smoothing", {"label_smoothing": -0.1}),
        ("reduction", {"reduction": "average"}),
        ("backend", {"backend": "cuda"}),
        ("silence must be a number", {"silence": "0.1"}),
        ("silence must be a number", {"silence": None}),
        ("silence must be a number", {"silence": torch.tensor(0.1)}),
        ("label_smoothing must be a number", {"label_smoothing": "0.1"}),
        ("graph must be a ClassGraph", {"graph": (0, 2)}),
        ("log_prior must be a dense torch tensor, got a list", {"log_prior": [0.0] * CLASSES}),
        ("target_b must be a dense torch tensor", {"target_b": TARGET.tolist(), "mix": 0.5}),
        ("mix must be a number", {"target_b": TARGET, "mix": [0.5] * ROWS}),
        ("mix is missing", {"target_b": TARGET}),
        ("target_b is missing", {"mix": 0.5}),
        ("mix", {"target_b": TARGET, "mix": 1.5}),
        ("mix", {"target_b": TARGET, "mix": torch.tensor([0.5, 0.5, -0.1])}),
        ("mix", {"target_b": TARGET, "mix": torch.tensor([0.5, 0.5])}),
        ("mix", {"target_b": TARGET, "mix": torch.ones(ROWS, dtype=torch.int64)}),
        ("mix must be on", {"target_b": TARGET, "mix": torch.ones(ROWS, device="meta")}),
        ("row_weight must be a dense torch tensor", {"row_weight": [1.0] * ROWS}),
        ("row_weight must be a dense torch tensor", {"row_weight": 0.5}),
        ("row_weight must have shape", {"row_weight": torch.ones(ROWS - 1)}),
        ("row_weight must have shape", {"row_weight": torch.ones(ROWS, 1)}),
        ("row_weight must have shape", {"row_weight": torch.tensor(1.0)}),
        ("row_weight must have shape", {"row_weight": torch.ones(ROWS, dtype=torch.int64)}),
        ("row_weight must be on", {"row_weight": torch.ones(ROWS, device="meta")}),
        ("row_weight must be finite", {"row_weight": torch.tensor([1.0, -0.1, 1.0])}),
        ("row_weight must be finite", {"row_weight": torch.tensor([1.0, torch.nan, 1.0])}),
        ("row_weight must be finite", {"row_weight": torch.tensor([1.0, torch.inf, 1.0])}),
        ("target_b must have shape", {"target_b": TARGET[:2], "mix": 0.5}),
        ("target_b must be in 0..5", {"target_b": TARGET + 1, "mix": 0.5}),
        ("log_prior", {"log_prior": torch.zeros(CLASSES - 1)}),
        ("log_prior", {"log_prior": torch.zeros(CLASSES, dtype=torch.int64)}),
        ("log_prior must be on", {"log_prior": torch.zeros(CLASSES, device="meta")}),
        ("log_prior must hold no NaN", {"log_prior": torch.full((CLASSES,), torch.nan)}),
        ("log_prior must hold no NaN", {"log_prior": torch.full((CLASSES,), torch.inf)}),
        (
            "log_prior of -inf",
            {"log_prior": torch.full((CLASSES,), -torch.inf), "label_smoothing": 0.1},
        ),
        ("graph has 7 classes", {"graph": ClassGraph.from_pairs(2, 7, [])}),
        ("graph is on meta", {"graph": GRAPH.to("meta")}),
    ],
)
def test_options(loss, name, options):
    with pytest.raises(ValueError, match=name):
        loss(TARGET, **options)


@both_losses
@pytest.mark.parametrize(
    ("target", "message"),
    [
        (TARGET.tolist(), "target must be a dense torch tensor, got a list"),
        (None, "target must be a dense torch tensor"),
        # which is -100 in eight bits
        (
            torch.tensor([0, 2, 156], dtype=torch.uint8),
            "target must be in 0..5",
        ),
        (TARGET[:2], "target must have shape"),
        (TARGET[:, None], "target must have shape"),
        (TARGET.float(), "target must hold integer"),
        (TARGET > 0, "target must hold integer"),
        (TARGET.to("meta"), "target must be on"),
        (TARGET + 1, r"target must be in 0..5 .or -100., got 1..6"),
        (TARGET - 1, r"target must be in 0..5 .or -100., got -1..4"),
    ],
)
def test_target(loss, target, message):
    with pytest.raises(ValueError, match=message):
        loss(target, graph=GRAPH)


@both_losses
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_any_integer_target_will_do(loss, dtype):
    assert torch.equal(loss(TARGET.to(dtype), graph=GRAPH), loss(TARGET, graph=GRAPH))


@pytest.mark.parametrize(
    "logits",
    [
        [[0.0]],
        torch.zeros(ROWS, CLASSES).to_sparse(),
        torch.zeros(ROWS, 0),
        torch.zeros(CLASSES),
        torch.zeros(1, ROWS, CLASSES),
        torch.zeros(ROWS, CLASSES, dtype=torch.int64),
    ],
)
def test_logits(logits):
    with pytest.raises(ValueError, match="logits"):
        neighbor_silencing_loss(logits, TARGET)


@pytest.mark.parametrize(
    ("name", "features", "weight", "options"),
    [
        ("features", FEATURES[0], WEIGHT, {}),
        ("features", FEATURES.long(), WEIGHT, {}),
        ("weight must have shape", FEATURES, WEIGHT[0], {}),
        ("weight must have the 4 columns", FEATURES, WEIGHT[:, :3], {}),
        ("weight must have the dtype", FEATURES, WEIGHT.bfloat16(), {}),
        ("weight must be on", FEATURES, WEIGHT.to("meta"), {}),
        ("bias must have shape", FEATURES, WEIGHT, {"bias": torch.zeros(CLASSES + 1)}),
        ("bias must have shape", FEATURES, WEIGHT, {"bias": torch.zeros(1, CLASSES)}),
        ("bias must have the dtype", FEATURES, WEIGHT, {"bias": torch.zeros(CLASSES).double()}),
        ("bias must be on", FEATURES, WEIGHT, {"bias": torch.zeros(CLASSES, device="meta")}),
        ("features", None, WEIGHT, {}),
        ("weight must be a dense", FEATURES, WEIGHT.tolist(), {}),
        ("bias must be a dense", FEATURES, WEIGHT, {"bias": [0.0] * CLASSES}),
        ("chunk_bytes must be an integer", FEATURES, WEIGHT, {"chunk_bytes": 1e6}),
        ("chunk_bytes must be positive and below", FEATURES, WEIGHT, {"chunk_bytes": 2**70}),
        ("chunk_bytes", FEATURES, WEIGHT, {"chunk_bytes": 0}),
    ],
)
def test_linear(name, features, weight, options):
    with pytest.raises(ValueError, match=name):
        linear_neighbor_silencing_loss(features, weight, TARGET, **options)


def test_autocast_mixes_dtypes_but_not_float64():
    with torch.autocast("cpu", torch.bfloat16):
        linear_neighbor_silencing_loss(FEATURES.bfloat16(), WEIGHT, TARGET)
        with pytest.raises(ValueError, match="weight must have the dtype"):
            linear_neighbor_silencing_loss(FEATURES, WEIGHT.double(), TARGET)


def test_values_on_an_accelerator_are_looked_at_only_when_debugging(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.delenv("FASTLT_KERNELS_DEBUG", raising=False)
    assert should_check_values(torch.device("cpu"))
    assert not should_check_values(cuda)
    monkeypatch.setenv("FASTLT_KERNELS_DEBUG", "1")
    assert should_check_values(cuda)
