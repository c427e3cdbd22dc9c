"""Propheter: noise of each class on maps, held to a slow loop, in two stages."""

import json
import math
import shutil

import pytest
import torch
from helpers.method_cases import QUIET
from helpers.method_cases import config_of as method_config
from safetensors.torch import load_file

from fastlt.config import ModelConfig
from fastlt.errors import UserError
from fastlt.evaluation.evaluate import evaluate_run
from fastlt.methods.propheter import maps_of, noise_of, pooled
from fastlt.models.classifier import build_model
from fastlt.models.export import load_exported
from fastlt.training.loop import fit, open_packs, set_modes, train
from fastlt.training.setup import next_stage, prepare


def config_of(pack, *settings, name="propheter"):
    return method_config(pack, name, *settings)


@pytest.fixture
def prepared(small_pack, tmp_path):
    def made(*settings):
        config = config_of(small_pack, *settings)
        return prepare(config, tmp_path / "run", open_packs(config.data))

    return made


@pytest.fixture(scope="module")
def finished(small_pack, tmp_path_factory):
    """A run with every checkpoint, averaged and mixed."""
    run = tmp_path_factory.mktemp("propheter") / "run"
    train(config_of(small_pack, "train.keep=99", *MIXED), run, QUIET)
    return run


ALONE = ["data.auxiliary=false", "loss.name=balanced-ce"]
MIXED = ["optim.ema=0.5", "augment.mixup=0.5", "method.cycle=2", "method.spread=0.5"]


def batch_of(count=7, classes=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 16, 16, generator=generator)
    target, target_b = (torch.randint(classes, (count,), generator=generator) for _ in range(2))
    return images, target, target_b, torch.rand(count, generator=generator)


def set_noise(method, scale, shift):
    with torch.no_grad():
        method.scale.copy_(torch.as_tensor(scale))
        method.shift.copy_(torch.as_tensor(shift))


def enter_student_stage(trainer):
    next_stage(trainer)
    set_modes(trainer)
    trainer.method.begin(1)


@pytest.mark.parametrize("shape", [(6, 4, 3, 2), (5, 7, 3)])
@pytest.mark.parametrize("mixes", ["no", "one", "each"])
def test_noise_is_the_formula(prepared, shape, mixes):
    with prepared() as trainer:
        method = trainer.method.double()
        set_noise(method, [0.3, 1.5, 0, 0.7, 2.0], [0.1, 0.9, 0.5, 0, 1.0])
        maps = torch.randn(shape, dtype=torch.float64)
        target, target_b = (torch.randint(5, shape[:1]) for _ in range(2))
        mix = torch.tensor(0.3).double() if mixes == "one" else torch.rand(shape[0]).double()
        torch.manual_seed(1)
        labels = (target,) if mixes == "no" else (target, target_b, mix)
        found = method.noisy(maps, *labels)
        torch.manual_seed(1)
        noise = torch.randn_like(maps)
    for i in range(len(maps)):
        share = 1 if mixes == "no" else float(mix if mixes == "one" else mix[i])
        a, b = (
            share * part[target[i]] + (1 - share) * part[target_b[i]]
            for part in (method.scale, method.shift)
        )
        torch.testing.assert_close(found[i], maps[i] + a * noise[i] + b)


def test_pooled_noise_has_mean_b_and_variance_a_squared_over_hw(prepared):
    with prepared() as trainer:
        set_noise(trainer.method, [2.0, 0, 0, 0, 0.5], [0.4, 0, 0, 0, 0.9])
        maps = torch.zeros(2000, 8, 4, 4)
        target = torch.arange(2000) % 2 * 4
        moved = trainer.method.noisy(maps, target).mean(dim=(2, 3))
        for label, a, b in ((0, 2.0, 0.4), (4, 0.5, 0.9)):
            values = moved[target == label].flatten()
            assert abs(values.mean() - b) < 5 * a / math.sqrt(16 * len(values))
            assert abs(values.var() / (a * a / 16) - 1) < 0.08


def test_a_and_b_are_brought_back_where_noise_is_made(prepared):
    with prepared() as trainer:
        method = trainer.method
        set_noise(method, [-1.0, 3.0, 0.5, -0.1, 0], [-0.5, 1.5, 0.5, 2, 1])
        method.begin(0)
        method(*batch_of()[:2])
        assert method.scale.tolist() == [0, 3, 0.5, 0, 0]
        assert method.shift.tolist() == [0, 1, 0.5, 1, 1]


def test_a_and_b_start_small_and_from_both_sides(prepared):
    with prepared("method.spread=3") as trainer:
        wide = trainer.method.scale.detach(), trainer.method.shift.detach()
    with prepared() as trainer:
        method = trainer.method
        assert (method.scale < 0).any() and (method.shift >= 0).all()
        torch.testing.assert_close(wide[0] / 3, method.scale.detach() / 0.02)
        torch.testing.assert_close(wide[1] / 3, method.shift.detach() / 0.02)
        assert 0.2 < wide[0].std() / 3 < 3


