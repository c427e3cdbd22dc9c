"""Collaborative experts: each part held to a slow loop, and the sum of them."""

import json
import math
import shutil

import pytest
import torch
from helpers.method_cases import QUIET
from helpers.method_cases import config_of as method_config
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from fastlt.classes import ClassSpace
from fastlt.config import ModelConfig, load_config
from fastlt.errors import UserError
from fastlt.evaluation.evaluate import evaluate_post_hoc, evaluate_run
from fastlt.losses import Task
from fastlt.methods.come import Method, contrast, distilled, restricted
from fastlt.models.classifier import Classifier, build_model
from fastlt.models.experts import Experts, GatedHead, divide, side_by_side
from fastlt.models.export import load_exported
from fastlt.training.loop import open_packs, train
from fastlt.training.setup import prepare
from fastlt.utils import torchvision_shim

MIXED = ["optim.ema=0.5", "augment.mixup=0.5"]


def config_of(pack, *settings):
    return method_config(pack, "come", *settings)


@pytest.fixture
def prepared(small_pack, tmp_path):
    def made(*settings):
        config = config_of(small_pack, *settings)
        return prepare(config, tmp_path / "run", open_packs(config.data))

    return made


@pytest.fixture(params=range(3))
def case(request):
    """Logits (N, C) float64 of two models, labels (N,) and a prior (C,)."""
    generator = torch.Generator().manual_seed(request.param)
    n, c = (int(torch.randint(4, 12, (), generator=generator)) for _ in range(2))
    z, other = (torch.randn(n, c, generator=generator).double() * 2 for _ in range(2))
    labels = torch.randint(c, (n,), generator=generator)
    return z, other, labels, torch.rand(c, generator=generator).double().log()


def batch_of(count=6, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 16, 16, generator=generator)
    target, target_b = (torch.randint(classes, (count,), generator=generator) for _ in range(2))
    return images, target, target_b, torch.rand(count, generator=generator)


# --- hard classes


def slow_restricted(z, prior, labels, count):
    losses = []
    for row, label in zip(z, labels.tolist(), strict=True):
        order = sorted((c for c in range(len(row)) if c != label), key=lambda c: -row[c].item())
        hard = [label, *order[: count - 1]]
        adjusted = torch.stack([row[c] + prior[c] for c in hard])
        losses.append(-(adjusted[0].exp() / adjusted.exp().sum()).log())
    return torch.stack(losses)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_loss_among_hard_classes_is_the_formula(case, count):
    z, _, labels, prior = case
    expected = slow_restricted(z, prior, labels, count)
    torch.testing.assert_close(restricted(z, prior, labels, count), expected)


def test_among_all_classes_it_is_balanced_softmax(case):
    z, _, labels, prior = case
    expected = F.cross_entropy(z + prior, labels, reduction="none")
    torch.testing.assert_close(restricted(z, prior, labels, z.shape[1]), expected)


@pytest.mark.parametrize("silence", [0.1, 0, 1])
def test_among_all_classes_it_is_the_configured_loss(prepared, silence):
    with prepared("method.hard=5", f"loss.silence={silence}") as trainer:
        method = trainer.method
        z, labels = torch.randn(9, 5), torch.arange(9) % 5
        found = restricted(method.silenced(z, labels), method.prior, labels, method.hard)
        torch.testing.assert_close(found.mean(), method.loss(z, labels))


@pytest.mark.parametrize(
    ("settings", "prior"),
    [([], True), (["loss.name=balanced-ce", "loss.tau=0"], False), (["loss.name=ce"], False)],
)
def test_the_prior_is_that_of_the_configured_loss(prepared, settings, prior):
    with prepared(*settings) as trainer:
        counts = trainer.method.task.counts
        expected = (counts / counts.sum()).log() if prior else torch.zeros(5)
        torch.testing.assert_close(trainer.method.prior, expected)


