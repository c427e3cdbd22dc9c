import contextlib
import io
import json
import shutil
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

from fastlt.config import load_config
from fastlt.decode.region import has_region
from fastlt.errors import UserError
from fastlt.evaluation.evaluate import evaluate_run
from fastlt.evaluation.export import export_run
from fastlt.models.export import load_exported
from fastlt.packing.reader import open_pack
from fastlt.packing.sources import read_collection
from fastlt.packing.writer import PackOptions, write_pack
from fastlt.training.inputs import step_seed
from fastlt.training.loop import (
    accumulation,
    asks_for_silencing,
    train,
    without_silencing,
)
from fastlt.training.run_folder import only_run
from fastlt.training.setup import prepare
from fastlt.utils.signals import Stopped

QUIET = Console(quiet=True)
SMALL = [
    "model.name=resnet8",
    "data.size=16",
    "data.batch=16",
    "data.padding=2",
    "train.epochs=3",
    "train.eval_every=1",
    "data.engine=torch",
    "data.workers=0",
    "train.threads=1",
]


def config_of(pack: Path, *settings: str):
    return load_config(
        "cifar100-siblings", [*SMALL, f"data.pack={json.dumps(str(pack))}", *settings]
    )


@pytest.fixture(scope="module")
def finished(small_pack, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "finished"
    return run, train(config_of(small_pack), run, QUIET)


def test_a_run_holds_what_it_should(finished):
    run, result = finished
    names = {path.name for path in run.iterdir()}
    assert {
        "config.toml",
        "result.json",
        "metrics.jsonl",
        "checkpoints",
        "model.safetensors",
        "classes.json",
        "val_predictions.npz",
    } <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    on_disk = json.loads((run / "result.json").read_text())
    assert on_disk == result
    assert {"top1", "many", "medium", "few", "per_class", "best", "epochs"} <= on_disk.keys()
    assert on_disk["many"] is None and len(on_disk["per_class"]) == 3
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [0, 1, 2]
    assert lines[-1]["top1"] == on_disk["top1"]
    assert on_disk["best"]["top1"] == max(line["top1"] for line in lines)


def test_it_learns(small_pack, tmp_path):
    result = train(
        config_of(small_pack, "train.epochs=10", "train.eval_every=10"), tmp_path / "run", QUIET
    )
    assert result["top1"] > 60  # chance is 33


def test_the_exported_model_lacks_the_auxiliary_rows(finished, small_pack):
    run, result = finished
    tensors = load_file(run / "model.safetensors")
    assert tensors["head.weight"].shape == (3, 64) and tensors["head.bias"].shape == (3,)
    assert load_exported(run / "model.safetensors")[1] == ["a", "b", "c"]
    evaluated = evaluate_run(run)
    assert all(evaluated[name] == result[name] for name in evaluated)


def test_onnx_predicts_as_torch_does(finished, tmp_path):
    pytest.importorskip("onnxscript", reason="ONNX export is an extra")
    run, _ = finished
    assert "gives the same logits on 9 images" in export_run(run, tmp_path / "model.onnx")
    assert not list(tmp_path.glob(".*"))


def test_export_refuses_other_endings(finished, tmp_path):
    with pytest.raises(UserError, match=r"ends in \.safetensors, \.onnx, \.pt2"):
        export_run(finished[0], tmp_path / "model.xyz")


def test_the_same_seed_gives_the_same_bits_and_another_does_not(small_pack, finished, tmp_path):
    train(config_of(small_pack), tmp_path / "again", QUIET)
    train(config_of(small_pack, "train.seed=1"), tmp_path / "other", QUIET)
    first, again, other = (
        load_file(run / "model.safetensors")
        for run in (finished[0], tmp_path / "again", tmp_path / "other")
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["epoch", "step"])
def test_a_run_killed_with_9_goes_on_to_the_same_bits(small_pack, tmp_path, moment):
    """Killed after its first checkpoint, of an epoch or amid one, and started again by the same
    command.
    """
    settings = [*SMALL, "train.epochs=6", "augment.mixup=0.8", "optim.ema=0.9"]
    if moment == "step":
        settings.append("train.checkpoint_minutes=1e-6")
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    train(
        load_config("cifar100-siblings", [*settings, f"data.pack={json.dumps(str(small_pack))}"]),
        undisturbed,
        QUIET,
    )
    command = [
        sys.executable,
        "-m",
        "fastlt",
        "train",
        "cifar100-siblings",
        "--data",
        str(small_pack),
        "--out",
        str(killed),
        *settings,
    ]
    kill_once_checkpointed(command, killed)
    assert not (killed / "result.json").exists()
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    assert "resumed from step-" in ended.stdout
    wanted, got = (
        load_file(undisturbed / "model.safetensors"),
        load_file(killed / "model.safetensors"),
    )
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)
    epochs = [
        json.loads(line)["epoch"] for line in (killed / "metrics.jsonl").read_text().splitlines()
    ]
    assert epochs == list(range(6))


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_with_the_same_bits(small_pack, tmp_path):
    """Wherever the kills fall: in the start, in a step, in an evaluation, while a checkpoint is
    written.
    """
    settings = [*SMALL, "train.epochs=400", "train.checkpoint_minutes=0.0005"]
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    train(
        load_config("cifar100-siblings", [*settings, f"data.pack={json.dumps(str(small_pack))}"]),
        undisturbed,
        QUIET,
    )
    command = [
        sys.executable,
        "-m",
        "fastlt",
        "train",
        "cifar100-siblings",
        "--data",
        str(small_pack),
        "--out",
        str(killed),
        *settings,
    ]
    for delay in np.random.default_rng(0).uniform(0, 0.2, 20):
        kill_once_checkpointed(command, killed, delay)
    assert not (killed / "result.json").exists()
    assert subprocess.run(command, capture_output=True, timeout=300).returncode == 0
    wanted, got = (
        load_file(undisturbed / "model.safetensors"),
        load_file(killed / "model.safetensors"),
    )
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def kill_once_checkpointed(command: list[str], run: Path, delay: float = 0.0) -> None:
    """Kills the run `delay` seconds after it wrote a checkpoint of its own."""
    before = set((run / "checkpoints").glob("step-*"))
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not set((run / "checkpoints").glob("step-*")) - before:
        assert process.poll() is None and time.monotonic() < deadline, (
            "the run ended before it was killed"
        )
        time.sleep(0.002)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=delay)
    process.kill()
    process.wait(timeout=60)


