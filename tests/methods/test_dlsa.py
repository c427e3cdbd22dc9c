"""Distribution alignment: the flow, its losses and the routing, held to their formulas."""

import math

import pytest
import torch
from helpers.method_cases import QUIET, config_of, prepared, trained
from torch.nn import functional as F

from fastlt.errors import UserError
from fastlt.evaluation.export import export_run
from fastlt.methods.dlsa import (
    NEVER,
    AlignedClassifier,
    Method,
    class_weights,
    threshold_of,
    unevenness,
)
from fastlt.methods.method import StageData
from fastlt.models.classifier import build_model
from fastlt.models.export import load_exported
from fastlt.models.flows import Flow, FlowNorm, MaskedBlock
from fastlt.training.dry_run import dry_run

SHORT = ["method.flow_epochs=2", "method.classifier_epochs=2", "method.clusters=4"]


def flow_of(width=5, clusters=3, seed=0):
    torch.manual_seed(seed)
    flow = Flow(width, clusters).double()
    for parameter in flow.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    for norm in flow.norms:
        norm.mean.normal_()
        norm.variance.uniform_(0.5, 2)
    return flow.eval()


def test_a_block_sees_only_the_features_before():
    torch.manual_seed(3)
    block = MaskedBlock(6).double()
    for parameter in (block.hidden.weight, block.out.weight):
        torch.nn.init.normal_(parameter)
    torch.nn.init.zeros_(block.hidden.bias)
    seen = torch.zeros(6, 6, dtype=torch.bool)
    for x in torch.randn(20, 6, dtype=torch.float64):
        jacobian = torch.autograd.functional.jacobian(lambda v: block(v[None])[0][0], x)
        assert jacobian.triu(1).abs().max() == 0
        torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], block(x[None])[1][0])
        seen |= jacobian != 0
    assert torch.equal(seen, torch.ones(6, 6).tril().bool())


def test_log_determinants_are_those_of_the_whole_flow():
    flow, x = flow_of(), torch.randn(4, 5, dtype=torch.float64)
    u, found = flow.latent(x)
    for row, expected in zip(x, found, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda v: flow.latent(v[None])[0][0], row)
        torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], expected)
    assert u.shape == x.shape


def inverse(block, u):
    """Invert a block feature by feature, as each depends only on those before."""
    x = torch.zeros_like(u)
    for i in range(u.shape[1]):
        inside = F.relu(F.linear(x, block.hidden.weight * block.sees, block.hidden.bias))
        out = F.linear(inside, block.out.weight * block.seen_by, block.out.bias)
        shift, scale = out.chunk(2, dim=1)
        scale = 5 * torch.tanh(scale / 5)
        x[:, i] = u[:, i] * scale[:, i].exp() + shift[:, i]
    return x


def test_the_flow_can_be_inverted():
    flow, x = flow_of(), torch.randn(4, 5, dtype=torch.float64)
    u, _ = flow.latent(x)
    for block, norm in zip(reversed(flow.blocks), reversed(flow.norms), strict=True):
        u = u.flip(1)
        scale = norm.scale - 0.5 * torch.log(norm.variance + 1e-5)
        u = inverse(block, (u - norm.shift) / scale.exp() + norm.mean)
    torch.testing.assert_close(u, x)


def test_the_norm_uses_the_batch_and_keeps_a_running_mean():
    torch.manual_seed(0)
    norm, x = FlowNorm(3).double(), torch.randn(20, 3, dtype=torch.float64) * 2 + 1
    out, log_det = norm(x)
    torch.testing.assert_close(out.mean(dim=0), torch.zeros(3, dtype=torch.float64))
    expected = -0.5 * torch.log(x.var(dim=0, correction=0) + 1e-5).sum()
    torch.testing.assert_close(log_det, expected)
    torch.testing.assert_close(norm.mean, 0.1 * x.mean(dim=0))


def test_likelihood_and_posterior_are_of_a_mixture():
    flow, x = flow_of(), torch.randn(6, 5, dtype=torch.float64)
    likelihood, posterior = flow(x)
    u, log_det = flow.latent(x)
    joint = (
        torch.stack(
            [
                torch.distributions.MultivariateNormal(centre, torch.eye(5).double()).log_prob(u)
                for centre in flow.centres
            ],
            dim=1,
        )
        + log_det[:, None]
    )
    torch.testing.assert_close(likelihood, joint.logsumexp(dim=1) - math.log(3))
    torch.testing.assert_close(posterior, joint.log_softmax(dim=1))
    assert "centres" in dict(flow.named_buffers())  # they stand still


def test_evenness_is_lost_between_0_and_log_k():
    even = torch.full((8,), 1 / 8, dtype=torch.float64)
    one = F.one_hot(torch.tensor(2), 8).double()
    for p in (even, one, torch.rand(8, dtype=torch.float64).softmax(0)):
        shifted = p + 1e-7  # which each share has added
        torch.testing.assert_close(unevenness(p), math.log(8) + (shifted * shifted.log()).sum())
    assert unevenness(even).abs() < 2e-6 and (unevenness(one) - math.log(8)).abs() < 2e-5


