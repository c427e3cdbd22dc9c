import math

import pytest
import torch
from torch.nn import functional as F

from fastlt.classes import ClassSpace
from fastlt.config import load_config
from fastlt.errors import ConfigError, UserError
from fastlt.losses import (
    FUSE_FROM_CLASSES,
    LOSSES,
    Task,
    build_loss,
    effective_number_weights,
    log_prior,
    margins,
    section,
    silencing_graph,
    smoothing_by_class,
)
from fastlt.models.classifier import Classifier
from fastlt.models.heads import CosineHead, LinearHead
from fastlt_kernels.reference import reference_loss

TARGETS, AUXILIARIES = 5, 7
COUNTS = torch.tensor([100, 50, 20, 8, 3] + [50] * AUXILIARIES)
CPU = torch.device("cpu")
LossConfig = section()  # with the numbers of every loss


def space(pairs=((0, 5), (0, 6), (1, 6), (3, 9), (4, 11))):
    return ClassSpace(
        target_names=[f"t{i}" for i in range(TARGETS)],
        auxiliary_names=[f"a{i}" for i in range(AUXILIARIES)],
        train_counts=COUNTS.tolist(),
        val_counts=[1] * TARGETS,
        pairs=list(pairs),
    )


def model(classes=TARGETS + AUXILIARIES, cosine=False):
    torch.manual_seed(0)
    return Classifier(
        torch.nn.Identity(), CosineHead(16, classes, 30.0) if cosine else LinearHead(16, classes)
    )


def build(config, space, counts, net, epoch=0):
    loss = build_loss(Task(space, counts, config, 200, CPU), net.head)
    loss.begin(epoch)
    return loss


def value(config, mixed=False, epoch=0, cosine=False):
    torch.manual_seed(1)
    net = model(cosine=cosine)
    features, target = torch.randn(33, 16), torch.randint(12, (33,))
    target_b, mix = (target.flip(0), torch.tensor(0.3)) if mixed else (None, None)
    criterion = build(config, space(), COUNTS, net, epoch)
    return criterion.step(net, features, target, target_b, mix).loss, net(features), target


def prior(tau=1.0):
    return tau * torch.log(COUNTS / COUNTS.sum())


def test_ce_is_torchs():
    loss, logits, target = value(LossConfig(name="ce", label_smoothing=0.1))
    torch.testing.assert_close(loss, F.cross_entropy(logits, target, label_smoothing=0.1))


def test_balanced_ce_adds_the_prior():
    loss, logits, target = value(LossConfig(name="balanced-ce", tau=1.05))
    torch.testing.assert_close(loss, F.cross_entropy(logits + prior(1.05), target))


@pytest.mark.parametrize("silence", [0.0, 0.1, 0.7])
@pytest.mark.parametrize("mixed", [False, True])
def test_neighbour_silencing_is_the_reference(silence, mixed):
    loss, logits, target = value(LossConfig(silence=silence, label_smoothing=0.1), mixed)
    options = {"target_b": target.flip(0), "mix": torch.tensor(0.3)} if mixed else {}
    expected = reference_loss(
        logits,
        target,
        graph=space().graph(),
        log_prior=prior(),
        silence=silence,
        label_smoothing=0.1,
        **options,
    )
    torch.testing.assert_close(loss, expected)


def test_silence_of_one_is_balanced_ce():
    assert torch.equal(value(LossConfig(silence=1.0))[0], value(LossConfig(name="balanced-ce"))[0])


@pytest.mark.parametrize("mask", ["target-rows", "auxiliary-rows"])
def test_masks_of_rows_silence_only_those(mask):
    torch.manual_seed(2)
    net, features = model(), torch.randn(12, 16)
    target = torch.arange(12)
    one = build(LossConfig(mask=mask), space(), COUNTS, net).of_logits
    both = build(LossConfig(), space(), COUNTS, net).of_logits
    off = build(LossConfig(name="balanced-ce"), space(), COUNTS, net).of_logits
    logits = net(features)
    for row in range(12):
        expected = both if (row < TARGETS) == (mask == "target-rows") else off
        torch.testing.assert_close(
            one(logits[row : row + 1], target[row : row + 1]),
            expected(logits[row : row + 1], target[row : row + 1]),
        )


def test_the_few_shot_restriction_keeps_pairs_of_rare_targets():
    graph = silencing_graph(LossConfig(mask="few-shot", few_shot_images=10), space())
    assert sorted(map(tuple, graph.pairs().tolist())) == [(3, 9), (4, 11)]


