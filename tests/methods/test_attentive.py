"""Routing by agreement and its controls, held to their formulas, position by position."""

import pytest
import torch
from helpers.method_cases import QUIET, batch_of, config_of, prepared, trained
from safetensors.torch import load_file
from torch.nn import functional as F

from fastlt.errors import UserError
from fastlt.evaluation.evaluate import evaluate_run
from fastlt.evaluation.export import export_run
from fastlt.methods.attentive import (
    MeanHead,
    Method,
    RoutingClassifier,
    RoutingHead,
    margin_loss,
    margin_of,
    routed,
    squash,
)
from fastlt.models.classifier import build_model
from fastlt.models.export import load_exported
from fastlt.training.loop import open_packs, train
from fastlt.training.setup import prepare

CLASSIFIERS = ("routing", "crt", "tau-norm", "ncm", "lws")


@pytest.fixture(params=range(3))
def case(request):
    """Positions (N, I, D) and maps (C, D, q), in float64."""
    generator = torch.Generator().manual_seed(request.param)
    n, i, c, d, q = (int(torch.randint(2, 7, (), generator=generator)) for _ in range(5))
    x = torch.randn(n, i, d, generator=generator, dtype=torch.float64)
    return x, torch.randn(c, d, q, generator=generator, dtype=torch.float64)


def slowly(x, weight, rounds):
    """Return the capsules of one image x (I, D), vote by vote, and the last shares."""
    classes, positions = len(weight), len(x)
    votes = [[weight[o].T @ x[i] for i in range(positions)] for o in range(classes)]
    agreement = torch.zeros(classes, positions, dtype=x.dtype)
    for _ in range(rounds):
        shares = torch.zeros_like(agreement)
        for i in range(positions):
            shares[:, i] = agreement[:, i].exp() / agreement[:, i].exp().sum()
        capsules = []
        for o in range(classes):
            total = sum(shares[o, i] * votes[o][i] for i in range(positions))
            length = total.norm()
            capsules.append(total / length * length**2 / (1 + length**2))
        for o in range(classes):
            for i in range(positions):
                agreement[o, i] = capsules[o] @ votes[o][i]
    return torch.stack(capsules), shares


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_routing_is_its_formula(case, rounds):
    x, weight = case
    got = routed(x, weight, rounds)
    for image, capsules in zip(x, got, strict=True):
        expected, shares = slowly(image, weight, rounds)
        torch.testing.assert_close(capsules, expected)
        torch.testing.assert_close(shares.sum(dim=0), torch.ones(len(image), dtype=x.dtype))
        if rounds == 1:
            assert torch.equal(shares, torch.full_like(shares, 1 / len(weight)))
    assert (got.norm(dim=2) < 1).all()


def test_positions_have_no_order(case):
    x, weight = case
    order = torch.randperm(x.shape[1])
    torch.testing.assert_close(routed(x[:, order], weight, 4), routed(x, weight, 4))


def test_one_round_of_one_number_ranks_as_pooled_products(case):
    x, weight = case
    lengths = routed(x, weight[:, :, :1], 1).norm(dim=2)
    products = (x.sum(dim=1) @ weight[:, :, 0].T).abs()
    assert torch.equal(lengths.argsort(dim=1), products.argsort(dim=1))


def test_a_vector_of_nothing_is_squashed_to_nothing():
    v = torch.zeros(2, 3, requires_grad=True)
    squash(v).sum().backward()
    assert squash(v).abs().max() == 0 and v.grad.isfinite().all()
    long = torch.tensor([3.0, 4.0])
    torch.testing.assert_close(squash(long), long / 5 * 25 / 26)


def test_the_margin_loss_is_its_formula():
    scores, labels = torch.rand(6, 5), torch.tensor([0, 4, 2, 2, 1, 3])
    got = margin_loss(scores, labels)
    for s, y, loss in zip(scores, labels.tolist(), got, strict=True):
        others = [max(0.0, s[o].item() - 0.1) ** 2 for o in range(5) if o != y]
        expected = max(0.0, 0.9 - s[y].item()) ** 2 + 0.5 * sum(others) / 4
        assert loss.item() == pytest.approx(expected, rel=1e-5)
    other, mix = labels.flip(0), torch.rand(6)
    mixed = (mix * got + (1 - mix) * margin_loss(scores, other)).mean()
    torch.testing.assert_close(margin_of(scores, labels, other, mix), mixed)


# --- as a method


@pytest.mark.parametrize("kind", CLASSIFIERS)
def test_every_classifier_trains_evaluates_and_is_exported(small_pack, tmp_path, kind):
    settings = [f"method.classifier={kind}", "method.epochs=2", "train.keep=99"]
    run = trained(small_pack, tmp_path / "run", "attentive", *settings)
    saved = sorted((run / "checkpoints").iterdir())
    first, last = (load_file(saved[i] / "model.safetensors") for i in (1, -1))
    still = [key for key in first if key.startswith("backbone.")]
    assert all(torch.equal(first[key], last[key]) for key in still)  # batch norm too
    model, names = load_exported(run / "model.safetensors")
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, len(names))
    expected = {"routing": RoutingHead, "ncm": MeanHead}.get(kind)
    assert expected is None or isinstance(model.head, expected)
    config = config_of(small_pack, "attentive", *settings)
    assert evaluate_run(run)["per_class"] == train(config, run, QUIET)["per_class"]


