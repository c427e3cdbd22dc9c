"""The Python API: `import fastlt`."""

import json
import subprocess
import sys
import warnings
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.scenes import mixed_images
from PIL import Image
from torch import nn

import fastlt
from fastlt._moved import MOVED
from fastlt.config import DataConfig
from fastlt.data.augment import normalise
from fastlt.data.loader import Loader
from fastlt.data.plan import evaluation_batches
from fastlt.evaluation.calibration import Calibration
from fastlt.evaluation.evaluate import evaluation_geometry
from fastlt.evaluation.predict import Model
from fastlt.evaluation.user_images import images_below

SETTINGS = {
    "model.name": "resnet8",
    "data.size": 16,
    "data.batch": 16,
    "data.budget": 5,
    "data.workers": 0,
    "train.epochs": 2,
}


@pytest.fixture(scope="module")
def run(image_folders, tmp_path_factory) -> Path:
    """A RUN, packed and trained by the API."""
    folder = tmp_path_factory.mktemp("api")
    images = {name: image_folders / name for name in ("target", "auxiliary", "val")}
    pairs, out = image_folders / "pairs.csv", folder / "pack"
    fastlt.pack(**images, test=images["val"], pairs=pairs, out=out, quiet=True)
    result = fastlt.train(
        "cifar100-siblings", data=out, out=folder / "run", settings=SETTINGS, quiet=True
    )
    assert result == json.loads((folder / "run" / "result.json").read_text())
    return folder / "run"


@pytest.fixture(scope="module")
def model(run) -> Model:
    return fastlt.load(run, device="cpu")


def test_import_brings_no_heavy_library():
    code = "import fastlt, sys; print({'torch', 'pydantic', 'numpy'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_names_of_the_api():
    assert fastlt.__all__ == [
        "ConfigError",
        "DataError",
        "MissingExtra",
        "Model",
        "Prediction",
        "UserError",
        "__version__",
        "evaluate",
        "load",
        "pack",
        "train",
    ]
    for name in fastlt.__all__:
        assert getattr(fastlt, name) is not None
        assert name in dir(fastlt)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = fastlt.nonsense
    for kind in (fastlt.ConfigError, fastlt.DataError, fastlt.MissingExtra):
        assert issubclass(kind, fastlt.UserError)


def test_the_version_is_that_of_pyproject():
    line = next(
        line
        for line in (Path(fastlt.__file__).parents[1] / "pyproject.toml").read_text().splitlines()
        if line.startswith("version = ")
    )
    assert line == f'version = "{fastlt.__version__}"'
    assert fastlt.__version__ == version("fastlt")


def test_predictions_are_those_of_evaluation(run, model, image_folders):
    with np.load(run / "val_predictions.npz") as file:
        stored = dict(file)
    calibrated, known = model.predict(image_folders / "val", top=1, batch=4), model.calibration
    model.calibration = Calibration()
    found = model.predict(image_folders / "val", top=1, batch=4)
    model.calibration = known
    assert [one.names for one in found] == [one.names for one in calibrated]
    names = [model.classes[number] for number in stored["predicted"]]
    assert [one.names for one in found] == [[name] for name in names]
    confidence = [one.probabilities[0] for one in found]
    np.testing.assert_allclose(confidence, stored["confidence"], rtol=1e-5)
    assert [one.path for one in found] == images_below(image_folders / "val")


def test_evaluate_gives_the_figures_of_the_run(run, model):
    result = json.loads((run / "result.json").read_text())
    assert fastlt.evaluate(run)["top1"] == result["top1"]
    assert fastlt.evaluate(run, split="test")["top1"] == result["top1"]
    assert (run / "test.json").is_file()


def test_predict_takes_images_of_every_form(model, image_folders):
    path = image_folders / "val" / "b" / "1.png"
    image = Image.open(path)
    array = np.asarray(image)
    expected = model.predict(path)
    assert len(expected) == 1
    assert expected[0].path == path
    assert sorted(expected[0].names) == ["a", "b", "c"]
    assert sum(expected[0].probabilities) == pytest.approx(1)
    forms = (str(path), [path], image, array, [array], array[None], torch.from_numpy(array.copy()))
    for form in forms:
        (found,) = model.predict(form)
        assert found[:2] == expected[0][:2]
    assert model.predict(array, top=1)[0].names == expected[0].names[:1]
    logits = model.module(model.transform(path)[None])
    assert model.classes[int(logits.argmax())] == expected[0].names[0]
    assert model.predict([]) == []


def test_pixels_are_those_of_the_loader(mixed_pack, tmp_path):
    data = DataConfig(size=24, eval_resize=32)
    model = Model(nn.Identity(), ["a"], data, torch.device("cpu"))  # type: ignore[arg-type]
    paths = [tmp_path / name for name in sorted(mixed_images())]
    for path in paths:
        path.write_bytes(mixed_images()[path.name])
    loader = Loader(mixed_pack.val, 24, "torch", 0)
    batches = evaluation_batches(mixed_pack.val, evaluation_geometry(data), 100)
    ((_, pixels),) = loader.iterate(batches)
    expected = normalise(pixels, data.mean, data.std)
    assert len(paths) == len(pixels) > 10
    for path, wanted in zip(paths, expected, strict=True):
        assert torch.equal(model.transform(path), wanted), path.name