@pytest.mark.parametrize("name", ["neighbor-silencing", "focal"])
def test_hits_are_counted_among_the_targets(name):
    torch.manual_seed(3)
    net, features = model(), torch.randn(12, 16)
    best = net(features)[:, :TARGETS].argmax(dim=1)
    criterion = build(LossConfig(name=name), space(), COUNTS, net)
    # every third a target that is hit, the others auxiliaries
    target = torch.where(torch.arange(12) % 3 == 0, best, TARGETS)
    step = criterion.step(net, features, target, None, None)
    assert (step.correct, step.counted) == (4, 4)
    step = criterion.step(net, features, (best + 1) % TARGETS, None, None)
    assert (step.correct, step.counted) == (0, 12)


def test_hits_of_mixed_labels_count_their_share():
    torch.manual_seed(4)
    net, features = model(), torch.randn(12, 16)
    best = net(features)[:, :TARGETS].argmax(dim=1)
    criterion = build(LossConfig(), space(), COUNTS, net)
    step = criterion.step(net, features, best, torch.full((12,), TARGETS), torch.tensor(0.25))
    assert (step.correct, step.counted) == (3, 3)


def test_silencing_nothing_is_an_error():
    with pytest.raises(UserError, match="no pair of classes is silenced"):
        silencing_graph(LossConfig(), space(pairs=()))
    with pytest.raises(UserError, match=r"another loss\.mask"):
        silencing_graph(LossConfig(mask="few-shot", few_shot_images=2), space())
    assert silencing_graph(LossConfig(silence=1.0), space(pairs=())) is None


def test_focal_by_its_formula():
    loss, logits, target = value(LossConfig(name="focal", gamma=2.0))
    p = logits.softmax(1)[torch.arange(33), target]
    torch.testing.assert_close(loss, (-((1 - p) ** 2) * p.log()).mean())
    torch.testing.assert_close(
        value(LossConfig(name="focal", gamma=0.0))[0], F.cross_entropy(logits, target)
    )


def test_class_balanced_weights_follow_the_effective_number():
    weights = effective_number_weights(COUNTS, 0.99)
    effective = torch.tensor([(1 - 0.99**n) / (1 - 0.99) for n in COUNTS.tolist()])
    torch.testing.assert_close(weights * effective / (weights[0] * effective[0]), torch.ones(12))
    assert weights.mean().item() == pytest.approx(1, abs=1e-6)
    loss, logits, target = value(LossConfig(name="class-balanced", beta=0.99))
    torch.testing.assert_close(loss, F.cross_entropy(logits, target, weight=weights))


def test_ldam_lowers_the_true_class_by_its_margin():
    assert margins(COUNTS, 0.5).max().item() == pytest.approx(0.5)
    assert margins(COUNTS, 0.5)[0] / margins(COUNTS, 0.5)[4] == pytest.approx((3 / 100) ** 0.25)
    loss, logits, target = value(LossConfig(name="ldam"), cosine=True)
    lowered = logits.clone()
    for row, y in enumerate(target):
        lowered[row, y] -= 30 * margins(COUNTS, 0.5)[y]
    torch.testing.assert_close(loss, F.cross_entropy(lowered, target))


def test_label_aware_smoothing_takes_more_from_the_frequent():
    smoothing = smoothing_by_class(COUNTS, 0.4, 0.1)
    assert smoothing[0].item() == pytest.approx(0.4) and smoothing[4].item() == pytest.approx(0.1)
    for n, got in zip(COUNTS.tolist(), smoothing.tolist(), strict=True):
        assert got == pytest.approx(0.1 + 0.3 * math.sin(math.pi * (n - 3) / (2 * (100 - 3))))
    loss, logits, target = value(LossConfig(name="label-aware-smoothing"))
    mass = torch.zeros_like(logits)
    for row, y in enumerate(target):
        mass[row] = smoothing[y] / 11
        mass[row, y] = 1 - smoothing[y]
    torch.testing.assert_close(mass.sum(dim=1), torch.ones(33))
    torch.testing.assert_close(loss, F.cross_entropy(logits, mass))
    net = model()
    alike = build(LossConfig(name="label-aware-smoothing"), space(), torch.full((12,), 20), net)
    # however the classes are sampled
    torch.testing.assert_close(alike.of_logits(logits, target), loss)
    assert torch.equal(smoothing_by_class(torch.tensor([7, 7]), 0.4, 0.1), torch.tensor([0.1, 0.1]))