@pytest.mark.parametrize("kind", ["routing", "crt", "ncm", "lws"])
def test_a_finished_run_takes_the_place_of_the_first_stage(small_pack, tmp_path, kind):
    start = trained(small_pack, tmp_path / "start", "plain")
    settings = [f"method.classifier={kind}", "method.epochs=1", f"method.start={start}"]
    run = trained(small_pack, tmp_path / "run", "attentive", *settings)
    ours, theirs = (load_file(place / "model.safetensors") for place in (run, start))
    still = [key for key in theirs if key.startswith("backbone.")]
    assert all(torch.equal(ours[key], theirs[key]) for key in still)
    if kind == "lws":  # rows point where they did
        factor = ours["head.weight"] / theirs["head.weight"]
        assert factor.std(dim=1).max() < 1e-4 and (factor - 1).abs().max() > 1e-4


def in_second_stage(trainer, features=None):
    """Put a trainer's method into its second stage."""
    method = trainer.method
    method.enter_stage(1, method.task)
    if features is not None:
        method.start_stage(features)
    method.model.eval()
    return method


def test_a_linear_second_stage_is_crt_exactly(small_pack, tmp_path):
    settings = ["method.classifier=crt", "loss.name=ce"]
    with prepared(small_pack, tmp_path / "run", "attentive", *settings) as trainer:
        before = trainer.model.head.weight.clone()
        images, target = batch_of(trainer)
        method = in_second_stage(trainer, features=object())
        head = method.model.head
        assert not torch.equal(head.weight, before) and head.bias.abs().max() == 0
        expected = F.cross_entropy(head(method.model.backbone(images)), target)
        torch.testing.assert_close(method(images, target).loss, expected)
        second = trainer.stages[1]
        assert second.trained == ("model.head.",)
        assert second.settings["data.target_sampling"] == "class-balanced"


def test_its_crt_takes_the_step_of_the_preset(small_pack, tmp_path):
    """Two implementations of one paper: from one start and head, loss and gradient are the same."""
    settings = ["data.auxiliary=false", "loss.name=ce", "loss.label_smoothing=0"]
    start = trained(small_pack, tmp_path / "start", "plain", *settings)
    ours = [*settings, "method.classifier=crt", f"method.start={start}"]
    with prepared(small_pack, tmp_path / "a", "attentive", *ours) as trainer:
        images, target = batch_of(trainer)
        method, head = in_second_stage(trainer), trainer.model.head
        loss = method(images, target).loss
        gradient = torch.autograd.grad(loss, list(head.parameters()))
        sampling = trainer.stages[0].settings["data.target_sampling"]
    config = config_of(small_pack, "crt", start=str(start))
    with prepare(config, tmp_path / "b", open_packs(config.data)) as trainer:
        assert trainer.config.data.target_sampling == sampling
        trainer.model.eval().head.load_state_dict(head.state_dict())
        other = trainer.method(images, target).loss
        torch.testing.assert_close(other, loss)
        rows = list(trainer.model.head.parameters())
        torch.testing.assert_close(torch.autograd.grad(other, rows), gradient)


def test_the_first_stage_is_the_configured_loss_of_a_linear_head(small_pack, tmp_path):
    for kind in CLASSIFIERS:
        setting = f"method.classifier={kind}"
        with prepared(small_pack, tmp_path / kind, "attentive", setting) as trainer:
            method, images = trainer.method, batch_of(trainer)[0]
            target = batch_of(trainer)[1]
            method.model.eval()
            head = method.first if kind in ("routing", "ncm") else method.model.head
            expected = method.loss(head(method.model.backbone(images)), target)
            torch.testing.assert_close(method(images, target).loss, expected)


@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("loss", ["margin", "configured"])
def test_the_second_stage_routes_by_its_loss(small_pack, tmp_path, loss, unit):
    settings = [f"method.loss={loss}", "method.dropout=0", f"method.unit_length={unit}".lower()]
    with prepared(small_pack, tmp_path / "run", "attentive", *settings) as trainer:
        images, target = batch_of(trainer)
        method = in_second_stage(trainer)
        model = method.model
        assert isinstance(model, RoutingClassifier)
        maps = model.maps(images)
        positions = torch.stack([m.flatten(1).T for m in maps])
        if unit:
            positions = positions / positions.norm(dim=2, keepdim=True)
        scores = routed(positions, model.head.weight, 5).norm(dim=2)
        torch.testing.assert_close(model(images), 16 * scores)
        expected = (
            margin_loss(scores, target).mean()
            if loss == "margin"
            else method.loss(16 * scores, target)
        )
        torch.testing.assert_close(method(images, target).loss, expected)
        predicting = method.predictor()
        assert predicting.head.weight.shape[0] == trainer.space.num_targets
        routed_to = routed(positions, model.head.weight[:3], 5).norm(dim=2)
        torch.testing.assert_close(predicting(images), 16 * routed_to)


