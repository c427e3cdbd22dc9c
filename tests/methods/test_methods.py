"""Methods: each trains, resumes to the same bits, exports its model, and evaluates as it did."""

import json
import shutil
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.method_cases import QUIET, config_of
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from fastlt import methods
from fastlt.config import MethodConfig, load_config
from fastlt.data.plan import evaluation_batches
from fastlt.errors import UserError
from fastlt.evaluation.evaluate import evaluate_run, evaluation_geometry
from fastlt.evaluation.forward import output_of
from fastlt.methods import listed_methods, method_names, method_type
from fastlt.methods.method import Base, Stage
from fastlt.models.export import load_exported
from fastlt.training import loop
from fastlt.training.loaders import val_loader
from fastlt.training.loop import fit, open_packs, set_modes, train, train_epoch
from fastlt.training.setup import next_stage, prepare, stage_config

CPU = torch.device("cpu")


class Projected(Base):
    """A method whose head is a map of rows, folded in for prediction, with an own parameter."""

    SETTINGS = {"optim.nesterov": True}  # noqa: RUF012

    class Config(MethodConfig):
        name: str = "projected"
        strength: float = 1.0

    def __init__(self, *args):
        super().__init__(*args)
        width = self.model.head.weight.shape[1]
        self.map = nn.Linear(width, width, bias=False)
        nn.init.zeros_(self.map.weight)

    def rows(self):
        return self.model.head.weight + self.config.strength * self.map(self.model.head.weight)

    def forward(self, images, target, target_b=None, mix=None):
        logits = F.linear(self.model.backbone(images), self.rows(), self.model.head.bias)
        return self.scored(self.loss(logits, target, target_b, mix), logits, target, target_b, mix)

    @torch.no_grad()
    def predictor(self):
        from fastlt.models.classifier import Classifier
        from fastlt.models.heads import LinearHead, with_values

        head = LinearHead(self.model.head.weight.shape[1], len(self.model.head.weight))
        return Classifier(self.model.backbone, with_values(head, self.rows(), self.model.head.bias))


class TwoStages(Base):
    """A training of all, and one of the head alone on class-balanced images."""

    class Config(MethodConfig):
        name: str = "two-stages"

    def stages(self):
        balanced = {"data.target_sampling": "class-balanced", "train.epochs": 2, "optim.lr": 0.02}
        return [Stage("all"), Stage("head", balanced, trained=("model.head.",))]


class OnFeatures(Base):
    """A head on features that are computed once, which start at the mean of each class."""

    class Config(MethodConfig):
        name: str = "on-features"

    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("means", torch.zeros_like(self.model.head.weight))

    def stages(self):
        settings = {"train.epochs": 2, "optim.lr": 0.02}
        return [Stage("all"), Stage("head", settings, trained=("model.head.",), features=True)]

    def start_stage(self, data):
        if self.stage == 1:
            self.given, self.features = data.labels, data.features()
            for label in range(len(self.means)):
                self.means[label] = self.features[data.labels == label].mean(dim=0)

    def metrics(self):
        return {"means": float(self.means.abs().sum())}

    def forward(self, images, target, target_b=None, mix=None):
        if self.stage == 0:
            return super().forward(images, target, target_b, mix)
        assert images.ndim == 2 and not images.requires_grad
        logits = self.model.head(images - self.means.mean(dim=0))
        return self.scored(self.loss(logits, target), logits, target)


@pytest.fixture(autouse=True)
def own_methods(monkeypatch):
    """The methods above, as if they were files of fastlt/methods."""
    own = {"projected": Projected, "two-stages": TwoStages, "on-features": OnFeatures}
    names = method_names()
    for name, kind in own.items():
        module = types.ModuleType(f"fastlt.methods.{name.replace('-', '_')}", kind.__doc__)
        module.Method = kind
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(methods, "method_names", lambda: sorted([*names, *own]))
    yield
    method_type.cache_clear()


@pytest.fixture(scope="module")
def teacher(small_pack, tmp_path_factory):
    run = tmp_path_factory.mktemp("teacher") / "run"
    train(config_of(small_pack, "plain"), run, QUIET)
    return run


OWN = {
    "plain": [],
    "distill": ["method.start_epoch=1", "method.teacher={teacher}"],
    "projected": ["optim.ema=0.5"],
    "two-stages": ["optim.ema=0.5"],
    "on-features": ["optim.ema=0.5"],
}


def own_settings(name, teacher):
    return [setting.format(teacher=teacher) for setting in OWN[name]]