def test_without_noise_the_teacher_is_the_plain_model(prepared):
    with prepared() as trainer:
        method = trainer.method
        images, target, *_ = batch_of()
        set_noise(method, torch.zeros(5), torch.zeros(5))
        method.begin(0)
        noisy = method(images, target).loss
        method.begin(1)
        assert not method.is_noisy
        plain = method(images, target).loss
        assert torch.equal(noisy, plain)
        assert torch.equal(plain, method.loss(method.model(images), target))


@pytest.mark.parametrize(("cycle", "noisy"), [(7, [0, 7, 14]), (3, [0, 3, 6, 9, 12]), (99, [0])])
def test_every_cycleth_epoch_of_the_teacher_is_noisy(prepared, cycle, noisy):
    with prepared(f"method.cycle={cycle}") as trainer:
        phases = {epoch: trainer.method.begin(epoch) for epoch in range(15)}
        assert [epoch for epoch in phases if phases[epoch] == phases[0]] == noisy
        assert len(set(phases.values())) == 2
        trainer.method.begin(1)
        images, target, *_ = batch_of()
        set_noise(trainer.method, torch.ones(5), torch.ones(5))
        assert torch.equal(trainer.method(images, target).loss, trainer.method(images, target).loss)
        trainer.method.begin(0)
        assert trainer.method(images, target).loss != trainer.method(images, target).loss


def test_gradients_reach_the_noise_of_classes_in_the_batch_alone(prepared):
    with prepared() as trainer:
        set_modes(trainer)
        method = trainer.method
        set_noise(method, torch.full((5,), 0.5), torch.full((5,), 0.5))
        images = batch_of(6)[0]
        target = torch.tensor([0, 3, 3, 0, 0, 3])
        method.begin(0)
        method(images, target).loss.backward()
        for noise in (method.scale, method.shift):
            assert ((noise.grad != 0) == torch.tensor([1, 0, 0, 1, 0]).bool()).all()
            noise.grad = None
        method.begin(1)  # DistributedDataParallel needs a gradient of all that require one
        method(images, target).loss.backward()
        wanting = [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None]
        assert not wanting and not method.scale.requires_grad


def test_prediction_knows_nothing_of_noise(prepared):
    with prepared() as trainer:
        images = batch_of()[0]
        method = trainer.method.eval()
        before = method.predictor()(images)
        set_noise(method, torch.full((5,), 9.0), torch.ones(5))
        assert torch.equal(method.predictor()(images), before)


def test_the_student_starts_anew_and_the_teacher_is_what_was_trained(prepared):
    with prepared() as trainer:
        method = trainer.method
        first = {k: v.clone() for k, v in method.model.state_dict().items()}
        with torch.no_grad():
            for parameter in method.model.parameters():
                parameter.add_(1)
        trained = {k: v.clone() for k, v in method.model.state_dict().items()}
        enter_student_stage(trainer)
        assert all(torch.equal(first[k], v) for k, v in method.model.state_dict().items())
        assert all(torch.equal(trained[k], v) for k, v in method.other.state_dict().items())
        moving = {n for n, p in method.named_parameters() if p.requires_grad}
        assert moving == {n for n, _ in method.named_parameters() if n.startswith("model.")}
        assert trainer.stages[0].trained == ("model.", "scale", "shift")


@pytest.mark.parametrize("mixed", [False, True])
def test_the_students_loss_is_its_formula(prepared, mixed):
    with prepared("method.weight=0.7") as trainer:
        method = trainer.method
        enter_student_stage(trainer)
        set_noise(method, [0.3, 1.5, 0, 0.7, 2.0], [0.1, 0.9, 0.5, 0, 1.0])
        images, *labels = batch_of()
        labels = labels if mixed else labels[:1]
        with torch.no_grad():  # another teacher than the student
            method.other.backbone.conv1.weight.mul_(1.5)
        torch.manual_seed(3)
        loss = method(images, *labels).loss
        theirs = method.other.backbone.train().maps(images)
        torch.manual_seed(3)
        theirs = method.noisy(theirs, *labels)
        ours = method.model.backbone.maps(images)
        square = sum((a - b) ** 2 for a, b in zip(ours.flatten(), theirs.flatten(), strict=True))
        expected = method.loss(method.model(images), *labels) + 0.7 * square / ours.numel()
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


def test_with_weight_0_the_student_learns_as_the_plain_model(prepared):
    with prepared("method.weight=0") as trainer:
        method = trainer.method
        enter_student_stage(trainer)
        images, *labels = batch_of()
        method(images, *labels).loss.backward()
        ours = {n: p.grad.clone() for n, p in method.model.named_parameters()}
        method.zero_grad()
        method.loss(method.model(images), *labels).backward()
        assert all(torch.equal(ours[n], p.grad) for n, p in method.model.named_parameters())


def test_the_teacher_goes_by_the_batch_and_has_no_gradient(prepared):
    with prepared() as trainer:
        method = trainer.method
        enter_student_stage(trainer)
        assert all(module.training for module in method.other.modules())
        drifting = method.other.backbone.bn1.running_mean
        before = drifting.clone()
        method(*batch_of()[:2]).loss.backward()
        assert not torch.equal(drifting, before)
        others = [method.scale, method.shift, *method.other.parameters()]
        assert all(part.grad is None for part in others)
        assert all(part.grad is not None for part in method.model.parameters())


