"""The family of masks: each is its dense formula, on every path to the loss."""

import math

import pytest
import torch
from helpers.loss_cases import (
    MIXES,
    assert_near,
    loss_and_gradients,
    make_case,
    reference_of_linear,
)

from fastlt_kernels import (
    ClassGraph,
    linear_neighbor_silencing_loss,
    logits_loss,
    neighbor_silencing_loss,
    reference_loss,
)
from fastlt_kernels._impl import triton_rows
from fastlt_kernels.graph import MASKS
from fastlt_kernels.reference import silenced_mask

every_mask = pytest.mark.parametrize("name", MASKS)
TARGETS, CLASSES = 4, 9
PAIRS = [(0, 4), (0, 5), (1, 5), (2, 8)]
FEW = torch.tensor([True, False, True, False])


def dense(name: str) -> torch.Tensor:
    """Return which class (column) each label (row) silences, by the words of the release."""
    mask = torch.zeros(CLASSES, CLASSES, dtype=torch.bool)
    pairs = [pair for pair in PAIRS if not name.startswith("few-shot") or FEW[pair[0]]]
    rows_of_targets = name in (
        "both",
        "target-rows",
        "few-shot",
        "few-shot-target-rows",
        "both-back",
    )
    rows_of_auxiliaries = name.removeprefix("few-shot-") in (
        "both",
        "few-shot",
        "auxiliary-rows",
        "both-back",
        "auxiliary-rows-back",
    )
    for target, auxiliary in pairs:
        mask[target, auxiliary] |= rows_of_targets
        mask[auxiliary, target] |= rows_of_auxiliaries
    if name.endswith("-back"):  # auxiliaries ignore all other auxiliaries
        mask[TARGETS:, TARGETS:] = True
    if name.endswith("-alone"):  # auxiliaries compete with nothing
        mask[TARGETS:] = True
    if name == "normal":  # targets see targets and their auxiliaries, auxiliaries targets
        mask[:, TARGETS:] = True
        for target, auxiliary in PAIRS:
            mask[target, auxiliary] = False
    mask.fill_diagonal_(False)
    return mask


@every_mask
def test_a_mask_silences_what_the_release_says(name):
    graph = ClassGraph.from_pairs(TARGETS, CLASSES, PAIRS).masked(name, FEW)
    labels = torch.arange(CLASSES)
    expected = dense(name)
    assert torch.equal(silenced_mask(graph, labels, CLASSES), expected)
    assert torch.equal(graph.silenced_by(labels), expected)
    assert graph.silenced_counts(labels).tolist() == expected.sum(dim=1).tolist()
    assert graph.silences == bool(expected.any())


def test_masks_that_do_not_exist_or_lack_their_targets_are_refused():
    graph = ClassGraph.from_pairs(TARGETS, CLASSES, PAIRS)
    with pytest.raises(ValueError, match="mask must be one of none, both"):
        graph.masked("sideways")
    with pytest.raises(ValueError, match="few_shot must be given"):
        graph.masked("few-shot")


def case_of(name, *, rows=9, targets=6, classes=70, width=5, **options):
    case = make_case(rows, targets, classes, width, **options)
    few = torch.arange(targets) % 2 == 0
    case.options["graph"] = case.options["graph"].masked(name, few)
    return case


def check_logits(case, dtype=torch.float64, tolerance=1e-10, **options):
    wanted, logits = case.logits(torch.float64), case.logits(dtype)
    expected = loss_and_gradients(reference_loss(wanted, case.target, **case.options), [wanted])
    got = neighbor_silencing_loss(logits, case.target, **case.options, **options)
    assert_near(loss_and_gradients(got, [logits]), expected, tolerance)


@every_mask
@pytest.mark.parametrize("way", [2**62, 0], ids=["plain", "blocks"])
@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("silence", [0.0, 0.1])
def test_logits_are_the_reference(monkeypatch, name, way, mix, silence):
    monkeypatch.setattr(logits_loss, "FUSE_FROM_LOGITS", way)
    for label_smoothing in (0.0, 0.1):
        check_logits(case_of(name, mix=mix, silence=silence, label_smoothing=label_smoothing))


@every_mask
@pytest.mark.parametrize("whole", [True, False], ids=["whole rows", "long rows"])
def test_triton_is_the_reference(monkeypatch, name, whole):
    if not whole:
        cut = triton_rows.Cut(16, 1, 1)
        monkeypatch.setattr(triton_rows, "plan_cut", lambda *_: cut)
    for mix, silence, label_smoothing in ((None, 0.1, 0.1), ("rows", 0.0, 0.0)):
        case = case_of(name, rows=5, mix=mix, silence=silence, label_smoothing=label_smoothing)
        check_logits(case, torch.float32, 1e-5, backend="triton")


@every_mask
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_from_features_it_is_the_reference(name, backend):
    """Chunks are so small that a tile begins amid targets, and amid auxiliaries."""
    for mix, label_smoothing in ((None, 0.1), ("rows", 0.0)):
        case = case_of(name, rows=7, mix=mix, label_smoothing=label_smoothing)
        dtype = torch.float64 if backend == "torch" else torch.float32
        exact, inputs = case.inputs(torch.float64), case.inputs(dtype)
        wanted = loss_and_gradients(reference_of_linear(case, exact), exact)
        features, weight, bias = inputs
        got = linear_neighbor_silencing_loss(
            features,
            weight,
            case.target,
            bias=bias,
            **case.options,
            backend=backend,
            chunk_bytes=600,
        )
        tolerance = 1e-10 if backend == "torch" else 1e-5
        assert_near(loss_and_gradients(got, inputs), wanted, tolerance)


@every_mask
def test_ignored_rows_and_infinite_logits_have_no_say(name):
    case = case_of(name, mix="rows", label_smoothing=0.0, silence=0.0)
    case.target[2], case.options["target_b"][2] = -100, -100
    check_logits(case)
    check_logits(case, torch.float32, 1e-5, backend="triton")


def test_an_auxiliary_that_competes_with_nothing_has_no_loss():
    case = case_of("auxiliary-rows-alone", silence=0.0)
    case.target[:] = torch.arange(9) + 6
    logits = case.logits(torch.float64)
    loss = neighbor_silencing_loss(logits, case.target, **case.options)
    loss.backward()
    assert math.isclose(loss.item(), 0, abs_tol=1e-12) and logits.grad.abs().max() < 1e-12