@pytest.mark.parametrize("name", OWN)
def test_a_method_resumes_exports_and_evaluates(small_pack, teacher, tmp_path, name):
    config = config_of(small_pack, name, *own_settings(name, teacher), "train.keep=99")
    whole = tmp_path / "whole"
    result = train(config, whole, QUIET)
    assert evaluate_run(whole)["per_class"] == result["per_class"]
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    (cut / "result.json").unlink()
    saved = sorted((cut / "checkpoints").iterdir())
    for path in saved[len(saved) // 2 :]:
        shutil.rmtree(path)
    train(config, cut, QUIET)
    first, second = (load_file(run / "model.safetensors") for run in (whole, cut))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    model, names = load_exported(whole / "model.safetensors")
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, len(names))
    assert {key.partition(".")[0] for key in first} == {"backbone", "head"}


def test_what_a_method_has_besides_its_model_is_in_the_checkpoint(small_pack, tmp_path):
    train(config_of(small_pack, "projected", "optim.ema=0.5"), tmp_path / "run", QUIET)
    newest = max((tmp_path / "run/checkpoints").iterdir())
    kept = load_file(newest / "method.safetensors")
    average = load_file(newest / "ema_method.safetensors")
    assert kept.keys() == average.keys() == {"map.weight"}
    assert kept["map.weight"].abs().sum() > 0
    assert not torch.equal(kept["map.weight"], average["map.weight"])


def test_a_stage_trains_what_it_names_with_its_own_settings(small_pack, tmp_path):
    config = config_of(small_pack, "two-stages", "train.keep=99")
    train(config, tmp_path / "run", QUIET)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [0, 1, 2, 3]
    saved = [
        load_file(path / "model.safetensors")
        for path in sorted((tmp_path / "run/checkpoints").iterdir())
    ]
    assert len(saved) == 4
    changed = {key for key in saved[1] if not torch.equal(saved[1][key], saved[3][key])}
    assert changed == {"head.weight", "head.bias"}  # batch-norm statistics stand still too


def test_the_head_comes_first_in_a_stage_too(small_pack, tmp_path):
    settings = ["schedule.head_only_epochs=1", "train.keep=99"]
    train(config_of(small_pack, "two-stages", *settings), tmp_path / "run", QUIET)
    saved = [
        load_file(path / "model.safetensors")
        for path in sorted((tmp_path / "run/checkpoints").iterdir())
    ]
    config = config_of(small_pack, "two-stages", *settings)
    with prepare(config, tmp_path / "other", open_packs(config.data)) as trainer:
        start = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    changed = [
        {key for key in one if not torch.equal(one[key], other[key])}
        for one, other in ((start, saved[0]), (saved[0], saved[1]))
    ]
    assert changed[0] == {"head.weight", "head.bias"} and "backbone.conv1.weight" in changed[1]


def test_features_are_those_of_evaluation_and_are_kept_with_the_pack(small_pack, tmp_path):
    pack = tmp_path / "pack"
    shutil.copytree(small_pack, pack, ignore=shutil.ignore_patterns("features"))
    config = config_of(pack, "on-features", "train.epochs=1")
    with prepare(config, tmp_path / "run", open_packs(config.data)) as trainer:
        fit(trainer, QUIET)
        method, model = trainer.method, trainer.model.eval()
        loader = val_loader(config.data, replace(trainer.pack, val=trainer.pack.train), CPU)
        batches = evaluation_batches(trainer.pack.train, evaluation_geometry(config.data), 64)
        mean, std = config.data.mean, config.data.std
        expected = [
            output_of(model.backbone, pixels, mean, std, CPU)
            for _, pixels in loader.iterate(batches)
        ]
        torch.testing.assert_close(method.features, torch.cat(expected))
        assert method.given.tolist() == trainer.pack.train.label.tolist()
    (kept,) = (pack / "features").glob("*.npy")
    assert torch.equal(torch.from_numpy(np.load(kept)), method.features)
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["means"] > 0 for line in lines] == [False, True, True]


def test_a_stage_is_given_no_images_of_auxiliaries_that_are_left_out(small_pack, tmp_path):
    for name, settings in (
        ("on-features", []),
        ("dlsa", ["method.flow_epochs=1", "method.classifier_epochs=1", "method.clusters=3"]),
    ):
        alone = ["data.auxiliary=false", "loss.name=balanced-ce", "train.epochs=1", *settings]
        config = config_of(small_pack, name, *alone)
        with prepare(config, tmp_path / name, open_packs(config.data)) as trainer:
            fit(trainer, QUIET)
            assert (trainer.pack.train.label >= trainer.space.num_classes).any()
            if name == "on-features":
                assert trainer.method.given.max() < trainer.space.num_classes
                assert len(trainer.method.features) == len(trainer.method.given)