@pytest.mark.parametrize(("given", "classes", "hard"), [(0, 5, 2), (4, 5, 4), (5, 5, 5)])
def test_the_number_of_hard_classes_may_be_given(prepared, given, classes, hard):
    with prepared(f"method.hard={given}") as trainer:
        assert trainer.method.hard == hard
    with pytest.raises(UserError, match=r"method.hard=6 of 5 classes: set it lower"):
        prepared("method.hard=6")


# --- contrast


def slow_contrast(views, prototypes, labels, temperature, balanced=True):
    entries = [v / v.norm() for v in [*views, *prototypes]]
    classes = [*labels.tolist(), *range(len(prototypes))]
    losses = []
    for i in range(len(views)):
        others = [j for j in range(len(entries)) if j != i]
        s = {j: entries[i] @ entries[j] / temperature for j in others}
        size = {j: sum(classes[o] == classes[j] for o in others) if balanced else 1 for j in others}
        total = torch.stack([s[j].exp() / size[j] for j in others]).sum().log()
        positive = [s[j] - total for j in others if classes[j] == classes[i]]
        losses.append(-torch.stack(positive).mean() if positive else torch.zeros(()).double())
    return torch.stack(losses)


@pytest.mark.parametrize("with_prototypes", [True, False])
def test_contrast_is_the_formula(case, with_prototypes):
    z, _, labels, _ = case
    prototypes = torch.randn(z.shape[1] if with_prototypes else 0, z.shape[1]).double()
    expected = slow_contrast(z, prototypes, labels, 0.3)
    torch.testing.assert_close(contrast(z, prototypes, labels, 0.3), expected)


def test_more_images_of_a_class_leave_the_contrast_of_others_as_it_is():
    torch.manual_seed(0)
    labels = torch.tensor([0, 0, 1, 1, 2, 2, 2])
    views = torch.randn(7, 4).double()
    more = torch.cat([torch.arange(7), *[(labels == 0).nonzero()[:, 0]] * 2])
    nothing = views[:0]
    for balanced in (True, False):  # not balanced: the supervised contrastive loss
        few, many = (
            slow_contrast(v, nothing, y, 0.5, balanced)[2:7]
            for v, y in ((views, labels), (views[more], labels[more]))
        )
        assert torch.allclose(few, many) == balanced
    few, many = (
        contrast(v, nothing, y, 0.5)[2:7] for v, y in ((views, labels), (views[more], labels[more]))
    )
    torch.testing.assert_close(few, many)


def test_an_image_without_another_of_its_class_is_not_contrasted():
    views = torch.randn(3, 4).double().requires_grad_()
    found = contrast(views, views[:0], torch.tensor([0, 1, 1]), 0.5)
    assert found[0] == 0 and found[1] > 0
    found.sum().backward()
    assert views.grad.isfinite().all()


# --- distillation


def slow_distilled(student, teacher, labels, weights, t):
    losses = []
    for s, r, y in zip(student, teacher, labels.tolist(), strict=True):
        q, p = (s / t).softmax(0), (r / t).softmax(0)
        tckd = p[y] * (p[y] / q[y]).log() + (1 - p[y]) * ((1 - p[y]) / (1 - q[y])).log()
        rest = [c for c in range(len(s)) if c != y]
        hat_p, hat_q = p[rest] / p[rest].sum(), q[rest] / q[rest].sum()
        nckd = (hat_p * (hat_p / hat_q).log()).sum()
        losses.append(t * t * (weights[0] * tckd + weights[1] * nckd))
    return torch.stack(losses)


@pytest.mark.parametrize("t", [1.0, 4.0])
def test_distillation_is_the_formula(case, t):
    z, teacher, labels, _ = case
    expected = slow_distilled(z, teacher, labels, (0.7, 3.0), t)
    torch.testing.assert_close(distilled(z, teacher, labels, (0.7, 3.0), t), expected)


