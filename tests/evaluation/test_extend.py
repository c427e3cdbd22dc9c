"""Classes that a run never saw, added from a few images each."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

import fastlt
from fastlt.cli.app import app
from fastlt.config import load_config
from fastlt.errors import DataError, UserError
from fastlt.evaluation.evaluate import run_config
from fastlt.evaluation.extend import extend_run, trained_method
from fastlt.methods import method_settings
from fastlt.models.export import load_exported
from fastlt.training.loop import train

SMALL = [
    "model.name=resnet8",
    "data.size=16",
    "data.batch=16",
    "data.workers=0",
    "train.threads=1",
    "train.epochs=2",
    "method.graph_epochs=2",
    "optim.ema=0.5",
]


def trained(pack, run, method, *settings):
    place = f"data.pack={json.dumps(str(pack))}"
    config = load_config(
        "cifar100-siblings",
        [*SMALL[: -2 if method != "fate" else None], place, *settings],
        method_settings(method, None),
    )
    train(config, run, Console(quiet=True))
    return run


@pytest.fixture(scope="module")
def run(small_pack, tmp_path_factory):
    return trained(small_pack, tmp_path_factory.mktemp("fate") / "run", "fate")


@pytest.fixture
def folders(tmp_path):
    """Two classes of three images each."""
    rng = np.random.default_rng(3)
    for name, colour in (("new", 220), ("other", 30)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            pixels = np.clip(rng.normal(colour, 9, (20, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


def test_the_export_knows_the_new_classes_and_the_targets_as_before(run, folders, tmp_path):
    to = tmp_path / "longer.safetensors"
    assert extend_run(run, folders, to) == ["new", "other"]
    before, names = load_exported(run / "model.safetensors")
    after, longer = load_exported(to)
    assert longer == [*names, "new", "other"]
    images = torch.randn(4, 3, 16, 16)
    logits = after(images)
    torch.testing.assert_close(logits[:, : len(names)], before(images))
    model = fastlt.load(to)
    features = model.features(sorted(folders.rglob("*.png")))
    method = trained_method(run_config(run), run)
    rows = method.new_rows(features, torch.tensor([0, 0, 0, 1, 1, 1]), 2)
    expected = features @ rows[:, :-1].T + rows[:, -1]
    with torch.inference_mode():
        found = model.module.head(features)
    torch.testing.assert_close(found[:, len(names) :], expected)
    assert model.predict(folders)[0].path == folders / "new" / "0.png"


def test_the_command_says_what_it_added(run, folders, tmp_path):
    to = tmp_path / "longer.safetensors"
    ended = CliRunner().invoke(app, ["extend", str(run), "--images", str(folders), "--to", str(to)])
    assert ended.exit_code == 0 and "2 classes more, new, other" in ended.output


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda images: shutil.rmtree(images), "is no folder"),
        (
            lambda images: [shutil.rmtree(path) for path in images.iterdir()],
            "holds no class folders",
        ),
        (lambda images: (images / "new").rename(images / "a"), "'a' in .* is a class of the run"),
        (lambda images: (images / "new").rename(images / "x"), "'x' in .* is a class of the run"),
        (lambda images: (images / "empty").mkdir(), "empty holds no images"),
        (
            lambda images: (images / "new" / "within").mkdir(),
            "new holds folders, and not the images of a class",
        ),
    ],
)
def test_folders_that_give_no_new_class_are_refused(run, folders, tmp_path, change, message):
    change(folders)
    to = tmp_path / "longer.safetensors"
    with pytest.raises(DataError, match=message):
        extend_run(run, folders, to)
    assert not to.exists()


def test_other_methods_and_other_names_are_refused(small_pack, run, folders, tmp_path):
    plain = trained(small_pack, tmp_path / "plain", "plain")
    with pytest.raises(UserError, match=r"never saw: train with --method fate"):
        extend_run(plain, folders, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"must end in .safetensors"):
        extend_run(run, folders, tmp_path / "x.onnx")