def test_a_stage_goes_on_from_the_average(small_pack, tmp_path):
    config = config_of(small_pack, "two-stages", "optim.ema=0.9", "train.keep=99")
    train(config, tmp_path / "run", QUIET)
    saved = sorted((tmp_path / "run/checkpoints").iterdir())
    average = load_file(saved[1] / "ema.safetensors")
    last, last_average = (
        load_file(saved[3] / name) for name in ("model.safetensors", "ema.safetensors")
    )
    for key in average:
        if key.startswith("backbone."):
            assert torch.equal(average[key], last[key])
            assert torch.equal(average[key], last_average[key])


def test_skipped_steps_do_not_take_back_what_a_stage_began_with(small_pack, tmp_path, monkeypatch):
    config = config_of(small_pack, "on-features")
    with prepare(config, tmp_path / "run", open_packs(config.data)) as trainer:
        next_stage(trainer)
        set_modes(trainer)
        means = trainer.method.means.clone()
        assert means.abs().sum() > 0
        broken = torch.tensor([torch.nan, 0, 0, torch.nan])
        monkeypatch.setattr(loop, "train_step", lambda *_: broken)
        train_epoch(trainer, lambda *_: None)
        assert trainer.state.skipped > 0
        assert torch.equal(trainer.method.means, means)


@pytest.mark.parametrize("name", ["angular", "attentive", "dlsa", "fate"])
def test_batch_norm_that_follows_a_frozen_backbone_ends_with_the_stage(small_pack, tmp_path, name):
    settings = ["schedule.head_only_epochs=1", "schedule.shift_bn=true"]
    config = config_of(small_pack, name, *settings)
    with prepare(config, tmp_path / "run", open_packs(config.data)) as trainer:
        later = [stage_config(config, stage).schedule for stage in trainer.stages[1:]]
        assert later and not any(schedule.shift_bn for schedule in later)


def test_distillation_is_its_formula(small_pack, teacher, tmp_path):
    settings = ["method.weight=0.3", "method.temperature=4", f"method.teacher={teacher}"]
    config = config_of(small_pack, "distill", *settings)
    with prepare(config, tmp_path / "run", open_packs(config.data)) as trainer:
        method, targets = trainer.method, trainer.space.num_targets
        images = torch.randn(8, 3, 16, 16).to(memory_format=torch.channels_last)
        target = torch.arange(8) % trainer.space.num_classes
        method.begin(0)
        loss = method(images, target).loss
        logits, theirs = method.model(images), method.teacher(images)
        p, q = ((part / 4).softmax(dim=1) for part in (theirs, logits[:, :targets]))
        divergence = (p * (p.log() - q.log())).sum(dim=1).mean()
        expected = 0.7 * method.loss(logits, target) + 0.3 * 16 * divergence
        torch.testing.assert_close(loss, expected)
        assert not any(parameter.requires_grad for parameter in method.teacher.model.parameters())


def test_methods_are_listed_with_a_line_and_their_paper():
    listed = {method.name: method for method in listed_methods()}
    assert listed["distill"].paper == "Hinton et al. 2015, arXiv 1503.02531"
    assert listed["crt"].kind == "second stage" and listed["ldam-drw"].kind == "preset"
    assert all(method.line.endswith(".") for method in listed.values())


def test_settings_of_a_method_come_below_the_users_own(small_pack):
    assert config_of(small_pack, "projected").optim.nesterov
    assert not config_of(small_pack, "projected", "optim.nesterov=false").optim.nesterov
    assert load_config("cifar100-siblings", ["method.name=projected"]).optim.nesterov


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["method.name=distil"], "there is no method 'distil', did you mean 'distill'"),
        (["method.name=distill", "method.teachr=x"], "did you mean 'method.teacher'"),
        (["method.strength=2"], "there is no setting 'method.strength'"),
        (["method.name=distill", "method.weight=2"], "method.weight = 2"),
    ],
)
def test_what_a_method_does_not_have_is_refused(settings, message):
    with pytest.raises(UserError, match=message):
        load_config("cifar100-siblings", settings)


def test_a_teacher_is_needed_and_must_know_the_targets(small_pack, tmp_path):
    with pytest.raises(UserError, match=r"set method.teacher=RUN"):
        train(config_of(small_pack, "distill"), tmp_path / "run", QUIET)
    with pytest.raises(UserError, match=r"distill does not go with model.head=class-parallel"):
        settings = ["model.head=class-parallel", "method.teacher=x"]
        train(config_of(small_pack, "distill", *settings), tmp_path / "run", QUIET)