def test_both_parts_make_up_the_divergence(case):
    z, teacher, labels, _ = case
    p, q = teacher.softmax(1), z.softmax(1)
    missing = 1 - p.gather(1, labels[:, None]).squeeze(1)
    expected = (p * (p / q).log()).sum(dim=1)
    torch.testing.assert_close(distilled(z, teacher, labels, (1, missing), 1.0), expected)
    assert distilled(z, z, labels, (1, 1), 1.0).abs().max() < 1e-12
    assert distilled(z, teacher, labels, (1, 1), 1.0).min() > 0


def test_distillation_stays_finite_where_the_label_is_certain():
    z = torch.tensor([[200.0, 0, -3]], requires_grad=True)
    distilled(z, torch.tensor([[0, 200.0, 0]]), torch.tensor([0]), (1, 1), 1.0).backward()
    assert z.grad.isfinite().all()


def test_the_distillation_comes_in_over_the_first_epochs(prepared):
    with prepared("method.warmup_epochs=4") as trainer:
        ramp, phases = [], set()
        for epoch in range(6):
            phases.add(trainer.method.begin(epoch))
            ramp.append(float(trainer.method.ramp))
        assert ramp == [0.25, 0.5, 0.75, 1, 1, 1]
        assert len(phases) == 1  # nothing is compiled anew
        assert "ramp" not in trainer.method.extra_state()
    with prepared("method.warmup_epochs=0") as trainer:
        trainer.method.begin(0)
        assert trainer.method.ramp == 1


# --- the sum


def slow_loss(method, images, target, target_b, mix):
    """The whole loss, part by part; mix (N,)."""
    model, config = method.model, method.config
    f = model.backbone(images)
    n, d = len(f), f.shape[1] // config.experts
    w, b = model.head.weight, model.head.bias.reshape(config.experts, -1)
    z = [f[:, k * d : (k + 1) * d] @ w[:, k * d : (k + 1) * d].T + b[k] for k in range(len(b))]
    g = F.linear(f, model.head.gate.weight, model.head.gate.bias).softmax(dim=1)
    fused = torch.stack([sum(g[i, k] * z[k][i] for k in range(len(b))) for i in range(n)])
    loss = method.loss(fused, target, target_b, mix)
    prior = (method.task.counts / method.task.counts.sum()).log()
    neighbours = {0: [3], 1: [3, 4], 2: [], 3: [0, 1], 4: [1]}
    for labels, share in ((target, mix), (target_b, 1 - mix)):
        silenced = torch.zeros(n, 5)
        for i, y in enumerate(labels.tolist()):
            silenced[i, neighbours[y]] = math.log(0.1)
        for k in range(len(b)):
            hard = slow_restricted(z[k] + silenced, prior, labels, method.hard)
            views = method.projectors[k](f[:, k * d : (k + 1) * d])
            pulled = slow_contrast(views, method.prototypes[k], labels, 0.1)
            taught = sum(
                slow_distilled(z[k] + prior, z[q].detach() + prior, labels, (1.5, 0.5), 2.0)
                for q in range(len(b))
                if q != k
            )
            part = hard + 0.35 / len(b) * pulled
            if len(b) > 1:
                part = part + 0.6 * method.ramp / (len(b) - 1) * taught
            loss = loss + (share * part).mean()
    return loss + sum(method.loss(logits, target, target_b, mix) for logits in z)


