"""Two processes train as one does on their images together, and go on after a kill."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fastlt.config import load_config
from fastlt.evaluation.evaluate import evaluate_run
from fastlt.training import checkpoint as ckpt
from fastlt.training.loop import train

if find_spec("timm") is None:
    pytest.skip("timm is an extra", allow_module_level=True)
QUIET = Console(quiet=True)
# Without batch norm, whose statistics are of a rank's own images, nothing depends on how images are
# shared out.
VIT = [
    "model.name=test_vit",
    "data.size=32",
    "data.batch=16",
    "data.padding=4",
    "data.drop_last=true",
    "train.epochs=3",
    "train.eval_every=1",
    "optim.lr=0.02",
    "train.threads=1",
    "train.checkpoint_steps=2",
]
# what is to happen amid the run does not come too late on a busy machine
LONG = [
    "train.epochs=24",
    "train.eval_every=12",
]
CASES = {
    "linear": [],
    "accumulating": ["data.batch=8", "optim.accumulate=2", "optim.clip=0.5", "optim.ema=0.5"],
    "weighted": ["loss.name=class-balanced"],
    "head first": [
        "schedule.name=cosine",
        "schedule.head_only_epochs=1",
        "optim.name=adamw",
        "optim.lr=1e-3",
    ],
    "deferred": [
        "loss.name=ldam",
        "model.head=cosine",
        "loss.drw_epoch=1",
        "schedule.name=step",
        "schedule.steps={2=0.1}",
    ],
    "class-parallel": ["model.head=class-parallel", "optim.clip=0.5", "optim.ema=0.5"],
    "row weights": [
        "data.batch=8",
        "optim.accumulate=2",
        "data.class_weights={a = 0.25, x = 3.0}",
    ],
    "row weights, class-parallel": [
        "model.head=class-parallel",
        "optim.clip=0.5",
        "optim.ema=0.5",
        "data.class_weights={a = 0.25, x = 3.0}",
    ],
    "both weights": ["loss.name=class-balanced", "data.class_weights={a = 0.25, x = 3.0}"],
    "adaptformer": ["model.adapt=adaptformer", "optim.ema=0.5"],
    "prompts": ["model.adapt=vpt-deep", "optim.clip=0.5"],
    "lora": ["model.adapt=lora", "model.checkpoint_activations=true"],
    "features": ["model.adapt=head", "data.features=cache"],
}


def command_of(pack: Path, run: Path, *settings: str, processes: int = 2) -> list[str]:
    start = [
        sys.executable,
        "-m",
        "fastlt",
        "train",
        "cifar100-siblings",
        "--data",
        str(pack),
        "--out",
        str(run),
    ]
    return [*start, "--nproc", str(processes), *VIT, *settings]


def run_together(
    pack: Path, run: Path, *settings: str, processes: int = 2
) -> subprocess.CompletedProcess[str]:
    command = command_of(pack, run, *settings, processes=processes)
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def run_alone(pack: Path, run: Path, *settings: str) -> None:
    train(
        load_config("cifar100-siblings", [*VIT, f"data.pack={json.dumps(str(pack))}", *settings]),
        run,
        QUIET,
    )


def curve(run: Path, name: str = "loss") -> list[float]:
    return [json.loads(line)[name] for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_near(run: Path, other: Path) -> None:
    np.testing.assert_allclose(curve(run), curve(other), rtol=2e-4)
    ours, theirs = load_file(run / "model.safetensors"), load_file(other / "model.safetensors")
    for name in ours:
        # Adam divides by tiny roots
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-2, atol=1e-3)
    one, two = (json.loads((place / "result.json").read_text()) for place in (run, other))
    assert one["images"] == two["images"] and one["epochs"] == two["epochs"]


# what others have within them is slow: each takes three trainings
WITHIN_OTHERS = {"linear", "deferred", "weighted", "row weights", "both weights", "head first"}
WITHIN_OTHERS |= {"adaptformer", "prompts", "lora", "features", "accumulating", "class-parallel"}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.slow) if case in WITHIN_OTHERS else case
        for case in CASES
    ],
)
def test_two_processes_end_as_one_does_on_all_their_images(small_pack, tmp_path, case):
    ended = run_together(small_pack, tmp_path / "two", *CASES[case])
    assert ended.returncode == 0, ended.stderr
    assert "2 processes on" in ended.stdout and ended.stdout.count("worst class") == 1
    run_alone(small_pack, tmp_path / "one", *CASES[case])
    assert_near(tmp_path / "two", tmp_path / "one")
    one, two = (np.load(tmp_path / name / "val_predictions.npz") for name in ("one", "two"))
    assert (one["image"] == two["image"]).all() and (one["label"] == two["label"]).all()
    np.testing.assert_allclose(one["confidence"], two["confidence"], atol=1e-3)
    assert (
        evaluate_run(tmp_path / "two")["top1"]
        == json.loads((tmp_path / "two/result.json").read_text())["top1"]
    )


def start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_checkpoint(process: subprocess.Popen[str], run: Path, known: set[Path]) -> None:
    deadline = time.monotonic() + 120
    while not set(ckpt.checkpoints(run)) - known:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """The processes that the launcher has started, by age."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [
        int(child) for child in children if b"fastlt" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def kill_ranks(small_pack: Path, run: Path, kills: int, *settings: str) -> str:
    process = start(command_of(small_pack, run, *settings))
    rng = np.random.default_rng(0)
    for _ in range(kills):
        wait_for_checkpoint(process, run, set(ckpt.checkpoints(run)))
        time.sleep(rng.uniform(0, 0.1))
        os.kill(ranks_of(process)[rng.integers(2)], signal.SIGKILL)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
