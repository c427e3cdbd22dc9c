"""`fastlt fit`: from a folder to a model, what it chooses, and what it goes on with."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch
from helpers.method_cases import need_timm
from rich.console import Console
from safetensors.torch import load_file, save_file

import fastlt
from fastlt.errors import UserError
from fastlt.models.classifier import build_model
from fastlt.models.heads import section
from fastlt.packing.reader import open_pack
from fastlt.studies import fit_choices
from fastlt.studies.fit import FitOptions, run_fit
from fastlt.studies.fit_choices import (
    Choice,
    Plan,
    affordable_size,
    architecture_of,
    configured,
    found_choices,
    plan_of,
    seconds_of,
    start_choices,
    within,
)
from fastlt.training.dry_run import Memory, Speed

FAST = (
    "data.size=16",
    "train.epochs=2",
    "data.batch=8",
    "train.precision=fp32",
    "data.workers=0",
    "train.threads=1",
)


def options(image_folders, out, **more):
    values = {"images": image_folders / "target", "out": out, "model": "resnet8", "holdout": 0.3}
    return FitOptions(**{**values, "settings": FAST, **more})


def test_a_folder_becomes_a_model_that_predicts(image_folders, tmp_path):
    out, said = tmp_path / "run", Console(record=True, width=120)
    auxiliary = {
        "auxiliary": image_folders / "auxiliary",
        "pairs": image_folders / "pairs.csv",
    }
    assert run_fit(options(image_folders, out, **auxiliary), said)
    text = said.export_text()
    for part in ("neighbor-silencing", "the pack has auxiliaries", "plain baseline", "you set it"):
        assert part in text
    found = fastlt.load(out).predict(image_folders / "val" / "a" / "0.png")
    assert sorted(found[0].names) == ["a", "b", "c"]
    for place in ("pack", "baseline/result.json", "best.safetensors", "report.html"):
        assert (out / place).exists()
    pack = open_pack(str(out / "pack"))
    assert pack.space.val_counts == [4, 2, 1] and pack.space.num_auxiliaries == 2
    baseline = (out / "baseline" / "config.toml").read_text()
    assert 'name = "ce"' in baseline and "auxiliary = false" in baseline
    stamp = (out / "model.safetensors").stat().st_mtime_ns
    again = Console(record=True, width=120)
    assert run_fit(options(image_folders, out, **auxiliary), again)
    assert (out / "model.safetensors").stat().st_mtime_ns == stamp  # nothing is trained again
    with pytest.raises(UserError, match="was begun with another --holdout"):
        run_fit(options(image_folders, out, holdout=0.4, **auxiliary), again)


@pytest.mark.slow
def test_the_command_ends_with_the_line_that_predicts(image_folders, tmp_path):
    words = [sys.executable, "-m", "fastlt", "fit", str(image_folders / "target")]
    words += ["--out", str(tmp_path / "run"), "--model", "resnet8", "--no-baseline", *FAST]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert "fastlt predict" in ended.stdout.splitlines()[-1]
    assert not (tmp_path / "run" / "baseline").exists()
    broken = [*words[:-1], "--val", str(image_folders / "val"), "--groups", "g.csv"]
    ended = subprocess.run(broken, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 2 and "--groups is for taking" in ended.stderr + ended.stdout


@pytest.mark.slow
def test_a_fit_that_is_stopped_goes_on_to_the_same_model(image_folders, tmp_path):
    """SIGTERM ends the training too, which saves first; the same command takes it up."""
    slow = [*FAST, "train.epochs=15", "train.patience=0"]
    words = [sys.executable, "-m", "fastlt", "fit", str(image_folders / "target"), "--model"]
    words += ["resnet8", "--no-baseline", *slow, "--out"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert subprocess.run([*words, str(whole)], timeout=300, capture_output=True).returncode == 0
    process = subprocess.Popen([*words, str(cut)], stdout=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while not (cut / "metrics.jsonl").is_file() and time.monotonic() < until:
        time.sleep(0.02)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM
    assert not (cut / "result.json").exists() and list((cut / "checkpoints").iterdir())
    assert subprocess.run([*words, str(cut)], timeout=300, capture_output=True).returncode == 0
    first, second = (load_file(run / "model.safetensors") for run in (whole, cut))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_folder_of_something_else_is_left_alone(image_folders, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="holds something that is not of `fastlt fit`"):
        run_fit(options(image_folders, tmp_path), Console(quiet=True))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


# --- choices


def test_times_are_read():
    assert [seconds_of(text) for text in ("90s", "30m", "2h", "45")] == [90, 1800, 7200, 2700]
    for text in ("soon", "", "-3m", "0m", "infh"):
        with pytest.raises(UserError, match="is no time"):
            seconds_of(text)


def test_a_budget_sets_the_epochs_and_leaves_the_baseline_out_where_it_is_short():
    images = (200, 100)  # an epoch of both takes 3 s at 100 images/s
    whole = within(None, 30, 100.0, images)
    assert (whole.epochs, whole.baseline) == (30, True)
    fits = within(60, 30, 100.0, images)
    assert (fits.epochs, fits.baseline) == (18, True)
    short = within(20, 30, 100.0, images)
    assert (short.epochs, short.baseline) == (9, False) and "6 epochs" in short.why_no_baseline
    assert within(0.1, 30, 100.0, images).epochs == 1


def test_a_short_budget_makes_images_smaller():
    assert affordable_size(224, 100) == 224
    assert affordable_size(224, 2) == 96  # a quarter of the epochs: half of the side, by 32
    assert affordable_size(224, 0.01) == 64 and affordable_size(32, 0.1) == 32


def measured_as(rates):
    """Return a measurement that gives each precision a rate."""

    def measure(config):
        memory = Memory(0, 0, 0, 0, 1)
        return memory, Speed(rates[config.train.precision], config.data.batch, 1)

    return measure


def values_of(plan):
    return {one.key: one.value for one in plan.choices}


def test_choices_follow_the_pack_and_the_user(small_pack, monkeypatch):
    monkeypatch.setattr(fit_choices, "device_of", lambda: "cpu")
    pack, start = open_pack(str(small_pack)), [Choice("model.name", "resnet8", "")]
    plan = plan_of(pack, start, [], None, measured_as({"auto": 100, "bf16": 250}))
    values = values_of(plan)
    assert values["loss.name"] == "neighbor-silencing" and values["train.precision"] == "bf16"
    assert values["data.size"] == 64 and values["train.epochs"] == 100
    assert all(one.reason for one in plan.choices if one.key != "model.name")
    config = configured(plan.choices, [], pack)
    assert config.data.size == 64 and config.train.patience > 0 and config.train.keep_best
    user = ["data.size=32", "train.epochs=3", "train.precision=fp32"]
    values = values_of(plan_of(pack, start, user, None, measured_as({"fp32": 100})))
    assert not values.keys() & {"data.size", "train.epochs", "train.precision"}
    slow = plan_of(pack, start, [], None, measured_as({"auto": 100, "bf16": 105}))
    assert "train.precision" not in values_of(slow)


def test_where_the_user_has_set_all_that_costs_nothing_is_measured(small_pack):
    pack, start = open_pack(str(small_pack)), [Choice("model.name", "resnet8", "")]
    user = ["data.batch=8", "train.epochs=3", "train.precision=fp32"]
    plan = plan_of(pack, start, user, 1.0, lambda config: pytest.fail("measured"))
    assert (plan.epochs, plan.baseline) == (3, True) and "data.size" in values_of(plan)


def test_a_batch_is_halved_until_the_memory_holds_it(small_pack, monkeypatch):
    monkeypatch.setattr("fastlt.training.dry_run.memory_bytes", lambda device: 1000)
    pack, start = open_pack(str(small_pack)), [Choice("model.name", "resnet8", "")]

    def measure(config):
        return Memory(0, 0, 0, 0, 30), Speed(100, 1, 1)

    assert values_of(plan_of(pack, start, [], None, measure))["data.batch"] == 16


def test_settings_are_typed_as_they_are_read():
    typed = [
        Choice(*one, "").override
        for one in (("a.b", "x/y-1.z"), ("a.b", "true colours"), ("a.b", True), ("a.b", 3))
    ]
    assert typed == ["a.b=x/y-1.z", 'a.b="true colours"', "a.b=true", "a.b=3"]


@pytest.mark.slow
def test_it_begins_with_the_probe_of_a_pretrained_backbone(image_folders, tmp_path):
    torch.manual_seed(4)
    backbone = build_model(section()(name="resnet8"), 3, 16).backbone
    save_file(backbone.state_dict(), tmp_path / "resnet8.safetensors")
    said = Console(record=True, width=120)
    start = {"weights": str(tmp_path / "resnet8.safetensors"), "baseline": False}
    run_fit(options(image_folders, tmp_path / "run", **start), said)
    text = said.export_text()
    assert "nearest class mean" in text and "linear, balanced softmax" in text
    rows = json.loads((tmp_path / "run" / "probe.json").read_text())["rows"]
    assert len(rows) == 5
    again = Console(record=True, width=120)  # of what is done nothing is done again
    run_fit(options(image_folders, tmp_path / "run", **start), again)
    assert "nearest class mean" not in again.export_text()


def test_weights_tell_their_architecture(tmp_path):
    need_timm()
    tensors = {"a": torch.zeros(1)}
    save_file(tensors, tmp_path / "resnet18.safetensors")
    assert architecture_of(tmp_path / "resnet18.safetensors") == "resnet18"
    save_file(tensors, tmp_path / "mine.safetensors")
    with pytest.raises(UserError, match="name it with --model"):
        architecture_of(tmp_path / "mine.safetensors")
    (tmp_path / "folder").mkdir()
    save_file(tensors, tmp_path / "folder" / "model.safetensors")
    (tmp_path / "folder" / "config.json").write_text(json.dumps({"architecture": "resnet34"}))
    assert architecture_of(tmp_path / "folder") == "resnet34"
    assert values_of(Plan(start_choices("resnet18", None, "cpu"), 1, True)) == {
        "model.name": "resnet18",
        "model.pretrained": True,
    }
    with pytest.raises(UserError, match="is no file, and timm has no model"):
        start_choices("resnetty", None, "cpu")


def test_without_weights_or_a_hub_it_starts_at_random(monkeypatch):
    monkeypatch.setattr(fit_choices, "cached_weights", lambda timm, name: None)
    monkeypatch.setattr(fit_choices, "has_hub", lambda: False)
    (only,) = found_choices("cpu")
    assert only.value == "resnet20" and "--weights FILE" in only.reason
    kept = {"resnet18.a1_in1k": "model.safetensors"}
    monkeypatch.setattr(fit_choices, "cached_weights", lambda timm, name: kept.get(name))
    need_timm()
    name, pretrained = found_choices("cpu")
    assert name.value.startswith("resnet18") and "cache" in name.reason and pretrained.value
