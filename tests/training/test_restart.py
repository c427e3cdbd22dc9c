"""A run that is stopped, killed, or loses what it wrote goes on to the same end; what cannot go on
says why.
"""

import contextlib
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file

import fastlt.training.loop as training
from fastlt.config import load_config
from fastlt.errors import UserError
from fastlt.packing.sources import read_collection
from fastlt.packing.writer import PackOptions, write_pack
from fastlt.training import checkpoint as ckpt
from fastlt.utils.signals import stop_on_signals

QUIET = Console(quiet=True)
SMALL = [
    "model.name=resnet8",
    "data.size=16",
    "data.batch=16",
    "data.padding=2",
    "train.epochs=4",
    "train.eval_every=2",
    "data.engine=torch",
    "data.workers=0",
    "train.threads=1",
    "train.checkpoint_steps=3",
    "optim.ema=0.9",
    "train.keep=3",
]


def config_of(pack: Path, *settings: str):
    return load_config(
        "cifar100-siblings", [*SMALL, f"data.pack={json.dumps(str(pack))}", *settings]
    )


def command_of(pack: Path, run: Path, *settings: str) -> list[str]:
    train = [sys.executable, "-m", "fastlt", "train", "cifar100-siblings"]
    return [*train, "--data", str(pack), "--out", str(run), *SMALL, *settings]


def same_weights(run: Path, other: Path) -> bool:
    wanted, got = load_file(run / "model.safetensors"), load_file(other / "model.safetensors")
    return wanted.keys() == got.keys() and all(
        torch.equal(wanted[name], got[name]) for name in wanted
    )


