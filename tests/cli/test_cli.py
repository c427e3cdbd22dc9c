from importlib.metadata import version

import pytest
from helpers.command import fastlt
from typer.testing import CliRunner

from fastlt.cli import app
from fastlt.cli.app import PANELS
from fastlt.config import recipe_names


def test_help_names_every_command_in_its_panel():
    text = fastlt("--help").stdout
    for command in (
        "pack",
        "train",
        "eval",
        "export",
        "report",
        "demo",
        "bench-train",
        "bench-loss",
    ):
        assert command in text
    order = [f" {panel} " for panel in PANELS]
    assert sorted(order, key=text.index) == order
    assert "─ Commands ─" not in text, "a command has no panel"


@pytest.mark.parametrize("command", [[], ["train"], ["curate", "propose"]])
def test_h_is_help(command):
    ended = CliRunner().invoke(app, [*command, "-h"])
    assert ended.exit_code == 0 and "Usage:" in ended.output


def test_version_and_completion():
    assert CliRunner().invoke(app, ["--version"]).output == f"fastlt {version('fastlt')}\n"
    assert "--install-completion" in CliRunner().invoke(app, ["--help"]).output


def test_the_way_of_a_user(image_folders, tmp_path):
    """pack, verify, train, eval, export, report: each command ends well and leaves what it
    promises.
    """
    folders = [f"--{name}={image_folders / name}" for name in ("target", "auxiliary", "val")]
    pack, run = tmp_path / "pack", tmp_path / "run"
    assert (
        fastlt("pack", *folders, f"--pairs={image_folders / 'pairs.csv'}", "--out", pack).returncode
        == 0
    )
    assert "as the manifest says" in " ".join(fastlt("pack", "--verify", pack).stdout.split())
    small = ["model.name=resnet8", "data.size=16", "data.batch=16", "train.epochs=2"]
    trained = fastlt("train", "cifar100-siblings", "--data", pack, "--out", run, *small)
    assert trained.returncode == 0, trained.stderr
    assert (
        "3 targets" in trained.stdout
        and "2 auxiliaries" in trained.stdout
        and "3 pairs" in trained.stdout
    )
    assert "last epoch" in fastlt("eval", run).stdout
    assert fastlt("export", run, "--to", tmp_path / "model.safetensors").returncode == 0
    assert fastlt("report", run).returncode == 0
    assert "<html" in (run / "report.html").read_text().lower()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "demo", "--data", "nowhere", "--out", "run"], "there is no pack at"),
        (["train", "dmeo", "--data", "nowhere", "--out", "run"], "did you mean 'demo'"),
        (
            ["train", "demo", "--data", "nowhere", "--out", "run", "los.silence=0"],
            "did you mean 'loss.silence'",
        ),
        (["eval", "nowhere"], "there is no run at nowhere"),
        (["report", "nowhere"], "nowhere"),
        (["export", "nowhere", "--to", "m.onnx"], "nowhere"),
        (["pack", "--target", "nowhere", "--val", "nowhere", "--out", "p"], "nowhere"),
        (["pack", "cifar100:nowhere", "--task", "cifar100-lt", "--out", "p"], "nowhere"),
        (
            ["pack", "cifar100:x", "--task", "cifar100-lt", "--target", "y", "--out", "p"],
            "do not go with cifar100:DIR",
        ),
        (["pack", "cifar10:x", "--out", "p"], "must be cifar100:DIR"),
        (["pack", "--verify", "nowhere"], "there is no pack at nowhere"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = fastlt(*arguments)
    assert ended.returncode == 2
    assert said in " ".join(ended.stderr.split())
    assert "Traceback" not in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir()), "nothing may be left half-made"


def test_recipes_stand_in_the_help_of_train():
    text = fastlt("train", "--help").stdout
    assert all(name in text.replace("\n", "") or name[:12] in text for name in recipe_names())