def test_an_exported_model_predicts_the_same(run, model, image_folders, tmp_path):
    from fastlt.evaluation.export import export_run

    export_run(run, tmp_path / "model.safetensors")
    (run.parent / "pack").rename(run.parent / "gone")  # nothing of the training is needed
    try:
        loaded = fastlt.load(str(tmp_path / "model.safetensors"))
    finally:
        (run.parent / "gone").rename(run.parent / "pack")
    folder = str(image_folders / "val")
    assert loaded.predict(folder) == model.predict(folder)


def test_errors_of_predict(model, tmp_path, small_pack):
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(fastlt.DataError, match=r"broken\.jpg"):
        model.predict(tmp_path)
    with pytest.raises(fastlt.DataError, match=r"nowhere\.jpg"):
        model.predict("nowhere.jpg")
    with pytest.raises(fastlt.DataError, match="holds no images"):
        model.predict(tmp_path / "empty")
    with pytest.raises(fastlt.DataError, match="float64"):
        model.predict(np.zeros((8, 8, 3)))
    with pytest.raises(fastlt.DataError, match=r"\(8, 8\)"):
        model.predict([np.zeros((8, 8), np.uint8)])
    with pytest.raises(fastlt.UserError, match="top=0"):
        model.predict(tmp_path, top=0)
    with pytest.raises(fastlt.UserError, match="onnxruntime"):
        fastlt.load(tmp_path / "model.onnx")
    with pytest.raises(fastlt.UserError, match="nowhere"):
        fastlt.load("nowhere")
    with pytest.raises(fastlt.UserError, match=r"no model\.safetensors"):
        fastlt.load(small_pack)


def test_errors_of_train_by_kind(small_pack, tmp_path):
    with pytest.raises(fastlt.ConfigError, match=r"did you mean 'loss\.silence'"):
        fastlt.train("demo", data=small_pack, out=tmp_path / "run", settings={"loss.silense": 1})
    with pytest.raises(fastlt.ConfigError, match="there is no recipe"):
        fastlt.train("dmo", data=small_pack, out=tmp_path / "run")
    with pytest.raises(fastlt.ConfigError, match="there is no method"):
        fastlt.train("demo", data=small_pack, out=tmp_path / "run", method="crtt")
    with pytest.raises(fastlt.DataError, match="there is no pack at"):
        fastlt.train("demo", data=tmp_path / "nowhere", out=tmp_path / "run", quiet=True)
    with pytest.raises(fastlt.UserError, match="--val"):
        fastlt.pack(target=tmp_path, out=tmp_path / "pack")


@pytest.fixture
def forgotten(monkeypatch):
    """The old modules are imported anew, and forgotten afterwards."""
    for old in MOVED:
        monkeypatch.delitem(sys.modules, old, raising=False)
    yield
    for old in MOVED:
        name = old.rpartition(".")[2]
        parent = import_module(old.rpartition(".")[0])
        if isinstance(vars(parent).get(name), type(sys)) and old in sys.modules:
            delattr(parent, name)
        sys.modules.pop(old, None)


def test_old_paths_are_imported_with_a_warning(forgotten):
    for old, places in MOVED.items():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", FutureWarning)
            module = import_module(old)
        for place in places.split():
            if module.__spec__.loader.__class__ is type:  # not a module that has not moved yet
                assert import_module(place)
                assert any(place in str(one.message) for one in caught)
                assert caught[0].filename == __file__ or "importlib" in caught[0].filename


def test_old_names_are_found_where_they_are_now(forgotten):
    with pytest.warns(FutureWarning, match="fastlt.packing.reader"):
        from fastlt.data.packed import open_pack
    with pytest.warns(FutureWarning, match="fastlt.models.heads"):
        from fastlt.model import Classifier, LinearHead
    with pytest.warns(FutureWarning, match="fastlt.packing.concat"):
        from fastlt.data.mixture import mix_packs
    from fastlt.models import classifier, heads
    from fastlt.packing import concat, reader

    assert open_pack is reader.open_pack
    assert (Classifier, LinearHead) == (classifier.Classifier, heads.LinearHead)
    assert mix_packs is concat.concat_packs
    with pytest.raises(ImportError), warnings.catch_warnings():
        from fastlt.model import nonsense  # noqa: F401


def test_train_is_a_function_and_an_old_module(forgotten, run):
    with pytest.warns(FutureWarning, match=r"fastlt\.training\.loop"):
        from fastlt.train import train
    with pytest.warns(FutureWarning, match=r"fastlt\.evaluation\.evaluate"):
        from fastlt.evaluate import evaluate_run
    from fastlt.evaluation import evaluate
    from fastlt.training import loop

    assert train is loop.train
    assert evaluate_run is evaluate.evaluate_run
    pack = run.parent / "pack"
    again = fastlt.train("cifar100-siblings", data=pack, out=run, settings=SETTINGS, quiet=True)
    assert again == json.loads((run / "result.json").read_text())
    assert fastlt.evaluate(run)["top1"] == again["top1"]
