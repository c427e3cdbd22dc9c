"""Every method with everything that it may meet: resumed to the same bits, exported, evaluated.

Every other method with one partner runs always; all pairs, with `make test-slow`.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import method_cases
from helpers.method_cases import QUIET
from safetensors.torch import load_file

from fastlt.config import load_config
from fastlt.errors import UserError
from fastlt.evaluation.evaluate import evaluate_post_hoc, evaluate_run
from fastlt.evaluation.export import export_run
from fastlt.methods import method_names, method_settings
from fastlt.models.export import load_exported
from fastlt.training.loop import open_packs, train
from fastlt.training.run_folder import resume
from fastlt.training.setup import prepare

SMALL = [*method_cases.SMALL, "train.checkpoint_steps=1", "train.keep=99"]
# what a method needs besides, on a data set of 21 images of three targets
OWN: dict[str, list[str]] = {
    "dlsa": ["method.flow_epochs=2", "method.classifier_epochs=2", "method.clusters=4"],
    "attentive": ["method.epochs=2", "method.size=4"],
    "lcreg": ["method.latents=6"],
    "fate": ["method.graph_epochs=2", "method.shots=3", "method.folds=2"],
    "distill": ["method.teacher={teacher}"],
    "angular": ["method.second_share=0.5", "method.learn_scale=true"],
}
PARTNERS: dict[str, list[str]] = {
    "silencing": [],
    "mixed": ["augment.mixup=0.5", "augment.cutmix=1.0", "loss.label_smoothing=0.1"],
    "average": ["optim.ema=0.5"],
    "bf16": ["train.precision=bf16"],
    "accumulated": ["optim.accumulate=2", "optim.clip=1.0"],
    "head first": ["schedule.head_only_epochs=1"],
    "ranks": [],
    "compiled": ["train.compile=on"],
    "weighted": ["data.class_weights={a = 0.25, x = 3.0}", "augment.mixup=0.5"],
}
QUICK = [name for name in PARTNERS if name not in ("ranks", "compiled", "weighted")]
REFUSED = [("dlsa", "weighted")]
PAIRS = [
    (method, partner)
    for method in method_names()
    for partner in PARTNERS
    if (method, partner) not in REFUSED
]
SAMPLE = {
    (method, QUICK[number // 2 % len(QUICK)])
    for number, method in enumerate(method_names())
    if number % 2 == 0
} | {("distill", "weighted")}


@pytest.fixture(scope="module")
def teacher(small_pack, tmp_path_factory):
    run = tmp_path_factory.mktemp("teacher") / "run"
    train(load_config("cifar100-siblings", [*SMALL, place(small_pack)]), run, QUIET)
    return run


def place(pack: Path) -> str:
    return f"data.pack={json.dumps(str(pack))}"


def pair(method: str, partner: str):
    marks = [] if (method, partner) in SAMPLE else [pytest.mark.slow]
    return pytest.param(method, partner, marks=marks, id=f"{method}, {partner}")


@pytest.mark.parametrize(("method", "partner"), [pair(*names) for names in PAIRS])
def test_a_method_goes_with_it(small_pack, teacher, tmp_path, method, partner):
    own = [setting.format(teacher=teacher) for setting in OWN.get(method, [])]
    settings = [*SMALL, *own, *PARTNERS[partner]]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    start = train_together if partner == "ranks" else train_alone
    start(small_pack, whole, method, settings)
    shutil.copytree(whole, cut)
    (cut / "result.json").unlink()
    saved = sorted((cut / "checkpoints").iterdir())
    for path in saved[len(saved) // 2 + 1 :]:  # a kill amid an epoch
        shutil.rmtree(path)
    start(small_pack, cut, method, settings)
    assert_same_bits(whole, cut)
    evaluated = evaluate_run(whole)
    assert evaluated["per_class"] == json.loads((whole / "result.json").read_text())["per_class"]
    if partner == "silencing":
        assert "gives the same logits" in export_run(whole, tmp_path / "model.onnx")
    if partner not in ("ranks", "bf16"):
        assert_post_hoc_begins_as_trained(whole)
        assert_export_is_what_was_evaluated(whole, method, settings, small_pack)


def train_alone(pack: Path, run: Path, method: str, settings: list[str]) -> None:
    config = load_config(
        "cifar100-siblings", [place(pack), *settings], method_settings(method, None)
    )
    train(config, run, QUIET)


def train_together(pack: Path, run: Path, method: str, settings: list[str]) -> None:
    command = [sys.executable, "-m", "fastlt", "train", "cifar100-siblings", "--data", str(pack)]
    command += ["--out", str(run), "--nproc", "2", "--method", method, *settings]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def assert_same_bits(run: Path, other: Path) -> None:
    for name in ("model.safetensors", "method.safetensors", "ema.safetensors"):
        files = [max((place / "checkpoints").iterdir()) / name for place in (run, other)]
        assert files[0].exists() == files[1].exists()
        if files[0].exists():
            ours, theirs = (load_file(file) for file in files)
            assert ours.keys() == theirs.keys()
            wrong = [key for key in ours if not torch.equal(ours[key], theirs[key])]
            assert not wrong
    ours, theirs = (load_file(place / "model.safetensors") for place in (run, other))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def assert_post_hoc_begins_as_trained(run: Path) -> None:
    """Corrections see what the head sees, or are refused for models that do not predict by it."""
    model, _ = load_exported(run / "model.safetensors")
    if not model.predicts_by_head:
        with pytest.raises(UserError, match="and this one routes"):
            evaluate_post_hoc(run, ["cosine"], None, None, 0.2, 1.0)
        return
    found = evaluate_post_hoc(run, ["cosine"], None, None, 0.2, 1.0)
    assert next(iter(found.values()))["per_class"] == evaluate_run(run)["per_class"]


def assert_export_is_what_was_evaluated(
    run: Path, method: str, settings: list[str], pack: Path
) -> None:
    """The exported model gives the logits of the targets that the trained one gives."""
    exported, names = load_exported(run / "model.safetensors")
    config = load_config(
        "cifar100-siblings", [place(pack), *settings], method_settings(method, None)
    )
    images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with prepare(config, run, open_packs(config.data)) as trainer, torch.no_grad():
        resume(trainer, QUIET)
        trained = trainer.method if trainer.ema is None else trainer.ema.average
        expected = trained.predictor().eval()(images)[:, : len(names)]
    torch.testing.assert_close(exported(images), expected, rtol=1e-5, atol=1e-5)
