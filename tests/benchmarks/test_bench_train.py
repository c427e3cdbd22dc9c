import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from fastlt.config import load_config
from fastlt.errors import UserError
from fastlt.packing.reader import open_pack
from fastlt.studies.auxiliary_kinds import KINDS
from fastlt.studies.repeated import Control, spread, table, train_all
from fastlt.training.setup import prepare
from fastlt.utils.results_file import append_rows, command
from fastlt_benchmarks import train, train_steps
from fastlt_benchmarks.loaders.regions import write_images
from fastlt_benchmarks.train import run_bench_train

SMALL = ["model.name=resnet8", "data.size=16", "data.batch=16"]


@pytest.mark.parametrize("compiled", ["off", pytest.param("on", marks=pytest.mark.slow)])
def test_rates_and_parts_are_printed_and_kept_with_their_context(
    small_pack, tmp_path, capsys, compiled
):
    path = tmp_path / "train.csv"
    settings = [*SMALL, f"train.compile={compiled}"]
    run_bench_train(
        "cifar100-siblings",
        settings,
        str(small_pack),
        steps=5,
        rounds=2,
        csv=path,
        console=Console(),
    )
    printed = capsys.readouterr().out
    for word in (
        "bare forward + backward + step",
        "fastlt train",
        "loop / bare",
        "waiting for images",
        "GFLOP an image",
    ):
        assert word in printed
    assert ("the same, compiled" in printed) == (compiled == "on")
    (row,) = csv.DictReader(path.open())
    assert float(row["bare_images_per_second"]) > 0 and float(row["loop_images_per_second"]) > 0
    assert bool(row["bare_compiled_images_per_second"]) == (compiled == "on")
    assert sum(float(row[part]) for part in train.PARTS) == pytest.approx(1, abs=0.1)
    assert float(row["backward"]) > float(row["optimiser"]) > 0
    assert float(row["gflop_per_image"]) > 0 and float(row["peak_memory_mb"]) > 100
    assert (
        0 < float(row["utilisation"]) < 1 if torch.cuda.is_available() else row["utilisation"] == ""
    )
    assert row["machine"] and row["torch"] and row["command"].startswith("fastlt ")


def test_parts_are_from_mark_to_mark(monkeypatch):
    now = iter([1.0, 1.5, 4.0, 4.25, 9.0])
    monkeypatch.setattr(train_steps.time, "perf_counter", lambda: next(now))
    marks = train_steps.Marks(torch.device("cpu"))
    for part in ("optimiser", "wait", "forward", "wait"):  # what came before the first is unknown
        marks(part)
    assert marks.seconds() == {"wait": 0.75, "forward": 2.5}
    marks("wait")  # something else was measured meanwhile
    assert marks.seconds() == {}


def test_flops_are_those_of_the_convolutions(small_pack, tmp_path):
    config = load_config("cifar100-siblings", [*SMALL, f"data.pack={json.dumps(str(small_pack))}"])
    trainer = prepare(config, tmp_path / "run", open_pack(small_pack))
    # ResNet-8 at 16 pixels: products a layer, of the forward pass; the backward has twice as many,
    # but for the first layer's input.
    sides, forward = {16: 16, 32: 8, 64: 4}, [3 * 16 * 9 * 16**2]
    for wide_in, wide in ((16, 16), (16, 32), (32, 64)):
        forward += [wide_in * wide * 9 * sides[wide] ** 2, wide * wide * 9 * sides[wide] ** 2]
    forward.append(64 * trainer.space.num_classes)
    assert train_steps.flops_per_image(trainer) == 2 * (3 * sum(forward) - forward[0])


def test_a_pack_at_an_address(small_pack, tmp_path, monkeypatch):
    fsspec = pytest.importorskip(
        "fsspec", reason="no fsspec here: it comes with the extra `remote`"
    )
    monkeypatch.setenv("FASTLT_CACHE", str(tmp_path / "cache"))
    fsspec.filesystem("memory").put(str(small_pack), "/far/pack", recursive=True)
    run_bench_train(
        "cifar100-siblings",
        SMALL,
        "memory://far/pack",
        5,
        1,
        tmp_path / "train.csv",
        Console(quiet=True),
    )
    (row,) = csv.DictReader((tmp_path / "train.csv").open())
    assert float(row["loop_images_per_second"]) > 0