def test_another_configuration_in_the_same_folder_is_refused_and_named(finished, small_pack):
    with pytest.raises(UserError, match=r"another configuration \(optim.lr = 0.1, not 0.01\)"):
        train(config_of(small_pack, "optim.lr=0.01"), finished[0], QUIET)


def test_settings_that_say_how_may_change_and_a_finished_run_stays(finished, small_pack):
    run, result = finished
    before = {
        path.name: path.stat().st_mtime_ns
        for path in run.iterdir()
        if path.name in ("model.safetensors", "metrics.jsonl")
    }
    assert train(config_of(small_pack, "train.keep=5", "data.workers=1"), run, QUIET) == result
    assert before["model.safetensors"] == (run / "model.safetensors").stat().st_mtime_ns


@pytest.mark.parametrize(("accumulate", "steps"), [(1, 5), (2, 5), (3, 3), (4, 6), (9, 4)])
def test_accumulated_groups_cover_the_epoch(accumulate, steps):
    groups = [accumulation(accumulate, step, steps) for step in range(steps)]
    assert sum(1 / size for size, _ in groups) == pytest.approx(sum(last for _, last in groups))
    assert groups[-1][1]


def test_accumulating_is_training_on_the_larger_batch(small_pack, tmp_path):
    """With the backbone standing still nothing depends on the batch, so two halves give the
    gradient of the whole.
    """
    constant = [
        "schedule.name=step",
        "schedule.steps={9=0.1}",
        "schedule.head_only_epochs=2",
        "train.epochs=2",
        "loss.name=ce",
    ]
    runs = {"whole": [], "halves": ["data.batch=8", "optim.accumulate=2"]}
    for name, settings in runs.items():
        train(
            config_of(small_pack, *constant, "data.drop_last=true", "data.budget=49", *settings),
            tmp_path / name,
            QUIET,
        )
    whole, halves = (load_file(tmp_path / name / "model.safetensors") for name in runs)
    torch.testing.assert_close(halves["head.weight"], whole["head.weight"], rtol=1e-4, atol=1e-5)


def test_averaged_weights_learn_too(small_pack, tmp_path):
    result = train(
        config_of(small_pack, "train.epochs=12", "train.eval_every=12", "optim.ema=0.99"),
        tmp_path / "run",
        QUIET,
    )
    assert result["top1"] > 60


@pytest.mark.parametrize(
    ("change", "message"),
    [("rename", "belongs to another class space"), ("images", "the pack has changed")],
)
def test_a_checkpoint_of_another_pack_is_refused(image_folders, tmp_path, change, message):
    """The pack at the same path is made anew, with a class of another name, or with fewer images of
    the same classes.
    """
    folders, run = tmp_path / "images", tmp_path / "run"
    shutil.copytree(image_folders, folders)
    train(config_of(packed(folders, tmp_path / "pack"), "train.epochs=1"), run, QUIET)
    if change == "rename":
        (folders / "target" / "c").rename(folders / "target" / "d")
        (folders / "val" / "c").rename(folders / "val" / "d")
    else:
        (folders / "target" / "a" / "0.png").unlink()
    shutil.rmtree(tmp_path / "pack")
    with pytest.raises(UserError, match=message):
        train(config_of(packed(folders, tmp_path / "pack"), "train.epochs=1"), run, QUIET)