@pytest.mark.parametrize("name", ["resnet8", "test_vit", "test_resnet", "test_convnext"])
def test_maps_are_pooled_as_the_backbone_pools_them(name):
    backbone = build_model(ModelConfig(name=name), 3, 64 if name != "test_vit" else 160).backbone
    images = torch.randn(2, 3, *[160 if name == "test_vit" else 64] * 2)
    backbone.eval()
    assert torch.equal(pooled(backbone, maps_of(backbone, images)), backbone(images))


# --- a run


def test_a_run_resumes_to_the_same_bits_and_evaluates(finished, small_pack, tmp_path):
    saved = sorted((finished / "checkpoints").iterdir())
    assert len(saved) == 4
    for kept in (1, 3):  # killed in the teacher's stage, and in the student's
        cut = tmp_path / str(kept)
        shutil.copytree(finished, cut)
        (cut / "result.json").unlink()
        for path in sorted((cut / "checkpoints").iterdir())[kept:]:
            shutil.rmtree(path)
        train(config_of(small_pack, "train.keep=99", *MIXED), cut, QUIET)
        for name in ("model.safetensors", "checkpoints/{}/method.safetensors"):
            first, second = (load_file(r / name.format(saved[-1].name)) for r in (finished, cut))
            assert first.keys() == second.keys()
            assert all(torch.equal(first[key], second[key]) for key in first)
    result = json.loads((finished / "result.json").read_text())
    assert evaluate_run(finished)["per_class"] == result["per_class"]
    plain = build_model(ModelConfig(name="resnet8"), 3, 16)
    assert load_file(finished / "model.safetensors").keys() == plain.state_dict().keys()


def test_a_line_of_an_epoch_has_the_means_of_a_and_b(finished):
    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    kept = load_file(max((finished / "checkpoints").iterdir()) / "method.safetensors")
    assert lines[-1]["noise_scale"] == pytest.approx(float(kept["scale"].mean()))
    assert lines[-1]["noise_shift"] == pytest.approx(float(kept["shift"].mean()))


def test_a_given_run_teaches_with_its_own_noise(finished, prepared):
    known = noise_of(finished)
    assert list(known) == ["a", "b", "c", "x", "y"]
    with prepared(f"method.teacher={finished}") as trainer:
        method = trainer.method
        assert [stage.name for stage in trainer.stages] == ["student"] and method.is_student
        exported = load_file(finished / "model.safetensors")
        for name, value in method.other.backbone.state_dict().items():
            assert torch.equal(value, exported[f"backbone.{name}"])
        kept = load_file(max((finished / "checkpoints").iterdir()) / "method.safetensors")
        assert torch.equal(method.scale, kept["scale"]) and method.scale.abs().sum() > 0
        assert torch.equal(method.shift, kept["shift"])
        fresh = trainer.model.backbone.conv1.weight
        assert not torch.equal(fresh, exported["backbone.conv1.weight"])
        before = {name: value.clone() for name, value in method.other.named_parameters()}
        fit(trainer, QUIET)
        assert not any(parameter.requires_grad for parameter in method.other.parameters())
        assert all(torch.equal(before[name], p) for name, p in method.other.named_parameters())
        assert torch.equal(method.scale, kept["scale"].clamp(min=0))
    with prepared(f"method.teacher={finished}", *ALONE) as trainer:
        assert torch.equal(trainer.method.scale, kept["scale"][:3])


def test_a_run_of_another_method_teaches_without_noise(small_pack, prepared, tmp_path):
    run = tmp_path / "plain"
    train(config_of(small_pack, "train.epochs=1", name="plain"), run, QUIET)
    with prepared(f"method.teacher={run}") as trainer:
        assert not trainer.method.scale.any() and not trainer.method.shift.any()
    with pytest.raises(UserError, match=r"a run of the same model.name"):
        prepared(f"method.teacher={run}", "model.name=resnet14")


def test_a_teacher_of_other_targets_is_refused(finished, tmp_path, prepared, monkeypatch):

    def other(path):
        model, names = load_exported(path)
        return model, names[::-1]

    monkeypatch.setattr("fastlt.methods.method.load_exported", other)
    with pytest.raises(UserError, match=r"other targets: name a run of the same ones"):
        prepared(f"method.teacher={finished}")


@pytest.mark.slow
def test_it_is_one_graph(prepared):
    with prepared("data.batch=7") as trainer:
        method, (images, target, *_) = trainer.method, batch_of()
        compiled = torch.compile(method, backend="eager", fullgraph=True)
        set_noise(method, torch.full((5,), -1.0), torch.full((5,), 0.3))
        for enter in (set_modes, enter_student_stage):
            enter(trainer)
            method.begin(0)
            loss = compiled(images, target, None, None).loss
            torch.testing.assert_close(loss, method(images, target).loss)
            loss.backward()
            assert method.scale.tolist() == [0] * 5
