"""Prediction by angle, held to what is true of angles."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastlt.config import ModelConfig, load_config
from fastlt.errors import UserError
from fastlt.evaluation.posthoc import METHODS, Features, apply
from fastlt.methods import method_settings
from fastlt.methods.angular import AngularHead, Method, of_angle
from fastlt.models.classifier import Classifier, build_model
from fastlt.models.heads import CosineHead, LinearHead, with_values
from fastlt.training.loop import open_packs
from fastlt.training.setup import prepare


@pytest.fixture(params=range(3))
def case(request):
    """Features (N, D), rows (C, D) of unequal lengths, and a scale."""
    generator = torch.Generator().manual_seed(request.param)
    n, c, d = (int(torch.randint(3, 20, (), generator=generator)) for _ in range(3))
    features = torch.randn(n, d, generator=generator, dtype=torch.float64)
    rows = torch.randn(c, d, generator=generator, dtype=torch.float64)
    rows = rows * torch.rand(c, 1, generator=generator, dtype=torch.float64).mul(5).exp()
    return features, rows, torch.tensor(1.0 + request.param, dtype=torch.float64)


def angles(features, rows):
    """Return the angles (N, C) one by one, by the robust formula 2 atan2(|u - v|, |u + v|)."""
    found = torch.empty(len(features), len(rows), dtype=torch.float64)
    for i, f in enumerate(features):
        for j, w in enumerate(rows):
            u, v = f / f.norm(), w / w.norm()
            found[i, j] = 2 * math.atan2((u - v).norm(), (u + v).norm())
    return found


def head_of(rows, form, scale):
    return AngularHead(rows, form, scale, learns_scale=False)


def test_logits_are_those_of_the_angle_or_its_cosine(case):
    features, rows, scale = case
    theta = angles(features, rows)
    linear, cosine = (head_of(rows, form, scale)(features) for form in ("linear", "cosine"))
    torch.testing.assert_close(linear, scale * (math.pi / 2 - theta))
    torch.testing.assert_close(cosine, scale * theta.cos())
    torch.testing.assert_close(linear.softmax(1), (-scale * theta).softmax(1))
    dot = head_of(rows, "linear", scale).logits(features, "dot")
    torch.testing.assert_close(dot, features @ rows.T)


@pytest.mark.parametrize("form", ["linear", "cosine"])
def test_neither_length_counts(case, form):
    features, rows, scale = case
    expected = head_of(rows, form, scale)(features)
    longer = rows * torch.linspace(0.1, 9, len(rows), dtype=rows.dtype)[:, None]
    torch.testing.assert_close(head_of(longer, form, scale)(features), expected)
    torch.testing.assert_close(head_of(rows, form, scale)(7 * features), expected)


def test_the_smallest_angle_wins_as_the_largest_cosine_does(case):
    features, rows, scale = case
    linear, cosine = (head_of(rows, form, scale)(features) for form in ("linear", "cosine"))
    assert torch.equal(linear.argmax(1), angles(features, rows).argmin(1))
    assert torch.equal(linear.argmax(1), cosine.argmax(1))


def test_many_decisions_differ_from_those_of_the_plain_product():
    torch.manual_seed(0)
    features, rows = torch.randn(500, 16), torch.randn(10, 16) * torch.logspace(0, 1, 10)[:, None]
    differ = (head_of(rows, "linear", torch.tensor(1.0))(features).argmax(1)) != (
        features @ rows.T
    ).argmax(1)
    assert 0.1 < differ.float().mean() < 0.9


def test_rows_of_equal_length_decide_as_the_linear_head(case):
    features, rows, scale = case
    rows = F.normalize(rows, dim=1) * 3
    decided = head_of(rows, "linear", scale)(features).argmax(1)
    assert torch.equal(decided, (features @ rows.T).argmax(1))


def test_gradients_are_right_and_finite_where_the_slope_is_not(case):
    features, rows, scale = case
    head = AngularHead(rows, "linear", scale, learns_scale=True)

    def logits(x, weight, s):
        return torch.func.functional_call(head, {"weight": weight, "scale": s}, (x,))

    inputs = [part.clone().requires_grad_() for part in (features, rows, scale)]
    assert torch.autograd.gradcheck(logits, inputs)
    same = rows.clone().requires_grad_()  # angles of 0
    head(same).sum().backward()
    assert same.grad.isfinite().all() and head.weight.grad.isfinite().all()


def test_a_small_spread_of_angles_is_that_of_cosines():
    cosine = torch.linspace(-0.05, 0.05, 11, dtype=torch.float64)
    assert (of_angle(cosine) - cosine).abs().max() < 0.05**3 / 3  # the next term is x^3 / 6


def test_bfloat16_features_are_seen_in_float32(case):
    features, rows, scale = (part.float() for part in case)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head_of(rows, "linear", scale)(features.bfloat16())
    expected = head_of(rows, "linear", scale)(features.bfloat16().float())
    assert torch.equal(logits, expected) and logits.dtype == torch.float32


def test_post_hoc_raises_the_recall_of_rare_classes():
    """A linear head by cross entropy on a long tail has long rows for frequent classes."""
    torch.manual_seed(0)
    counts = torch.logspace(0, -2, 10).mul(500).int().tolist()
    centres = F.normalize(torch.randn(10, 16), dim=1) * 3
    label = torch.repeat_interleave(torch.arange(10), torch.tensor(counts))
    features = centres[label] + torch.randn(len(label), 16)
    head = LinearHead(16, 10)
    optimiser = torch.optim.SGD(head.parameters(), 0.5, momentum=0.9)
    for _ in range(300):
        optimiser.zero_grad()
        F.cross_entropy(head(features), label).backward()
        optimiser.step()
    assert head.weight[:3].norm(dim=1).mean() > head.weight[7:].norm(dim=1).mean()
    true = torch.arange(10).repeat_interleave(300)
    tested = Features(true.numpy(), true.numpy(), centres[true] + torch.randn(len(true), 16))
    model = Classifier(nn.Identity(), head)
    recall = {}
    for name in (None, "angular"):
        found = apply(METHODS.get(name), 16.0, model, tested, torch.zeros(10))
        rare = true.numpy() >= 7
        recall[name] = (found.predicted == found.label)[rare].mean()
    assert recall["angular"] > recall[None] + 0.05


# --- as a method


def config_of(*settings):
    return load_config("cifar100-siblings", settings, method_settings("angular", None))


def test_build_keeps_the_rows_and_targets_are_sliced():
    config = config_of("method.form=cosine", "method.scale=5", "model.name=resnet8")
    model = build_model(config.model, 7, 32)
    rows = model.head.weight.detach().clone()
    built = Method.build(config.method, model)
    assert isinstance(built.head, AngularHead) and torch.equal(built.head.weight, rows)
    assert not built.head.scale.requires_grad
    learning = config_of("method.learn_scale=true").method
    assert Method.build(learning, model).head.scale.requires_grad
    part = built.predicting(4)
    images = torch.randn(2, 3, 32, 32)
    built.eval()
    torch.testing.assert_close(part(images), built(images)[:, :4])
    assert part.head.weight.shape == (4, 64) and part.head.scale == 5
    other = ModelConfig(name="resnet8", head="cosine")
    with pytest.raises(UserError, match=r"angular has a head of its own: set model.head=linear"):
        Method.build(config.method, Classifier(model.backbone, with_cosine(other)))


def with_cosine(config):
    head = CosineHead(8, 4, 30.0)
    return with_values(head, head.weight)


@pytest.mark.parametrize(
    ("settings", "names", "epochs", "sampling"),
    [
        ([], ["all", "head"], 4, "class-balanced"),
        (["method.second_share=0.5", "method.balanced=false"], ["all", "head"], 20, "once"),
        (["method.second_share=0"], ["all"], None, None),
        (["method.second_share=0.001"], ["all", "head"], 1, "class-balanced"),
    ],
)
def test_the_second_stage_trains_the_head_alone(prepared, settings, names, epochs, sampling):
    with prepared("train.epochs=40", *settings) as trainer:
        stages = trainer.stages
        assert [stage.name for stage in stages] == names
        for stage in stages[1:]:
            assert stage.trained == ("model.head.",)
            assert stage.settings["train.epochs"] == epochs
            assert stage.settings["data.target_sampling"] == sampling


def test_a_first_stage_by_plain_products_is_that_loss(prepared):
    with prepared("method.first=dot") as trainer:
        method, head = trainer.method, trainer.model.head
        images = torch.randn(6, 3, 16, 16)
        target = torch.arange(6) % trainer.space.num_classes
        trainer.model.eval()
        features = trainer.model.backbone(images)
        expected = method.loss(features @ head.weight.T, target)
        torch.testing.assert_close(method(images, target).loss, expected)
        method.enter_stage(1, method.task)
        expected = method.loss(head(features), target)
        torch.testing.assert_close(method(images, target).loss, expected)
        assert "model.head.scale" not in trainer.stages[0].trained


@pytest.fixture
def prepared(small_pack, tmp_path):
    def made(*settings):
        config = config_of(
            f"data.pack={small_pack}",
            "model.name=resnet8",
            "data.size=16",
            "data.batch=16",
            "data.workers=0",
            *settings,
        )
        return prepare(config, tmp_path / "run", open_packs(config.data))

    return made