@pytest.mark.slow
def test_a_pack_is_made_where_none_is_given(tmp_path):
    run_bench_train(
        "cifar100-lt",
        SMALL,
        None,
        steps=5,
        rounds=1,
        csv=tmp_path / "train.csv",
        console=Console(quiet=True),
    )
    (row,) = csv.DictReader((tmp_path / "train.csv").open())
    assert (row["model"], row["batch"], row["size"]) == ("resnet8", "16", "16")


def test_rows_of_another_benchmark_are_not_mixed_in(tmp_path):
    append_rows(tmp_path / "a.csv", [{"x": 1}])
    append_rows(tmp_path / "a.csv", [{"x": 2}])
    assert [row["x"] for row in csv.DictReader((tmp_path / "a.csv").open())] == ["1", "2"]
    with pytest.raises(UserError, match="other columns"):
        append_rows(tmp_path / "a.csv", [{"y": 1}])


def test_the_command_that_is_kept_names_no_machine(monkeypatch):
    words = [
        "fastlt",
        "reproduce",
        "cifar100-lt",
        "--data",
        "cifar100:/data/of me/cifar",
        "--out",
        "/tmp/runs",
        "data.mean=[0, 1, 2]",
        "model.weights=/data/weights/a.safetensors",
        "model.head_weights=/data/text.npz:vectors",
        "data.pack=s3://bucket/pack",
    ]
    monkeypatch.setattr(sys, "argv", words)
    kept = command("fastlt")
    assert kept == (
        "fastlt reproduce cifar100-lt --data cifar100:cifar --out runs 'data.mean=[0, 1, 2]' "
        "model.weights=a.safetensors model.head_weights=text.npz:vectors data.pack=s3://bucket/pack"
    )


RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results"


@pytest.mark.parametrize("name", sorted(path.name for path in RESULTS.glob("*.csv")))
def test_results_name_no_path_of_a_machine(name):
    found = re.findall(r"(?:^|[\s=:,'\"])(/\w[\w.-]*/[^,\s]*)", (RESULTS / name).read_text(), re.M)
    assert not found, found[:3]


def test_controls_have_mean_and_deviation_and_no_zero_for_an_empty_group():
    rows = [
        {"control": name, "top1": 50.0 + seed, "many": 60.0, "medium": 1.0, "few": None}
        for name in KINDS
        for seed in range(3)
    ]
    assert spread([50.0, 51.0, 52.0]) == "51.0 ± 1.0"
    assert spread([None, None]) == "-"
    assert table(rows).row_count == len(KINDS)


@pytest.mark.slow
def test_controls_are_trained_seed_by_seed_and_read_again(small_pack, tmp_path):
    settings = [*SMALL, "train.epochs=1"]
    controls = {
        "as it is": Control(small_pack, settings),
        "alone": Control(small_pack, [*settings, "data.auxiliary=false", "loss.name=balanced-ce"]),
    }
    rows = train_all("cifar100-siblings", controls, tmp_path, 2, 2, Console(quiet=True))
    assert [(row["control"], row["seed"]) for row in rows] == [
        ("as it is", 0),
        ("alone", 0),
        ("as it is", 1),
        ("alone", 1),
    ]
    assert (tmp_path / "as-it-is-seed1/result.json").is_file() and all(
        0 <= row["top1"] <= 100 for row in rows
    )
    assert train_all("cifar100-siblings", controls, tmp_path, 2, 2, Console(quiet=True)) == rows
    with pytest.raises(UserError, match=r"there is no setting 'no\.such'"):
        train_all(
            "cifar100-siblings",
            {"wrong": Control(small_pack, ["no.such=1"])},
            tmp_path,
            1,
            1,
            Console(quiet=True),
        )
    with pytest.raises(UserError, match=r"(?s)ended with code 2: .*nowhere"):
        train_all(
            "cifar100-siblings",
            {"lost": Control(tmp_path / "nowhere", settings)},
            tmp_path,
            1,
            1,
            Console(quiet=True),
        )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_a_run_that_is_stopped_from_outside_is_said_to_go_on(small_pack, tmp_path):
    """It saves, and ends with code 0, as it should, but has no result."""

    def stop_once_checkpointed():
        while not list(tmp_path.glob("long-seed0/checkpoints/step-*")):
            time.sleep(0.02)
        children = {
            int(pid)
            for task in Path("/proc/self/task").iterdir()
            for pid in (task / "children").read_text().split()
        }
        for child in children:
            if b"long-seed0" in Path(f"/proc/{child}/cmdline").read_bytes():
                os.kill(child, signal.SIGTERM)

    stopper = threading.Thread(target=stop_once_checkpointed, daemon=True)
    stopper.start()
    long = {
        "long": Control(
            small_pack, [*SMALL, "train.epochs=5000", "train.eval_every=5000", "train.threads=1"]
        )
    }
    with pytest.raises(
        UserError, match=r"long-seed0 was stopped before its end: the same command goes on"
    ):
        train_all("cifar100-siblings", long, tmp_path, 1, 1, Console(quiet=True))
    stopper.join()


