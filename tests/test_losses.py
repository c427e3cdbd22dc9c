import math

import pytest
import torch
from torch.nn import functional as F

from fastlt.classes import ClassSpace
from fastlt.errors import UserError
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