def test_drw_weighs_classes_only_from_its_epoch_on():
    config = LossConfig(name="ldam", drw_epoch=160)
    loss = build(config, space(), COUNTS, model(cosine=True))
    assert [loss.begin(epoch) for epoch in (0, 159, 160, 199)] == [False, False, True, True]
    assert not build(LossConfig(name="ldam"), space(), COUNTS, model(cosine=True)).begin(0)
    before, after = (value(config, epoch=epoch, cosine=True)[0] for epoch in (159, 160))
    assert torch.equal(before, value(LossConfig(name="ldam"), cosine=True)[0])
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_is_documented_and_says_what_it_goes_with(name):
    loss = LOSSES[name]
    assert loss.name == name and loss.__doc__
    fields = loss.Numbers.model_fields
    assert fields.keys() <= section().model_fields.keys()
    assert all(field.description for field in fields.values())


def test_many_classes_take_the_fused_loss_with_the_same_value():
    classes = FUSE_FROM_CLASSES
    big = ClassSpace(
        target_names=[f"t{i}" for i in range(TARGETS)],
        auxiliary_names=[f"a{i}" for i in range(classes - TARGETS)],
        train_counts=[9] * classes,
        val_counts=[1] * TARGETS,
        pairs=[(0, 7), (2, 4000)],
    )
    torch.manual_seed(3)
    net, features, target = model(classes), torch.randn(9, 16), torch.randint(classes, (9,))
    criterion = build(LossConfig(), big, torch.full((classes,), 9), net)
    assert criterion.of_features is not None
    torch.testing.assert_close(
        criterion.step(net, features, target, None, None).loss,
        criterion.of_logits(net(features), target).loss,
    )


def test_a_class_without_images_has_no_prior():
    with pytest.raises(UserError, match="class 1 has no training image"):
        log_prior(torch.tensor([3, 0, 1]), 1.0)
    assert log_prior(torch.tensor([1, 3]), 2.0)[0].item() == pytest.approx(2 * math.log(0.25))


@pytest.mark.parametrize(
    ("name", "what"), [("ldam", "margin"), ("class-balanced", "weight"), ("balanced-ce", "prior")]
)
def test_a_class_without_images_is_refused_by_losses_that_count_them(name, what):
    space = ClassSpace(target_names=["a", "b"], train_counts=[3, 2], val_counts=[1, 1])
    head = CosineHead(4, 2, 30.0) if name == "ldam" else LinearHead(4, 2)
    model = Classifier(torch.nn.Identity(), head)
    with pytest.raises(
        UserError,
        match=f"'b' has no training image in an epoch, so loss.name={name} has no {what} for it",
    ):
        build(LossConfig(name=name), space, torch.tensor([3, 0]), model)


# --- weights of rows


def some_rows():
    """Return features (33, 16) and labels of 12 classes (33,)."""
    generator = torch.Generator().manual_seed(1)
    return (
        torch.randn(33, 16, generator=generator),
        torch.randint(12, (33,), generator=generator),
    )


def weighing(name, weights, mixed=False, net=None, **numbers):
    """Return a loss by row weights, over their mean as the loop gives them, and its gradient."""
    net = model(cosine=name == "ldam") if net is None else net
    classes = net.head.weight.shape[0]
    features, target = some_rows()
    labels = (target, target.flip(0), torch.tensor(0.3)) if mixed else (target, None, None)
    counts = torch.full((classes,), 50) if classes > 12 else COUNTS
    space_ = space() if classes == 12 else wide_space(classes)
    criterion = build(LossConfig(name=name, **numbers), space_, counts, net, epoch=1)
    weights = None if weights is None else weights / weights.mean()
    loss = criterion.step(net, features, *labels, weights).loss
    return loss, torch.autograd.grad(loss, net.head.weight)[0]


def wide_space(classes):
    return ClassSpace(
        target_names=[f"t{i}" for i in range(classes)],
        train_counts=[50] * classes,
        val_counts=[1] * classes,
    )


WEIGHTED = [
    ("ce", {"label_smoothing": 0.1}),
    ("balanced-ce", {}),
    ("neighbor-silencing", {}),
    ("focal", {"gamma": 1.5}),
    ("class-balanced", {}),
    ("ldam", {}),
    ("ldam", {"drw_epoch": 1}),
    ("label-aware-smoothing", {}),
]


@pytest.mark.parametrize(("name", "numbers"), WEIGHTED)
def test_equal_weights_are_no_weights(name, numbers):
    plain, weighted = weighing(name, None, **numbers), weighing(name, torch.ones(33), **numbers)
    torch.testing.assert_close(weighted, plain)


