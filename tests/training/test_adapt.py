"""Trainings of a part of the model, with rates of their own, and those that end early."""

import json

import pytest
import torch
from helpers.method_cases import QUIET, config_of, prepared, trained
from rich.console import Console
from safetensors.torch import load_file

from fastlt.config import OptimConfig
from fastlt.errors import ConfigError
from fastlt.models.classifier import build_model
from fastlt.models.heads import section
from fastlt.training.loop import train
from fastlt.training.optim import build_optimizer


def tensors_at_start(pack, run, *settings):
    with prepared(pack, run, "plain", *settings) as trainer:
        return {name: t.clone() for name, t in trainer.model.state_dict().items()}


@pytest.mark.parametrize(
    ("adapt", "moved"), [("head", ("head.",)), ("last:1", ("head.", "backbone.stages.2."))]
)
def test_what_stands_still_keeps_its_bits(small_pack, tmp_path, adapt, moved):
    setting = f"model.adapt={adapt}"
    before = tensors_at_start(small_pack, tmp_path / "start", setting)
    run = trained(small_pack, tmp_path / "run", "plain", setting)
    for name, tensor in load_file(run / "model.safetensors").items():
        is_same = torch.equal(tensor, before[name][: len(tensor)] if tensor.ndim else before[name])
        assert is_same != name.startswith(moved), name  # statistics of batch norm, too
    newest = max((run / "checkpoints").iterdir())
    kept = load_file(newest / "model.safetensors")
    assert kept.keys() == {name for name in before if name.startswith(moved)}


def test_head_only_epochs_do_not_thaw_what_stands_still(small_pack, tmp_path):
    settings = ["model.adapt=last:1", "schedule.head_only_epochs=1"]
    before = tensors_at_start(small_pack, tmp_path / "start", *settings)
    run = trained(small_pack, tmp_path / "run", "plain", *settings)
    found = load_file(run / "model.safetensors")
    assert torch.equal(found["backbone.conv1.weight"], before["backbone.conv1.weight"])
    moved = "backbone.stages.2.conv1.weight"
    assert not torch.equal(found[moved], before[moved])


def test_a_kind_that_does_not_exist_is_refused(small_pack):
    with pytest.raises(ConfigError, match=r"model\.adapt"):
        config_of(small_pack, "plain", "model.adapt=last:0")


def test_the_backbone_has_a_rate_of_its_own():
    model = build_model(section()(name="resnet8"), 5, 32)
    for name in ("sgd", "adamw"):
        config = OptimConfig(name=name, lr=0.5, backbone_lr=0.1)
        optimiser = build_optimizer(config, model, 64)
        rates = {
            id(parameter): group["base_lr"]
            for group in optimiser.param_groups
            for parameter in group["params"]
        }
        assert all(rates[id(p)] == pytest.approx(0.05) for p in model.backbone.parameters())
        assert all(rates[id(p)] == 0.5 for p in model.head.parameters())
        assert len(rates) == len(list(model.parameters()))


# --- early


def test_a_training_ends_when_nothing_gets_better(small_pack, tmp_path):
    """With a rate of nearly nothing the figures stay, so the first evaluation is the best one."""
    settings = ["train.epochs=9", "train.eval_every=1", "train.patience=2", "optim.lr=1e-12"]
    said = Console(record=True, width=200)
    config = config_of(small_pack, "plain", *settings, "train.keep_best=true")
    result = train(config, tmp_path / "run", said)
    assert result["epochs"] == 3 and result["best"]["epoch"] == 1
    assert "ended after 3 epochs" in said.export_text()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3
    assert load_file(tmp_path / "run" / "best.safetensors").keys()
    assert train(config, tmp_path / "run", QUIET) == json.loads(
        (tmp_path / "run" / "result.json").read_text()
    )
    (tmp_path / "run" / "result.json").unlink()
    again = train(config, tmp_path / "run", QUIET)
    assert again["epochs"] == 3 and again["per_class"] == result["per_class"]


def test_the_best_model_is_that_of_its_epoch(small_pack, tmp_path):
    settings = ["train.epochs=4", "train.eval_every=1", "train.keep_best=true"]
    settings.append("train.monitor=balanced_accuracy")
    result = train(config_of(small_pack, "plain", *settings), tmp_path / "run", QUIET)
    best = result["best"]["epoch"]
    assert best <= 4 and "balanced_accuracy" in result["best"]
    shorter = [*settings, "train.keep=99"]
    run = trained(small_pack, tmp_path / "whole", "plain", *shorter)
    steps = sorted((run / "checkpoints").iterdir())
    expected = load_file(steps[best - 1] / "model.safetensors")
    found = load_file(tmp_path / "run" / "best.safetensors")
    assert torch.equal(found["backbone.conv1.weight"], expected["backbone.conv1.weight"])
    assert torch.equal(found["head.weight"], expected["head.weight"][:3])