NUMBERS = ["method.label_weight=1.5", "method.others_weight=0.5", "method.temperature=2"]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_loss_is_the_sum_of_its_parts(prepared, count):
    settings = [f"method.experts={count}", "method.width=8", "method.hard=3", *NUMBERS]
    with prepared(*settings, "method.warmup_epochs=10", "method.spread=0.4") as trainer:
        method = trainer.method
        method.begin(3)
        images, target, target_b, mix = batch_of()
        for labels in ((target, target_b, mix), (target, target, mix)):
            loss, expected = method(images, *labels).loss, slow_loss(method, images, *labels)
            torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
            gradients = []
            for total in (loss, expected):
                method.zero_grad()
                total.backward()
                assert all(p.grad is not None for p in method.parameters())
                gradients.append([p.grad.clone() for p in method.parameters()])
            for ours, theirs in zip(*gradients, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
        plain = method(images, target).loss  # not mixed
        torch.testing.assert_close(plain, method(images, target, target, mix).loss)


def test_mix_may_be_one_number(prepared):
    with prepared() as trainer:
        images, target, target_b, _ = batch_of()
        one, each = (
            trainer.method(images, target, target_b, mix).loss
            for mix in (torch.tensor(0.3), torch.full((6,), 0.3))
        )
        torch.testing.assert_close(one, each)


def test_losses_are_float32_under_bf16(prepared, monkeypatch):
    with prepared() as trainer, torch.autocast("cpu", torch.bfloat16):
        method, seen = trainer.method, []
        added = method.added

        def spied(each, views, labels):
            seen.extend([torch.is_autocast_enabled("cpu"), each.dtype, views[0].dtype])
            return added(each, views, labels)

        monkeypatch.setattr(method, "added", spied)
        step = method(*batch_of())
        assert step.loss.dtype == torch.float32 and step.loss.isfinite()
        assert seen == [False, torch.float32, torch.float32] * 2


@pytest.mark.slow
def test_it_is_one_graph(prepared):
    with prepared() as trainer:
        method = trainer.method
        compiled = torch.compile(method, backend="eager", fullgraph=True)
        for epoch in (0, 5):
            method.begin(epoch)
            step = compiled(*batch_of())
            torch.testing.assert_close(step.loss, method(*batch_of()).loss)
            step.loss.backward()


def test_each_image_comes_twice(prepared):
    with prepared() as trainer:
        assert trainer.config.data.views == 2
    with prepared("data.views=1") as trainer:
        assert trainer.config.data.views == 1


# --- the model


def swin(timm):
    return timm.create_model(
        "swin_tiny_patch4_window7_224", num_classes=0, img_size=64, window_size=2, embed_dim=8,
        depths=(1, 1, 1, 2), num_heads=(1, 1, 2, 2),
    )  # fmt: skip


def eva(timm):
    return timm.create_model(
        "eva02_tiny_patch14_224", num_classes=0, img_size=56, embed_dim=24, depth=3, num_heads=2
    )


def resnet(timm):
    return timm.create_model("test_resnet", num_classes=0, layers=(1, 1, 1, 3))


def vit(timm):
    return timm.create_model(
        "vit_tiny_patch16_224", num_classes=0, img_size=32, embed_dim=24, depth=9, num_heads=2
    )


BACKBONES = {
    "resnet8": (32, "stages.2.", 3),
    "resnet20": (32, "stages.6.", 3),
    resnet: (64, "layer4.0.", 3),
    "test_convnext": (64, "stages.3.", 3),
    "test_efficientnet": (64, "blocks.4.0.", 2),
    "test_vit": (160, "blocks.5.", 3),
    swin: (64, "layers.3.", 3),
    eva: (56, "blocks.2.", 3),
    vit: (32, "blocks.7.", 3),
}


def backbone_of(name):
    if isinstance(name, str):
        return build_model(ModelConfig(name=name), 3, 32).backbone
    torchvision_shim.make_importable()
    import timm

    return name(timm)


@pytest.mark.parametrize("name", BACKBONES)
def test_experts_have_a_last_stage_each_and_one_stem(name):
    size, place, count = BACKBONES[name]
    torch.manual_seed(0)
    backbone = backbone_of(name).eval()
    images = torch.randn(2, 3, size, size)
    before, parameters = backbone(images), {n for n, _ in backbone.named_parameters()}
    divide(backbone, count, 0.3)
    added = {n for n, _ in backbone.named_parameters()} - parameters
    assert {n.partition("copies.")[0] for n in added} == {place}
    assert {n.partition("copies.")[2][0] for n in added} == {str(k) for k in range(count)}
    found = backbone(images)
    width = before.shape[1]
    assert found.shape == (2, count * width)
    torch.testing.assert_close(found[:, :width], before)
    for k in range(1, count):
        assert (found[:, k * width : (k + 1) * width] - before).abs().max() > 1e-4


@pytest.mark.parametrize("name", [resnet, "test_efficientnet", "test_vit", eva])
def test_experts_may_recompute_their_activations(name):
    backbone, images = backbone_of(name), torch.randn(2, 3, *[BACKBONES[name][0]] * 2)
    divide(backbone, 2, 0.1)
    gradients = []
    for recomputes in (False, True):
        backbone.set_grad_checkpointing(recomputes)
        backbone.zero_grad()
        backbone(images).square().sum().backward()
        gradients.append([p.grad.clone() for p in backbone.parameters() if p.grad is not None])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "blocks"), [("resnet20", 3), ("resnet32", 5), (vit, 2), (eva, 1)])