@pytest.mark.parametrize(("name", "numbers"), WEIGHTED)
def test_the_loss_is_linear_in_the_weights(name, numbers):
    """Rows of weight 0 have no say; what is left is the mean of the others by their weights."""
    some = torch.rand(33, generator=torch.Generator().manual_seed(2)) + 0.1
    first, second = some.clone(), some.clone()
    first[:11], second[11:] = 0, 0
    numbers = {"beta": 0.0, **numbers} if name in ("class-balanced", "ldam") else numbers
    parts = weighing(name, first, **numbers), weighing(name, second, **numbers)
    shares = first.sum() / some.sum(), second.sum() / some.sum()
    for whole, *each in zip(weighing(name, some, **numbers), *parts, strict=True):
        torch.testing.assert_close(whole, shares[0] * each[0] + shares[1] * each[1])


def test_ce_by_class_weights_is_torchs():
    of_class = torch.rand(12, generator=torch.Generator().manual_seed(3))
    features, target = some_rows()
    loss, gradient = weighing("ce", of_class[target])
    net = model()
    wanted = F.cross_entropy(net(features), target, weight=of_class)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, net.head.weight)[0])


def test_weights_of_loss_and_of_rows_multiply():
    """Of class-balanced, whose own weights are by class."""
    weights = torch.rand(33, generator=torch.Generator().manual_seed(4))
    loss, _ = weighing("class-balanced", weights)
    features, target = some_rows()
    both = effective_number_weights(COUNTS, LossConfig().beta)[target] * weights
    each = F.cross_entropy(model()(features), target, reduction="none")
    torch.testing.assert_close(loss, (both * each).sum() / both.sum())


@pytest.mark.parametrize("mixed", [False, True])
def test_weights_of_mixed_rows_are_the_reference(mixed):
    weights = torch.rand(33, generator=torch.Generator().manual_seed(5))
    loss, _ = weighing("neighbor-silencing", weights, mixed)
    features, target = some_rows()
    options = {"target_b": target.flip(0), "mix": torch.tensor(0.3)} if mixed else {}
    expected = reference_loss(
        model()(features),
        target,
        graph=space().graph(),
        log_prior=prior(),
        row_weight=weights,
        **options,
    )
    torch.testing.assert_close(loss, expected)


def test_many_classes_weigh_as_few_do():
    """Where logits are never held, the weights go into the linear loss."""
    weights = torch.rand(33, generator=torch.Generator().manual_seed(6))
    net = model(FUSE_FROM_CLASSES)
    loss, gradient = weighing("ce", weights, net=net)
    features, target = some_rows()
    wanted = reference_loss(net(features), target, row_weight=weights)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(gradient, torch.autograd.grad(wanted, net.head.weight)[0])


def test_ignored_labels_do_not_count_in_the_weighted_mean():
    net = model()
    logits = net(torch.randn(6, 16, generator=torch.Generator().manual_seed(7)))
    target = torch.tensor([0, -100, 2, 3, -100, 5])
    criterion = build(LossConfig(name="ce"), space(), COUNTS, net)
    weighted = criterion.of_logits(logits, target, row_weight=torch.ones(6)).loss
    torch.testing.assert_close(weighted, criterion.of_logits(logits, target).loss)


def test_half_precision_is_divided_last():
    """The gradient of float16 logits is not divided by the rows before the loss scale comes."""
    net, scale = model(), 2.0**16
    logits = torch.randn(4096, 12, generator=torch.Generator().manual_seed(8))
    criterion = build(LossConfig(name="ce"), space(), COUNTS, net)
    found = []
    for dtype in (torch.float16, torch.float32):
        leaf = logits.to(dtype).requires_grad_()
        target = torch.arange(4096) % 12
        loss = criterion.of_logits(leaf, target, row_weight=torch.full((4096,), 1e-3)).loss
        found.append(torch.autograd.grad(loss * scale, leaf)[0].float())
    torch.testing.assert_close(found[0], found[1], rtol=0.02, atol=1e-5)


def test_a_loss_that_takes_no_weights_is_refused(monkeypatch):
    monkeypatch.setattr(LOSSES["focal"], "takes_row_weights", False)
    for setting in ("data.class_weights={a=2.0}", "data.sample_weights=weights.csv"):
        with pytest.raises(
            ConfigError, match=r"loss\.name=focal does not go with data\.class_weights"
        ):
            load_config("demo", ["loss.name=focal", setting])