def test_rare_classes_count_by_the_power_of_their_inverse_count():
    weights = class_weights([8, 4, 1, 0], 2.0)
    raw = torch.tensor([1.0, 4.0, 64.0, 0.0])
    torch.testing.assert_close(weights, raw / raw.sum())


@pytest.mark.parametrize("count", [10, 33, 100])
def test_the_likeliest_share_is_routed(count):
    likelihood = torch.randn(count)
    routed = (likelihood >= threshold_of(likelihood, 0.3)).sum().item()
    assert abs(routed - 0.3 * count) <= 1
    assert threshold_of(likelihood, 0.0) == NEVER


@pytest.fixture
def trainer(small_pack, tmp_path):
    with prepared(small_pack, tmp_path / "run", "dlsa", *SHORT, "method.depth=2") as trainer:
        yield trainer


def given(trainer, count=60):
    generator = torch.Generator().manual_seed(1)
    features = torch.rand(count, 64, generator=generator)
    return StageData(torch.arange(count) % 5, lambda: features), features


@pytest.mark.parametrize("seed", range(3))
def test_the_loss_of_a_flow_is_its_three_parts(trainer, monkeypatch, seed):
    method = trainer.method
    method.enter_stage(1, method.task)
    data, features = given(trainer, 12)
    labels, left = data.labels, torch.arange(12) % 4 != 0
    drawn = torch.rand(12, generator=torch.Generator().manual_seed(seed))
    monkeypatch.setattr(torch, "rand", lambda *_, **__: drawn)
    order = drawn.argsort()
    method.eval()
    for step in (1, 2):
        before = method.balance.clone()
        loss = method.flow_loss(features, labels, left)
        likelihood, posterior = method.model.levels[0].flow(features)
        weights = class_weights(trainer.space.train_counts, 2.0)
        kept = [i for i in range(12) if left[i]]
        lost = sum(-likelihood[i] * weights[labels[i]] for i in kept) / len(kept)
        mean = posterior.exp()[kept].mean(dim=0)
        running = 0.7 * before + 0.3 * mean
        pairs = [(i, int(order[i])) for i in kept if left[order[i]]]
        pairs = [(i, j) for i, j in pairs if labels[i] != labels[j]]
        mixed = sum((posterior[i].exp() * posterior[j]).sum() for i, j in pairs) / len(pairs)
        expected = 2 * lost + unevenness(running / (1 - 0.7**step)) + 0.02 * mixed
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(method.balance, running.detach())


def test_one_cluster_without_balance_is_the_likelihood_alone(small_pack, tmp_path):
    settings = ["method.clusters=1", "method.balance=0", "method.purity=0", "method.tail=0"]
    with prepared(small_pack, tmp_path / "run", "dlsa", *settings) as trainer:
        method = trainer.method
        method.enter_stage(1, method.task)
        _, features = given(trainer, 10)
        flow = method.model.levels[0].flow.eval()
        u, log_det = flow.latent(features)
        normal = torch.distributions.Normal(flow.centres[0], 1.0)
        expected = -(normal.log_prob(u).sum(dim=1) + log_det).mean() / 5 * 2
        loss = method.flow_loss(features, torch.arange(10) % 5, torch.ones(10).bool())
        torch.testing.assert_close(loss, expected)


def test_levels_take_their_share_of_what_is_left(trainer):
    method, model = trainer.method, trainer.model
    data, features = given(trainer)
    for stage in (1, 2, 3):
        method.enter_stage(stage, method.task)
        method.start_stage(data)
    model.eval()
    route, cluster = model.routes(features, 2)
    counts = torch.bincount(route, minlength=3).tolist()
    assert abs(counts[0] - 18) <= 1 and abs(counts[1] - 0.3 * 42) <= 1
    likelihood = model.levels[0].flow(features)[0]
    assert likelihood[route == 0].min() >= likelihood[route != 0].max()
    for number in (0, 1):
        shares = method.frequencies[number]
        torch.testing.assert_close(shares.sum(dim=1), torch.ones(4))
        for k in range(4):
            labels = data.labels[(route == number) & (cluster == k)]
            if len(labels):
                expected = torch.bincount(labels, minlength=5) / len(labels)
                torch.testing.assert_close(shares[k], expected)


def test_each_feature_is_classified_by_its_route(trainer):
    method, model = trainer.method, trainer.model
    data, features = given(trainer)
    for stage in (1, 2, 3):
        method.enter_stage(stage, method.task)
        method.start_stage(data)
    for part in (*method.aids.parameters(), *(level.rows for level in model.levels)):
        torch.nn.init.normal_(part)
    method.eval()
    route, cluster = model.routes(features, 2)
    logits = []
    for x, r, k in zip(features, route.tolist(), cluster.tolist(), strict=True):
        if r == 2:
            logits.append(model.head(x))
            continue
        aid = method.aids[r]
        shares = method.frequencies[r][k]
        both = torch.cat([model.levels[r].rows, aid.weight], dim=1) @ torch.cat([x, shares])
        logits.append(both + aid.bias)  # [x; P_k] is the sum of two linear maps
    expected = method.loss(torch.stack(logits), data.labels)
    torch.testing.assert_close(method(features, data.labels).loss, expected)
    predicting = method.predictor().predicting(3)
    found = predicting.routed(features, route, cluster, [one.biases for one in predicting.levels])
    torch.testing.assert_close(found, torch.stack(logits)[:, :3])