def test_where_a_run_fails_no_other_is_begun_and_the_rest_is_saved(small_pack, tmp_path):
    settings = [*SMALL, "train.threads=1"]
    controls = {
        "long": Control(small_pack, [*settings, "train.epochs=5000", "train.eval_every=5000"]),
        "wrong": Control(tmp_path / "nowhere", settings),
        "later": Control(small_pack, [*settings, "train.epochs=1"]),
    }
    with pytest.raises(UserError, match=r"ended with code 2: .*nowhere"):
        train_all("cifar100-siblings", controls, tmp_path, 1, 2, Console(quiet=True))
    assert (
        not (tmp_path / "later-seed0").exists()
        and not (tmp_path / "long-seed0/result.json").exists()
    )


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.slow
def test_a_comparison_that_is_ended_ends_its_trainings(small_pack, tmp_path):
    settings = [*SMALL, "train.epochs=5000", "train.eval_every=5000", "train.threads=1"]
    code = (
        "from pathlib import Path; from rich.console import Console; from fastlt.studies.repeated "
        "import Control, train_all; "
        f"controls = {{'long': Control(Path({str(small_pack)!r}), {settings!r})}}; "
        f"train_all('cifar100-siblings', controls, Path({str(tmp_path)!r}), 1, 1, "
        "Console(quiet=True))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("long-seed0/checkpoints/step-*")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    (child,) = [
        int(pid)
        for task in Path(f"/proc/{process.pid}/task").iterdir()
        for pid in (task / "children").read_text().split()
    ]
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert not Path(f"/proc/{child}").exists()


def test_a_file_that_cannot_be_written_is_refused_at_once(tmp_path):
    with pytest.raises(UserError, match=r"cannot write to .* \(Is a directory\)"):
        run_bench_train(
            "cifar100-lt", SMALL, None, steps=5, rounds=1, csv=tmp_path, console=Console(quiet=True)
        )


def test_a_class_parallel_head_is_refused(small_pack):
    with pytest.raises(UserError, match="measures one process"):
        run_bench_train(
            "cifar100-siblings",
            ["model.head=class-parallel"],
            str(small_pack),
            3,
            1,
            None,
            Console(quiet=True),
        )


@pytest.mark.slow
def test_images_to_compare_regions_by_are_jpegs_of_every_fifth_class(shared_data, tmp_path):
    write_images(shared_data / "cifar100", tmp_path, Console(quiet=True))
    classes = sorted(path.name for path in (tmp_path / "train").iterdir())
    assert (len(classes) == 20 and classes[:2] == ["apple", "beetle"]) or classes[:2] == [
        "apple",
        "bed",
    ]
    images = sorted((tmp_path / "train/apple").iterdir())
    with Image.open(images[0]) as image:
        assert len(images) == 400 and image.size == (96, 96) and image.format == "JPEG"
    assert len(list((tmp_path / "test/apple").iterdir())) == 100