def test_the_last_stage_has_the_blocks_it_should(name, blocks):
    backbone = backbone_of(name)
    parts = backbone.stages if hasattr(backbone, "stages") else backbone.blocks
    count = len(parts)
    divide(backbone, 2, 0.1)
    assert len(parts) == count - blocks + 1 and isinstance(parts[-1], Experts)
    assert [len(part) for part in parts[-1].copies] == [blocks, blocks]


def test_experts_start_as_the_backbone_but_for_the_spread():
    torch.manual_seed(0)
    block = nn.Linear(60, 60)
    experts = Experts([block], 3, 0.2)
    first, *others = (part[0].weight for part in experts.copies)
    assert torch.equal(first, block.weight)
    for other in others:
        ratio = other / block.weight
        assert abs(ratio.mean() - 1) < 0.02 and abs(ratio.std() - 0.2) < 0.02
    assert not torch.equal(*others)
    experts = Experts([block, block], 2, 0)
    x = torch.randn(4, 60)
    torch.testing.assert_close(experts(x), block(block(x)).repeat(2, 1))


def test_features_of_experts_stand_side_by_side():
    features = torch.arange(12.0).reshape(6, 2)  # 2 experts, 3 images
    expected = torch.tensor([[0.0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]])
    assert torch.equal(side_by_side(2, nn.Identity(), None, features), expected)


def head_of(count=3, width=4, classes=7):
    torch.manual_seed(1)
    head = GatedHead.build(come(experts=count), width, classes)
    nn.init.normal_(head.bias)
    return head, torch.randn(5, count * width)


def come(**numbers):
    return Method.Config(**numbers)


def test_the_gate_weighs_the_experts():
    head, x = head_of()
    each = head.each(x)
    for k in range(3):
        part, bias = slice(4 * k, 4 * k + 4), head.bias[7 * k : 7 * k + 7]
        torch.testing.assert_close(each[:, k], F.linear(x[:, part], head.weight[:, part], bias))
    g = (x @ head.gate.weight.T + head.gate.bias).exp()
    expected = sum(g[:, [k]] / g.sum(1, keepdim=True) * each[:, k] for k in range(3))
    torch.testing.assert_close(head(x), expected)
    torch.testing.assert_close(head.of_targets(3)(x), expected[:, :3])
    assert head.of_targets(3).weight.shape == (3, 12)


def test_one_expert_is_a_linear_head():
    head, x = head_of(count=1)
    torch.testing.assert_close(head(x), F.linear(x, head.weight, head.bias))


def test_heads_start_as_the_linear_one_but_for_the_spread():
    model = build_model(ModelConfig(name="resnet8"), 30, 32)
    rows = model.head.weight.detach().clone()
    weight = Method.build(come(spread=0.2), model).head.weight
    assert torch.equal(weight[:, :64], rows)
    for k in (1, 2):
        ratio = weight[:, 64 * k : 64 * k + 64] / rows
        assert abs(ratio.mean() - 1) < 0.02 and abs(ratio.std() - 0.2) < 0.02


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": "regnetx_002"}, "RegNet has none that is known: set model.name"),
        ({"name": "resnet8", "head": "cosine"}, "come has heads of its own: set model.head=linear"),
        ({"name": "resnet8", "head": "scaled"}, "come has heads of its own: set model.head=linear"),
    ],
)
def test_what_cannot_be_divided_is_refused(model, message):
    from fastlt.models.heads import section

    with pytest.raises(UserError, match=message):
        Method.build(come(), build_model(section()(**model), 3, 32))


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(6, 24), nn.ReLU())
        self.blocks = nn.Sequential(nn.Sequential(nn.Linear(24, 24), nn.ReLU()))

    def forward(self, x):
        return self.blocks(self.stem(x))