def test_classifiers_begin_as_the_head(trainer):
    method = trainer.method
    data, features = given(trainer)
    for stage in (1, 2, 3):
        method.enter_stage(stage, method.task)
        method.start_stage(data)
    method.eval()
    expected = method.loss(method.model.head(features), data.labels)
    torch.testing.assert_close(method(features, data.labels).loss, expected)


def test_where_nothing_is_routed_it_is_a_new_head_alone(small_pack, tmp_path):
    with prepared(small_pack, tmp_path / "run", "dlsa", *SHORT, "method.share=0") as trainer:
        method = trainer.method
        data, features = given(trainer)
        for stage in (1, 2):
            method.enter_stage(stage, method.task)
            method.start_stage(data)
        method.eval()
        torch.nn.init.normal_(method.aids[0].weight)
        loss = method(features, data.labels).loss
        torch.testing.assert_close(loss, method.loss(method.model.head(features), data.labels))
        loss.backward()
        assert method.model.levels[0].rows.grad.abs().max() == 0


def test_stages_train_what_they_name(trainer):
    stages = trainer.stages
    assert [stage.name for stage in stages] == ["backbone", "flow 1", "flow 2", "classifiers"]
    assert stages[2].trained == ("model.levels.1.flow.",)
    assert [stage.features for stage in stages] == [False, True, True, True]
    assert stages[3].settings["data.target_sampling"] == "once"
    # the model that predicts stands still in a flow's stage: it is evaluated once
    assert stages[1].settings["train.eval_every"] == stages[1].settings["train.epochs"] == 2


def test_a_run_gives_the_backbone_and_prediction_is_the_same_routing(small_pack, tmp_path):
    start = trained(small_pack, tmp_path / "start", "plain")
    run = trained(small_pack, tmp_path / "run", "dlsa", *SHORT, f"method.backbone={start}")
    model, names = load_exported(run / "model.safetensors")
    assert isinstance(model, AlignedClassifier) and len(names) == 3
    assert model.levels[0].biases.shape == (4, 3)
    assert model.levels[0].threshold < NEVER
    given_model = load_exported(start / "model.safetensors")[0]
    given_backbone = given_model.backbone.state_dict()
    for key, value in model.backbone.state_dict().items():
        assert torch.equal(value, given_backbone[key])
    settings = [*SHORT, f"method.backbone={start}"]
    with prepared(small_pack, tmp_path / "again", "dlsa", *settings) as trainer:
        assert torch.equal(trainer.model.head.weight[:3], given_model.head.weight)
        assert torch.equal(trainer.model.head.bias[:3], given_model.head.bias)
    with pytest.raises(UserError, match=r"the training begins with features"):
        dry_run(config_of(small_pack, "dlsa", *settings), 1, QUIET)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.head=cosine", r"has no linear head: name a run of model.head=linear"),
        ("model.name=resnet14", r"does not fit the model"),
    ],
)
def test_a_run_that_does_not_fit_is_refused(small_pack, tmp_path, setting, message):
    loss = "loss.name=ce"
    start = trained(small_pack, tmp_path / "start", "plain", loss, setting, "train.epochs=1")
    with (
        pytest.raises(UserError, match=message),
        prepared(small_pack, tmp_path / "run", "dlsa", *SHORT, f"method.backbone={start}"),
    ):
        pass


def test_a_run_of_other_targets_is_refused(small_pack, tmp_path, monkeypatch):
    start = trained(small_pack, tmp_path / "start", "plain", "train.epochs=1")
    model, _ = load_exported(start / "model.safetensors")
    monkeypatch.setattr("fastlt.methods.method.load_exported", lambda _: (model, ["a", "b", "z"]))
    with (
        pytest.raises(UserError, match=r"was trained for other targets"),
        prepared(small_pack, tmp_path / "run", "dlsa", *SHORT, f"method.backbone={start}"),
    ):
        pass


def test_the_exported_model_takes_any_batch(small_pack, tmp_path):
    run = trained(small_pack, tmp_path / "run", "dlsa", *SHORT, "train.epochs=1")
    assert "gives the same logits" in export_run(run, tmp_path / "model.onnx")


def test_another_head_is_refused(small_pack):
    config = config_of(small_pack, "dlsa", "model.head=cosine")
    with pytest.raises(UserError, match=r"dlsa has a head of its own: set model.head=linear"):
        Method.build(config.method, build_model(config.model, 5, 16))