def packed(folders: Path, out: Path) -> Path:
    names = ("target", "auxiliary", "val", "pairs.csv")
    return write_pack(
        read_collection(*(folders / name for name in names)), PackOptions(out=out, workers=1), QUIET
    )


def test_evaluating_on_other_targets_is_refused(finished, image_folders, tmp_path):
    collection = read_collection(
        image_folders / "auxiliary", None, image_folders / "auxiliary", None, None, None
    )
    pack = write_pack(collection, PackOptions(out=tmp_path / "other", workers=1), QUIET)
    with pytest.raises(UserError, match="other targets"):
        evaluate_run(finished[0], pack)


def test_two_runs_in_one_folder_are_refused(tmp_path):
    with (
        only_run(tmp_path / "run"),
        pytest.raises(UserError, match="another training is at work in"),
        only_run(tmp_path / "run"),
    ):
        pass


def test_silencing_without_a_pair_stops_before_the_first_step(image_folders, tmp_path):
    collection = read_collection(
        image_folders / "target", None, image_folders / "val", None, None, None
    )
    pack = write_pack(collection, PackOptions(out=tmp_path / "pack", workers=1), QUIET)
    with pytest.raises(UserError, match="no pair of classes is silenced"):
        train(config_of(pack), tmp_path / "run", QUIET)


@pytest.fixture(scope="module")
def pack_alone(image_folders, tmp_path_factory) -> Path:
    """A pack without auxiliaries."""
    folders = (image_folders / "target", None, image_folders / "val", None, None, None)
    out = tmp_path_factory.mktemp("packs") / "alone"
    return write_pack(read_collection(*folders), PackOptions(out=out, workers=1), QUIET)


def test_without_auxiliaries_the_loss_is_the_recipes_without_silencing(
    pack_alone, tmp_path, capsys
):
    run = tmp_path / "run"
    config = config_of(pack_alone, "loss.tau=0.5")
    result = train(config, run, Console(), silencing_asked=False)
    note = "the loss is loss.name=balanced-ce with loss.tau=0.5, in place of neighbor-silencing"
    assert capsys.readouterr().out.count(note) == 1
    plain = config_of(pack_alone, "loss.tau=0.5", "loss.name=balanced-ce")
    wanted = train(plain, tmp_path / "plain", QUIET)
    assert result["per_class"] == wanted["per_class"] and result["confusion"] == wanted["confusion"]
    weights = [load_file(folder / "model.safetensors") for folder in (run, tmp_path / "plain")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_it_is_resumed_with_the_same_loss(pack_alone, tmp_path):
    def stop(record):
        raise Stopped("enough")

    run, config = tmp_path / "run", config_of(pack_alone)
    with pytest.raises(Stopped):
        train(config, run, QUIET, stop, silencing_asked=False)
    resumed = train(config, run, QUIET, silencing_asked=False)
    whole = train(config, tmp_path / "whole", QUIET, silencing_asked=False)
    assert resumed["confusion"] == whole["confusion"] and resumed["top1"] == whole["top1"]
    assert load_config(str(run / "config.toml")).loss.name == "balanced-ce"


def test_auxiliaries_left_out_are_none(small_pack, capsys):
    config = config_of(small_pack, "data.auxiliary=false")
    assert without_silencing(config, open_pack(small_pack), Console()).loss.name == "balanced-ce"
    assert "no auxiliary classes" in capsys.readouterr().out


def test_with_auxiliaries_the_loss_stays(small_pack, capsys):
    for settings in ([], ["loss.name=ce"], ["data.auxiliary=false", "loss.silence=1"]):
        config = config_of(small_pack, *settings)
        assert without_silencing(config, open_pack(small_pack), Console()) is config
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("settings", "asked"),
    [
        (["loss.silence=0.1"], True),
        (["optim.lr=0.1", "loss.name=neighbor-silencing"], True),
        (["loss.mask=both"], True),
        (["loss.tau=1", "train.epochs=3"], False),
        ({"loss.silence": 0.1}, True),
        ({}, False),
    ],
)
def test_who_names_silencing_asks_for_it(settings, asked):
    assert asks_for_silencing(settings) is asked


def test_a_run_does_not_get_another_length(finished, small_pack):
    run, _ = finished
    with pytest.raises(UserError, match=r"has finished its 3 epochs.*--start .* and another --out"):
        train(config_of(small_pack, "train.epochs=5"), run, QUIET)