class Given:
    """Training images of a stage."""

    def __init__(self, features, labels):
        self.features, self.labels = lambda: features, labels


def test_the_nearest_class_mean_is_by_cosine(small_pack, tmp_path):
    setting = "method.classifier=ncm"
    with prepared(small_pack, tmp_path / "run", "attentive", setting) as trainer:
        features, labels = torch.rand(30, 64), torch.arange(30) % 4  # the last class has none
        method = in_second_stage(trainer, Given(features, labels))
        unit = features / features.norm(dim=1, keepdim=True)
        means = torch.stack([unit[labels == c].mean(dim=0) for c in range(4)])
        torch.testing.assert_close(method.model.head.weight[:4], means)
        assert method.model.head.weight[4].abs().max() == 0
        logits = method.model.head(features)
        expected = 16 * F.cosine_similarity(features[:, None], means[None], dim=2)
        torch.testing.assert_close(logits[:, :4], expected)
        torch.testing.assert_close(method(features, labels).loss, method.loss(logits, labels))


def test_tau_norm_and_factors_are_folded_into_rows(small_pack, tmp_path):
    settings = ["method.classifier=tau-norm", "method.tau=0.7"]
    with prepared(small_pack, tmp_path / "a", "attentive", *settings) as trainer:
        rows = trainer.model.head.weight
        expected = torch.stack([row / row.norm() ** 0.7 for row in rows])
        head = trainer.method.predictor().head
        torch.testing.assert_close(head.weight, expected)
        assert head.bias.abs().max() == 0
    with prepared(small_pack, tmp_path / "b", "attentive", "method.classifier=lws") as trainer:
        images, target = batch_of(trainer)
        method = in_second_stage(trainer)
        torch.nn.init.uniform_(method.factors, 0.5, 2)
        torch.nn.init.normal_(method.model.head.bias)
        logits = method.factors * method.model(images)
        torch.testing.assert_close(method(images, target).loss, method.loss(logits, target))
        torch.testing.assert_close(method.predictor()(images), logits)
        assert trainer.stages[1].trained == ("factors",)


def test_what_does_not_fit_is_refused(small_pack, tmp_path):
    config = config_of(small_pack, "attentive", "model.head=cosine")
    with pytest.raises(UserError, match=r"attentive has a head of its own: set model.head=linear"):
        Method.build(config.method, build_model(config.model, 5, 16))
    with (
        pytest.raises(UserError, match=r"tau-norm trains nothing on a finished run"),
        prepared(small_pack, tmp_path, "attentive", "method.classifier=tau-norm", "method.start=x"),
    ):
        pass


def test_a_run_of_another_backbone_is_no_start(small_pack, tmp_path):
    other = trained(
        small_pack, tmp_path / "other", "plain", "model.name=resnet14", "train.epochs=1"
    )
    with (
        pytest.raises(UserError, match=r"model\.safetensors"),
        prepared(small_pack, tmp_path / "run", "attentive", f"method.start={other}"),
    ):
        pass


@pytest.mark.parametrize("kind", [pytest.param("routing", marks=pytest.mark.slow), "ncm"])
def test_the_exported_model_takes_any_batch(small_pack, tmp_path, kind):
    run = trained(
        small_pack, tmp_path / "run", "attentive", "train.epochs=1", f"method.classifier={kind}"
    )
    assert "gives the same logits" in export_run(run, tmp_path / "model.onnx")


def test_few_shot_recall_rises_in_the_second_stage():
    """Overlapping classes with 200 and 5 images: a linear head of all images, and then routing.

    The head is trained by cross entropy on images as they come, the capsules on as many of each.
    """
    torch.manual_seed(0)
    counts, width = torch.tensor([200, 200, 5, 5]), 6
    labels, tested = (torch.arange(4).repeat_interleave(n) for n in (counts, torch.tensor(50)))
    centres = 0.6 * torch.randn(4, width)
    x, unseen = (centres[y][:, None] + torch.randn(len(y), 9, width) for y in (labels, tested))

    def least(loss_of, parameters):
        search = torch.optim.Adam(parameters, lr=0.03)
        for _ in range(200):
            search.zero_grad()
            loss_of().backward()
            search.step()

    head = torch.nn.Linear(width, 4)
    least(lambda: F.cross_entropy(head(x.mean(1)), labels), list(head.parameters()))
    weight = torch.randn(4, width, 4).mul_(0.3).requires_grad_()
    balance = (1 / counts[labels]) / 4

    def scores(positions):
        return routed(positions, weight, 3).norm(dim=2)

    least(lambda: (balance * margin_loss(scores(x), labels)).sum(), [weight])
    rare = tested >= 2
    with torch.no_grad():
        found = [head(unseen.mean(1)), scores(unseen)]
    first, second = ((z.argmax(1) == tested)[rare].float().mean() for z in found)
    assert second > first + 0.1
