"""`fastlt train --dry-run` tells what a run would take, and trains nothing."""

import json
import re
import subprocess
import sys

import pytest
import torch
from helpers.command import fastlt
from rich.console import Console

from fastlt.config import load_config
from fastlt.errors import UserError
from fastlt.packing.reader import open_pack
from fastlt.training import dry_run as module
from fastlt.training.dry_run import Memory, Speed, estimate, memory_of, own_steps, probe, timed
from fastlt.training.loop import open_packs, set_modes
from fastlt.training.setup import prepare

SMALL = [
    "model.name=resnet8",
    "data.size=16",
    "data.batch=16",
    "data.padding=2",
    "data.workers=0",
    "train.threads=1",
]


@pytest.fixture
def trainer_of(small_pack, tmp_path):
    made = []

    def make(*settings):
        config = load_config(
            "cifar100-siblings", [*SMALL, f"data.pack={json.dumps(str(small_pack))}", *settings]
        )
        made.append(prepare(config, tmp_path / "run", open_packs(config.data)))
        set_modes(made[-1])
        return made[-1]

    yield make
    for trainer in made:
        trainer.train_loader.close()
        trainer.val_loader.close()


def test_memory_is_that_of_parameters_and_of_the_optimisers_state(trainer_of):
    trainer = trainer_of("optim.ema=0.9")
    parameters = 4 * sum(parameter.numel() for parameter in trainer.model.parameters())
    memory = memory_of(trainer, 7)
    # SGD keeps one momentum for each
    assert memory == Memory(parameters, parameters, parameters, parameters, 7)
    assert memory.at(10) == 4 * parameters + 70
    adam = memory_of(trainer_of("optim.name=adamw"), 7)
    steps = 4 * len(list(trainer.model.parameters()))
    assert adam.optimiser == 2 * parameters + steps and adam.averaged == 0


def test_what_an_image_keeps_grows_with_the_model_and_not_with_the_batch(trainer_of):
    trainer = trainer_of()
    few, more = probe(trainer, 2)[0], probe(trainer, 16)[0]
    assert few == pytest.approx(more, rel=0.2)
    # of an image: what conv1 and bn1 take in, and the ReLU gives
    first_layer = 4 * (3 * 16 * 16 + 2 * 16 * 16 * 16)
    assert few > first_layer
    assert probe(trainer_of("model.name=resnet14"), 8)[0] > 1.5 * probe(trainer, 8)[0]
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_its_steps_are_the_trainers_own(trainer_of, monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.5)
    trainer = trainer_of()
    before = trainer.model.head.weight.detach().clone()
    speed = timed(trainer, 5)
    assert speed.batch == 5 and speed.steps >= 1 and speed.images_per_second > 0
    assert trainer.plan.batch == 5 and not torch.equal(trainer.model.head.weight, before)
    next(own_steps(trainer))


def test_the_estimate_multiplies(trainer_of):
    config = trainer_of("data.batch=16").config
    told = estimate(
        config,
        2,
        (36, 10, 155),
        Memory(10**9, 10**9, 2 * 10**9, 0, 5 * 10**8),
        Speed(0.5, 4, 9),
        torch.device("cpu"),
    )
    assert told["memory"].startswith(
        "8.00 GB of each of 2 processes: weights 1.00 GB, gradients 1.00 GB, optimiser 2.00 GB, "
        "and 8 images of 500.0 MB"
    )
    assert told["steps"] == "10 an epoch, 360 in 36 epochs"
    # 36 * 155 / (0.5 * 2) seconds
    assert told["time"].startswith("1.6 hours of training, if 2 processes")
    assert "measured over 9 steps of 4 loaded images" in told["speed"]
    much = estimate(
        config,
        1,
        (36, 10, 160),
        Memory(10**15, 0, 0, 0, 1),
        Speed(9999.0, 4, 9),
        torch.device("cpu"),
    )
    assert (
        much["memory"].endswith("TOO LITTLE, lower data.batch")
        and much["time"] == "0.0 minutes of training"
    )
    with pytest.raises(UserError, match=r"data\.batch=16 cannot be shared equally by 3 processes"):
        module.dry_run(config, 3, Console(quiet=True))


def test_the_command_prints_and_writes_nothing(small_pack, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["train", "cifar100-siblings", "--data", str(small_pack), "--dry-run", *SMALL]
    ended = fastlt(*command)
    assert ended.returncode == 0, ended.stderr
    for line in (
        r"memory  [\d.]+ MB of one process",
        r"steps  \d+ an epoch",
        r"speed  [\d.,]+ images/s",
        r"time  [\d.]+ minutes",
    ):
        assert re.search(line, ended.stdout)
    assert not list(tmp_path.iterdir())
    missing = fastlt("train", "cifar100-siblings", "--data", small_pack)
    assert missing.returncode == 2 and "name a folder with --out RUN" in missing.stderr


@pytest.mark.slow
def test_a_class_parallel_head_has_a_dry_run(small_pack):
    command = [sys.executable, "-m", "fastlt", "train", "cifar100-siblings", "--dry-run"]
    command += ["--data", str(small_pack), *SMALL, "model.head=class-parallel"]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert re.search(r"memory  [\d.]+ MB of one process", ended.stdout)


def test_a_dry_run_of_features_computes_none(small_pack, capsys):
    before = {*small_pack.rglob("features/*")}
    cached = ["model.adapt=head", "data.features=cache", "data.feature_views=7"]
    place = f"data.pack={json.dumps(str(small_pack))}"
    module.dry_run(
        load_config("cifar100-siblings", [*SMALL, place, *cached]), 1, Console(width=200)
    )
    said = capsys.readouterr().out
    pack = open_pack(small_pack)
    images = 7 * len(pack.train) + len(pack.val)
    assert f"of {images:,} images and views are computed first" in said and "speed" in said
    assert {*small_pack.rglob("features/*")} == before