def test_a_stopped_run_does_not_either(small_pack, tmp_path):
    def stop(record):
        raise Stopped("enough")

    with pytest.raises(Stopped):
        train(config_of(small_pack), tmp_path / "run", QUIET, stop)
    with pytest.raises(UserError, match=r"begun with train\.epochs=3.*train 5 epochs with another"):
        train(config_of(small_pack, "train.epochs=5"), tmp_path / "run", QUIET)


@pytest.mark.parametrize(
    "settings",
    [
        [
            "augment.mixup=0.8",
            "augment.cutmix=1.0",
            "loss.label_smoothing=0.1",
            "augment.erasing=0.5",
            "augment.randaugment=9",
            "augment.jitter=[0.4, 0.4, 0.4, 0.1]",
        ],
        [
            "optim.name=adamw",
            "optim.lr=1e-3",
            "optim.clip=1.0",
            "optim.accumulate=2",
            "optim.ema=0.9",
            "train.precision=bf16",
        ],
        [
            "loss.name=ldam",
            "model.head=cosine",
            "loss.drw_epoch=1",
            "schedule.name=step",
            "schedule.steps={1=0.1}",
        ],
        [
            "loss.name=focal",
            "data.auxiliary=false",
            "schedule.head_only_epochs=1",
            "data.crop=random-resized-crop",
        ],
        [
            "data.target_sampling=class-balanced",
            "train.channels_last=false",
            "data.budget=7",
            "loss.mask=target-rows",
        ],
        [
            "data.target_sampling=square-root",
            "data.auxiliary_ratio=0.5",
            "data.repeats=3",
            "data.start_size=8",
            "data.ramp=[0, 1]",
        ],
        [
            "loss.name=class-balanced",
            "schedule.name=cosine",
            "schedule.warmup_epochs=1",
            "data.eval_resize=20",
        ],
    ],
)
def test_every_part_of_the_configuration_trains(small_pack, tmp_path, settings):
    result = train(config_of(small_pack, "train.epochs=2", *settings), tmp_path / "run", QUIET)
    assert 0 <= result["top1"] <= 100
    assert evaluate_run(tmp_path / "run")["per_class"] == result["per_class"]


def test_without_auxiliaries_the_head_has_the_targets_alone(small_pack, tmp_path):
    config = config_of(small_pack, "data.auxiliary=false", "loss.name=balanced-ce")
    trainer = prepare(config, tmp_path, open_pack(small_pack))
    assert trainer.model.head.weight.shape[0] == 3
    assert trainer.plan.images_per_epoch == 21


@pytest.fixture
def damaged_pack(tmp_path) -> Path:
    """Photos of two targets; one of the first is no image any more."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for name in "ab":
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (70 + i, 80, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.jpg")
    collection = read_collection(tmp_path / "train", None, tmp_path / "val", None, None, None)
    pack = open_pack(write_pack(collection, PackOptions(tmp_path / "pack", workers=1), QUIET))
    with (pack.train.folder / pack.train.shards[0]).open("r+b") as file:
        file.seek(int(pack.train.offset[2]))
        file.write(b"overwritten")
    return tmp_path / "pack"


@pytest.mark.parametrize("decode", ["exact", "region"])
def test_a_damaged_image_is_named_replaced_and_counted(damaged_pack, tmp_path, decode):
    said = io.StringIO()
    settings = [
        "data.auxiliary=false",
        "data.batch=4",
        "loss.name=balanced-ce",
        f"data.decode={decode}",
    ]
    if decode == "region" and not has_region():
        pytest.skip("fastlt's JPEG decoder is not compiled here")
    config = config_of(damaged_pack, *settings)
    result = train(config, tmp_path / "run", Console(file=said, width=400))
    assert result["damaged_images"] == 1
    assert (
        said.getvalue().count("a/2.jpg") == 1
        and "another image of its class was taken" in said.getvalue()
    )
    with pytest.raises(UserError, match=r"a/2\.jpg"):
        train(config_of(damaged_pack, *settings, "data.strict=true"), tmp_path / "strict", QUIET)


def test_a_step_draws_the_same_whatever_came_before():
    assert step_seed(0, 5, 0) == step_seed(0, 5, 0)
    assert (
        len(
            {
                step_seed(seed, step, stream)
                for seed in range(3)
                for step in range(3)
                for stream in range(2)
            }
        )
        == 18
    )


def test_a_diverged_run_says_so_and_names_the_images(small_pack, tmp_path):
    with pytest.raises(
        UserError,
        match=r"not finite in 4 steps in a row, up to epoch \d, step \d+: lower optim\.lr",
    ):
        train(
            config_of(small_pack, "optim.lr=1e30", "train.max_skipped=4"), tmp_path / "run", QUIET
        )
    lines = (tmp_path / "run/nonfinite.txt").read_text().splitlines()
    assert len({line.split(":")[0] for line in lines}) == 4 and "train-000000.tar:" in lines[0]
    assert len(lines) > 3 * 16
