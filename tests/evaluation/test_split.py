"""`fastlt eval RUN --split test`: the images that training never read."""

import json

import pytest
from rich.console import Console
from typer.testing import CliRunner

from fastlt.cli import app
from fastlt.config import load_config
from fastlt.errors import UserError
from fastlt.evaluation.evaluate import evaluate_run
from fastlt.packing.sources import read_collection
from fastlt.packing.writer import PackOptions, write_pack
from fastlt.training.loop import train

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def run(image_folders, tmp_path_factory):
    """A run of one epoch whose test images are the validation images of another pack."""
    folder = tmp_path_factory.mktemp("split")
    collection = read_collection(
        image_folders / "target", None, image_folders / "target", test=image_folders / "val"
    )
    pack = write_pack(collection, PackOptions(folder / "pack", workers=1), QUIET)
    settings = [
        "model.name=resnet8",
        "data.size=16",
        "data.padding=2",
        "data.batch=16",
        "data.workers=0",
        "train.epochs=1",
        "train.threads=1",
        "loss.name=ce",
        f"data.pack={json.dumps(str(pack))}",
    ]
    train(load_config("cifar100-siblings", settings), folder / "run", QUIET)
    return folder / "run"


def test_test_images_are_scored_into_a_file(run, small_pack):
    before = (run / "result.json").read_bytes()
    result = evaluate_run(run, split="test")
    written = json.loads((run / "test.json").read_text())
    assert written == json.loads(json.dumps(result)) and "best" not in result
    assert result["top1"] == evaluate_run(run, small_pack)["top1"]
    assert (run / "result.json").read_bytes() == before


def test_the_command_scores_test_images(run):
    (run / "test.json").unlink(missing_ok=True)
    outcome = CliRunner().invoke(app, ["eval", str(run), "--split", "test"])
    assert outcome.exit_code == 0 and (run / "test.json").is_file()


def test_a_pack_without_test_images_is_refused(run, small_pack):
    with pytest.raises(UserError, match="has no test images: pack it with --test"):
        evaluate_run(run, small_pack, "test")
    outcome = CliRunner().invoke(
        app, ["eval", str(run), "--split", "test", "--post-hoc", "tau-norm"]
    )
    assert "does not go with --post-hoc" in str(outcome.exception)