@pytest.fixture(scope="module")
def undisturbed(small_pack, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "undisturbed"
    training.train(config_of(small_pack), run, QUIET)
    return run


@pytest.fixture(scope="module")
def photo_pack(tmp_path_factory) -> Path:
    """Images of several sizes, which workers decode: small ones of one size would be kept in
    memory.
    """
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split, count in (("target", 12), ("auxiliary", 6), ("val", 2)):
        for name in ("x", "y") if split == "auxiliary" else ("a", "b", "c"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (70 + i, 80 + ord(name) % 7, 3), np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.jpg")
    (root / "pairs.csv").write_text("target,auxiliary\na,x\nb,y\n")
    collection = read_collection(
        root / "target", root / "auxiliary", root / "val", root / "pairs.csv"
    )
    return write_pack(collection, PackOptions(out=root / "pack", workers=1), QUIET)


# --- signals


@pytest.mark.parametrize(
    ("number", "workers"),
    [
        (signal.SIGTERM, 0),
        pytest.param(signal.SIGINT, 2, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 0, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 2, marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_asked_to_stop_saves_and_goes_on_to_the_same_bits(
    small_pack, photo_pack, undisturbed, tmp_path, number, workers
):
    command = command_of(
        photo_pack if workers else small_pack,
        tmp_path / "run",
        f"data.workers={workers}",
        "data.decode=exact",
    )
    if workers:  # decode 16-pixel images in workers, instead of keeping them
        command += ["data.size=16", "data.crop=random-resized-crop"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not ckpt.checkpoints(tmp_path / "run"):
        assert process.poll() is None and time.monotonic() < deadline, (
            "the run ended before it was stopped"
        )
        time.sleep(0.002)
    os.killpg(process.pid, number)  # as a terminal's Ctrl-C, workers too
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert (
        "once more stops at once" in out
        and "the same command goes on from there" in out
        and "Traceback" not in err
    )
    assert not (tmp_path / "run/result.json").exists()
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert "resumed from step-" in again.stdout
    if not workers:
        assert same_weights(undisturbed, tmp_path / "run")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "attempt", [pytest.param(number, marks=pytest.mark.slow) for number in range(3)]
)
def test_a_worker_that_is_killed_ends_the_run_with_one_sentence(photo_pack, tmp_path, attempt):
    """Whatever the training is about at that moment:

    PyTorch tells it by an error in the middle of anything.
    """
    settings = [
        "data.workers=2",
        "data.engine=torch",
        "data.decode=exact",
        "data.crop=random-resized-crop",
        "data.size=80",
        "train.epochs=5000",
        "train.eval_every=5000",
    ]
    run = tmp_path / "run"
    command = command_of(photo_pack, run, *settings)
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    try:
        deadline = time.monotonic() + 120
        while not ckpt.checkpoints(run):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01 * (attempt + 1))
        tasks = Path(f"/proc/{process.pid}/task")
        children = [
            int(child)
            for task in tasks.iterdir()
            for child in (task / "children").read_text().split()
        ]
        os.kill(children[0], signal.SIGKILL)
        _, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert (
        process.returncode == 2
        and "a worker of the torch engine failed" in err
        and "Traceback" not in err
    )


def test_a_second_signal_stops_at_once():
    before = signal.getsignal(signal.SIGTERM)
    for number, raised in ((signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)):
        with stop_on_signals(QUIET) as request:
            os.kill(os.getpid(), signal.SIGTERM)
            assert request.requested
            with pytest.raises(raised):
                os.kill(os.getpid(), number)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_run_that_stops_in_an_evaluation_evaluates_once_more(
    small_pack, undisturbed, tmp_path, monkeypatch
):
    asked = []

    def stop_in_first(trainer, batches):
        if not asked:
            asked.append(trainer.state.epoch)
            trainer.stop.requested = True
        return original(trainer, batches)

    original = training.until_asked_to_stop
    monkeypatch.setattr(training, "until_asked_to_stop", stop_in_first)
    with pytest.raises(training.Stopped, match="stopped at epoch 2"):
        training.train(config_of(small_pack), tmp_path / "run", QUIET)
    training.train(config_of(small_pack), tmp_path / "run", QUIET)
    assert same_weights(undisturbed, tmp_path / "run")
    ours, theirs = (
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (undisturbed, tmp_path / "run")
    )
    assert ours == theirs and len(ours) == 4


# --- damage


def interrupted(pack: Path, run: Path, monkeypatch) -> None:
    """A run that stopped amid its second epoch, with three checkpoints."""
    steps = []

    def counting(config, step, last_saved):
        steps.append(step)
        if len(steps) == 12:
            raise InterruptedError
        return step % 3 == 0

    with monkeypatch.context() as patch:
        patch.setattr(training, "is_due", counting)
        with pytest.raises(InterruptedError):
            training.train(config_of(pack), run, QUIET)
    assert len(ckpt.checkpoints(run)) == 3


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "file",
    [
        "model.safetensors",
        "optimizer.safetensors",
        "ema.safetensors",
        "state.json",
        "SHA256SUMS",
        "gone",
    ],
)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(
    small_pack, undisturbed, tmp_path, monkeypatch, file
):
    run = tmp_path / "run"
    interrupted(small_pack, run, monkeypatch)
    newest = ckpt.checkpoints(run)[-1]
    if file == "gone":
        (newest / "model.safetensors").unlink()
    else:
        flip(newest / file)
    console = Console(record=True, width=300, file=io.StringIO())
    training.train(config_of(small_pack), run, console)
    said = console.export_text()
    assert f"{newest.name} is damaged" in said and "resumed from step-" in said
    assert same_weights(undisturbed, run)


def test_without_a_sound_checkpoint_nothing_is_begun(small_pack, tmp_path, monkeypatch):
    run = tmp_path / "run"
    interrupted(small_pack, run, monkeypatch)
    for saved in ckpt.checkpoints(run):
        flip(saved / "model.safetensors")
    with pytest.raises(
        UserError, match=r"is damaged \(model\.safetensors has changed.*no sound one before"
    ):
        training.train(config_of(small_pack), run, QUIET)
    assert len(ckpt.checkpoints(run)) == 3


def test_sums_are_those_of_sha256sum(undisturbed):
    if shutil.which("sha256sum") is None:
        pytest.skip("no sha256sum here")
    saved = ckpt.checkpoints(undisturbed)[-1]
    checked = subprocess.run(
        ["sha256sum", "-c", "SHA256SUMS"], cwd=saved, capture_output=True, text=True, timeout=60
    )
    assert checked.returncode == 0 and "model.safetensors: OK" in checked.stdout


def test_what_is_written_is_what_was_there_when_it_was_saved(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, fused=True)
    before = model.weight.detach().clone()
    writer = ckpt.Writer()
    tensors = ckpt.snapshot(model, optimizer, None)
    with torch.no_grad():
        model.weight.zero_()
    writer.write(tmp_path, 1, tensors, {}, 1)
    writer.wait()
    assert torch.equal(
        load_file(ckpt.checkpoints(tmp_path)[0] / "model.safetensors")["weight"], before
    )
    (tmp_path / "file").write_text("")
    writer.write(tmp_path / "file", 2, tensors, {}, 1)
    with pytest.raises(OSError):
        writer.write(tmp_path, 3, tensors, {}, 1)
    writer.close()


# --- the disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own, of 2 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk is not allowed here")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="mounts are of Linux")
def test_a_full_disk_is_one_sentence_and_the_run_can_go_on(small_pack, undisturbed, small_disk):
    run, filler = small_disk / "run", small_disk / "filler"
    filler.write_bytes(b"\0" * 800_000)  # a checkpoint has 0.9 MB: the second one does not fit
    with pytest.raises(
        UserError,
        match=r"the disk with .*run is full: free some space .* it goes on from step-00000003",
    ):
        training.train(config_of(small_pack), run, QUIET)
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000003"]
    filler.unlink()
    shutil.move(run, small_disk.parent / "moved")
    training.train(config_of(small_pack), small_disk.parent / "moved", QUIET)
    assert same_weights(undisturbed, small_disk.parent / "moved")


def test_safetensors_says_what_is_wrong_as_others_do(tmp_path):
    with pytest.raises(OSError) as caught:
        ckpt.write_tensors(tmp_path / "nowhere/x.safetensors", {"a": torch.zeros(1)})
    assert caught.value.errno == errno.ENOENT


def test_a_refused_run_leaves_nothing(small_pack, tmp_path):
    with pytest.raises(UserError, match="an epoch has"):
        training.train(
            config_of(small_pack, "data.batch=10000", "data.drop_last=true"),
            tmp_path / "run",
            QUIET,
        )
    assert not (tmp_path / "run").exists()


# --- gradients that are not finite


def test_a_step_that_is_not_finite_is_skipped_and_counted(small_pack, tmp_path, monkeypatch):
    """Not in the weights, not in the batch-norm statistics, not in the averages; mixed in at the
    input, it reaches all of them.
    """
    original = training.make_input

    def poisoned(config, pixels, *rest):
        images, *others = original(config, pixels, *rest)
        steps.append(1)
        return (images * float("nan") if len(steps) == 5 else images, *others)

    steps: list[int] = []
    monkeypatch.setattr(training, "make_input", poisoned)
    result = training.train(config_of(small_pack), tmp_path / "run", QUIET)
    assert result["skipped_steps"] == 1 and len(steps) > 20
    newest = ckpt.checkpoints(tmp_path / "run")[-1]
    for file in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(newest / file).values())
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(line["loss"] > 0 and line["skipped_steps"] == 1 for line in lines)


def test_an_epoch_without_a_finite_step_has_no_loss_and_says_so(small_pack, tmp_path, monkeypatch):
    original = training.make_input

    def poisoned(config, pixels, *rest):
        images, *others = original(config, pixels, *rest)
        return (images * float("nan"), *others)

    monkeypatch.setattr(training, "make_input", poisoned)
    console = Console(record=True, width=200, file=io.StringIO())
    config = config_of(small_pack, "train.epochs=1", "train.eval_every=1", "train.max_skipped=1000")
    training.train(config, tmp_path / "run", console)
    said = console.export_text()
    assert re.search(
        r"note: \d+ steps of epoch 1 were skipped: their gradient was not finite", said
    )
    assert re.search(r"epoch +1/1  loss +-  ", said)
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text())["loss"] is None


# --- what has finished


def test_a_run_stopped_in_its_last_evaluation_finishes_when_resumed(
    small_pack, undisturbed, tmp_path, monkeypatch
):
    original = training.until_asked_to_stop

    def stop_in_last(trainer, batches):
        if trainer.state.epoch == 3:
            trainer.stop.requested = True
        return original(trainer, batches)

    with monkeypatch.context() as patch:
        patch.setattr(training, "until_asked_to_stop", stop_in_last)
        with pytest.raises(training.Stopped):
            training.train(config_of(small_pack), tmp_path / "run", QUIET)
    result = training.train(config_of(small_pack), tmp_path / "run", QUIET)
    lines = (tmp_path / "run/metrics.jsonl").read_text()
    console = Console(record=True, width=200, file=io.StringIO())
    assert training.train(config_of(small_pack), tmp_path / "run", console) == result
    said = console.export_text()
    assert "has finished already" in said and "resumed" not in said
    assert (tmp_path / "run/metrics.jsonl").read_text() == lines and lines.count("\n") == 4
    assert same_weights(undisturbed, tmp_path / "run")


@pytest.mark.parametrize("damage", ['{"top1": 3', "[]", "\x00\xff"])
def test_a_result_that_cannot_be_read_is_made_anew(small_pack, tmp_path, undisturbed, damage):
    shutil.copytree(undisturbed, tmp_path / "run")
    whole = json.loads((tmp_path / "run/result.json").read_text())
    (tmp_path / "run/result.json").write_bytes(damage.encode("latin-1"))
    with (tmp_path / "run/metrics.jsonl").open("ab") as file:
        file.write(b"\xff\xfe\n")
    again = training.train(config_of(small_pack), tmp_path / "run", QUIET)
    assert (
        again["per_class"] == whole["per_class"]
        and json.loads((tmp_path / "run/result.json").read_text()) == again
    )


def test_what_a_checkpoint_does_not_vouch_for_counts_as_damage(
    small_pack, undisturbed, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    interrupted(small_pack, run, monkeypatch)
    newest = ckpt.checkpoints(run)[-1]
    sums = (newest / "SHA256SUMS").read_text().splitlines(keepends=True)
    (newest / "SHA256SUMS").write_text("".join(line for line in sums if "state.json" not in line))
    (newest / "state.json").write_text("x")
    (run / "checkpoints/step-99999999").write_text("no folder")
    console = Console(record=True, width=300, file=io.StringIO())
    training.train(config_of(small_pack), run, console)
    assert (
        f"{newest.name} is damaged (SHA256SUMS does not list state.json)" in console.export_text()
    )
    assert same_weights(undisturbed, run)


@pytest.mark.skipif(sys.platform != "linux", reason="mounts are of Linux")
def test_a_full_disk_is_one_sentence_of_every_command(undisturbed, small_disk):
    for name in (
        "config.toml",
        "classes.json",
        "result.json",
        "metrics.jsonl",
        "model.safetensors",
    ):
        shutil.copy(undisturbed / name, small_disk / name)
    with contextlib.suppress(OSError), (small_disk / "filler").open("wb") as file:
        while True:
            file.write(bytes(65536))
            file.flush()
    command = [
        sys.executable,
        "-m",
        "fastlt",
        "export",
        str(small_disk),
        "--to",
        str(small_disk / "x.safetensors"),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (
        ended.returncode == 2
        and "is full: free some space" in ended.stderr
        and "Traceback" not in ended.stderr
    )