@pytest.mark.parametrize("case", ["linear", "class-parallel"])
def test_a_killed_process_is_started_again_and_nothing_is_lost(small_pack, tmp_path, case):
    out = kill_ranks(small_pack, tmp_path / "killed", 1, *CASES[case], *LONG)
    assert "all are started again" in out and "resumed from step-" in out
    assert run_together(small_pack, tmp_path / "undisturbed", *CASES[case], *LONG).returncode == 0
    assert curve(tmp_path / "killed") == curve(tmp_path / "undisturbed")
    ours, theirs = (
        load_file(tmp_path / name / "model.safetensors") for name in ("killed", "undisturbed")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_five_kills_of_one_of_two_processes(small_pack, tmp_path):
    settings = ["train.epochs=30", "train.eval_every=10"]
    for number in range(2):  # the launcher starts them again three times
        process = start(command_of(small_pack, tmp_path / "killed", *settings))
        for _ in range(3 if number else 2):
            wait_for_checkpoint(
                process, tmp_path / "killed", set(ckpt.checkpoints(tmp_path / "killed"))
            )
            os.kill(ranks_of(process)[number], signal.SIGKILL)
        if number == 0:
            wait_for_checkpoint(
                process, tmp_path / "killed", set(ckpt.checkpoints(tmp_path / "killed"))
            )
            process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
    assert run_together(small_pack, tmp_path / "undisturbed", *settings).returncode == 0
    assert curve(tmp_path / "killed") == curve(tmp_path / "undisturbed")


@pytest.mark.parametrize(
    ("case", "first", "then"),
    [
        pytest.param("class-parallel", 2, 1, marks=pytest.mark.slow),
        pytest.param("class-parallel", 1, 2, marks=pytest.mark.slow),
        pytest.param("linear", 2, 1, marks=pytest.mark.slow),
        pytest.param("linear", 1, 2, marks=pytest.mark.slow),
    ],
)
def test_another_number_of_processes_goes_on(small_pack, tmp_path, case, first, then):
    settings = [*CASES[case], *LONG]
    process = start(command_of(small_pack, tmp_path / "run", *settings, processes=first))
    wait_for_checkpoint(process, tmp_path / "run", set())
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert (
        re.search(r"stopped at epoch \d, step \d+: the same command goes on", out)
        and "Traceback" not in err
    )
    assert not (tmp_path / "run/result.json").exists()
    ended = run_together(small_pack, tmp_path / "run", *settings, processes=then)
    assert ended.returncode == 0 and "resumed from step-" in ended.stdout, ended.stderr
    run_alone(small_pack, tmp_path / "alone", *settings)
    assert_near(tmp_path / "run", tmp_path / "alone")


@pytest.mark.slow
def test_bad_input_ends_it_once_and_for_all(small_pack, tmp_path):
    ended = run_together(small_pack, tmp_path / "run", "data.batch=7", "data.drop_last=false")
    assert ended.returncode == 2 and "cannot be shared equally by 2 ranks" in ended.stderr
    assert "started again" not in ended.stdout and "Traceback" not in ended.stderr


@pytest.mark.slow
def test_batch_norm_over_processes_needs_gpus(small_pack, tmp_path):
    ended = run_together(small_pack, tmp_path / "run", "model.sync_bn=true", "model.name=resnet8")
    assert ended.returncode == 2 and "model.sync_bn needs GPUs" in ended.stderr


def test_losses_that_need_all_classes_are_refused_by_a_class_parallel_head(small_pack, tmp_path):
    ended = run_together(
        small_pack, tmp_path / "run", "model.head=class-parallel", "loss.name=focal"
    )
    assert (
        ended.returncode == 2
        and "model.head=class-parallel does not go with loss.name=focal" in ended.stderr
    )