def toy_method(seed, counts=(200, 80, 40, 20, 10), tau=1):
    """A small method on vectors of as many classes as there are counts."""
    torch.manual_seed(seed)
    classes = len(counts)
    names = [f"c{number}" for number in range(classes)]
    space = ClassSpace(target_names=names, train_counts=counts, val_counts=[1] * classes)
    loss = load_config("cifar100-lt", ["loss.name=balanced-ce", f"loss.tau={tau}"]).loss
    task = Task(space, torch.tensor(counts), loss, 1, torch.device("cpu"))
    backbone = Toy()
    divide(backbone, 3, 0.5)
    head = GatedHead.build(come(spread=0.5), 24, classes)
    return Method(come(width=16), Classifier(backbone, head), task)


def test_three_classes_in_ten_are_hard_and_at_least_two():
    assert [toy_method(0, [9] * classes).hard for classes in (1, 2, 10, 20)] == [1, 2, 3, 6]


def test_a_class_without_images_goes_without_prior():
    assert toy_method(0, [9, 0, 3], tau=0).prior.tolist() == [0, 0, 0]


@pytest.mark.slow
def test_the_gated_sum_is_no_worse_than_the_mean_expert():
    for seed in range(3):
        method = toy_method(seed)
        centres = torch.randn(5, 6) * 1.2
        label = torch.repeat_interleave(torch.arange(5), method.task.counts)
        optimiser = torch.optim.SGD(method.parameters(), 0.05, momentum=0.9)
        for _ in range(200):
            chosen = torch.randint(len(label), (32,))
            x = centres[label[chosen]] + torch.randn(32, 6)
            optimiser.zero_grad()
            method(x, label[chosen]).loss.backward()
            optimiser.step()
        tested = torch.arange(5).repeat(200)
        with torch.no_grad():
            features = method.model.backbone(centres[tested] + torch.randn(1000, 6))
            each = method.model.head.each(features)
        gated = (method.model.head(features).argmax(1) == tested).float().mean()
        experts = [(each[:, k].argmax(1) == tested).float().mean() for k in range(3)]
        assert gated > 0.5
        assert gated >= sum(experts) / 3


# --- a run


@pytest.fixture(scope="module")
def finished(small_pack, tmp_path_factory):
    run = tmp_path_factory.mktemp("come") / "run"
    result = train(config_of(small_pack, "train.keep=99", *MIXED), run, QUIET)
    return run, result


def test_a_run_resumes_to_the_same_bits_and_evaluates(finished, small_pack, tmp_path):
    whole, result = finished
    assert evaluate_run(whole)["per_class"] == result["per_class"]
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    (cut / "result.json").unlink()
    *_, last = sorted((cut / "checkpoints").iterdir())
    shutil.rmtree(last)
    train(config_of(small_pack, "train.keep=99", *MIXED), cut, QUIET)
    for name in ("model.safetensors", f"checkpoints/{last.name}/method.safetensors"):
        first, second = (load_file(run / name) for run in (whole, cut))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_export_is_experts_heads_and_gate(finished):
    run, _ = finished
    found = load_file(run / "model.safetensors")
    assert {name.partition(".")[0] for name in found} == {"backbone", "head"}
    assert found["head.weight"].shape == (3, 192) and found["head.bias"].shape == (9,)
    model, _ = load_exported(run / "model.safetensors")
    assert model.backbone(torch.zeros(2, 3, 16, 16)).shape == (2, 192)
    scores = evaluate_post_hoc(run, ["logit-adjustment"], None, None, 0.5, 0.0)
    assert len({json.dumps(score["per_class"]) for score in scores.values()}) == 1
