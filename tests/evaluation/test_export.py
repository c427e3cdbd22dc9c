"""Exports that others load: each form, read back by those others, and what is refused."""

import http.server
import json
import subprocess
import sys
import threading

import pytest
import torch
from helpers.method_cases import need_timm, trained
from safetensors.torch import load_file

import fastlt
from fastlt.errors import UserError
from fastlt.evaluation import export as exports
from fastlt.evaluation.export import ExportOptions, export_run
from fastlt.evaluation.push import push_folder
from fastlt.models.export import read_metadata


@pytest.fixture(scope="module")
def run(small_pack, tmp_path_factory):
    """Return a finished run of a CIFAR ResNet."""
    return trained(small_pack, tmp_path_factory.mktemp("export") / "run", "plain")


@pytest.fixture(scope="module", params=["test_resnet", "test_vit"])
def timm_run(request, small_pack, tmp_path_factory):
    """Return a finished run of a small backbone of timm."""
    need_timm()
    place = tmp_path_factory.mktemp("export") / request.param
    sizes = ["data.size=32", "data.eval_resize=40", "optim.lr=0.01", "train.epochs=1"]
    return trained(small_pack, place, "plain", f"model.name={request.param}", *sizes)


def images_of(run):
    model = fastlt.load(run, device="cpu")
    with torch.inference_mode():
        images = torch.randn(3, 3, model.size, model.size)
        return images, model.module(images), model


def test_timm_itself_loads_the_folder(timm_run, tmp_path):
    import timm

    said = export_run(timm_run, tmp_path / "x")
    assert "same logits on 9 images of the pack" in said
    loaded = timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True).eval()
    images, expected, model = images_of(timm_run)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(images), expected, rtol=1e-4, atol=1e-5)
    cfg = loaded.pretrained_cfg
    assert cfg["label_names"] == model.classes and cfg["num_classes"] == 3
    assert cfg["input_size"] == (3, 32, 32) and cfg["crop_pct"] == pytest.approx(0.8)
    assert tuple(cfg["mean"]) == pytest.approx((0.5071, 0.4865, 0.4409))
    assert cfg["interpolation"] == "bilinear"  # images of 16 pixels are enlarged
    card = (tmp_path / "x" / "README.md").read_text()
    assert "library_name: timm" in card and "auxiliary classes, which the model does not" in card
    again = fastlt.load(tmp_path / "x", device="cpu")
    with torch.inference_mode():
        assert torch.equal(again.module(images), expected)
    assert again.calibration == model.calibration and again.prior == model.prior


def test_a_model_that_is_not_timms_comes_with_a_loader(run, image_folders, tmp_path):
    assert "load.py" in export_run(run, tmp_path / "x")
    path = image_folders / "val" / "a" / "0.png"
    command = [sys.executable, "-S", str(tmp_path / "x" / "load.py"), str(path)]
    environment = {"PYTHONPATH": ":".join(p for p in sys.path if p.endswith("site-packages"))}
    said = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    name, found, probability = said.stdout.strip().split("\t")
    (expected,) = fastlt.load(run).predict(path)
    assert (name, found) == (str(path), expected.names[0])
    assert float(probability) == pytest.approx(expected.probabilities[0], abs=0.01)
    assert len((tmp_path / "x" / "load.py").read_text().splitlines()) <= 25
    assert fastlt.load(tmp_path / "x").predict(path)[0] == expected


def test_onnx_says_what_it_needs(run, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX export is an extra")
    export_run(run, tmp_path / "m.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    images, expected, model = images_of(run)
    (found,) = session.run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-3, atol=1e-4)
    told = {k: json.loads(v) for k, v in session.get_modelmeta().custom_metadata_map.items()}
    assert told["classes"] == model.classes and told["size"] == told["resize"] == 16
    assert told["mean"] == pytest.approx([0.5071, 0.4865, 0.4409])


def test_onnx_with_its_preprocessing_predicts_files_of_any_size(run, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="ONNX export is an extra")
    export_run(run, tmp_path / "m.onnx", ExportOptions(preprocessing=True))
    session = onnxruntime.InferenceSession(str(tmp_path / "m.onnx"))
    model = fastlt.load(run, device="cpu")
    for height, width in ((40, 64), (33, 17), (160, 120)):
        pixels = torch.randint(0, 256, (1, height, width, 3), dtype=torch.uint8)
        (found,) = session.run(None, {"pixels": pixels.numpy()})
        with torch.inference_mode():
            expected = model.module(model.transform(pixels[0].numpy())[None])
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0.05, atol=0.05)


def test_a_program_of_torch_needs_no_code(run, tmp_path):
    export_run(run, tmp_path / "m.pt2")
    extra = {"description.json": ""}
    program = torch.export.load(tmp_path / "m.pt2", extra_files=extra).module()
    images, expected, model = images_of(run)
    with torch.inference_mode():
        torch.testing.assert_close(program(images[:1]), expected[:1], rtol=1e-4, atol=1e-5)
    assert json.loads(extra["description.json"])["classes"] == model.classes


@pytest.mark.parametrize(
    "name", ["half", "half.safetensors", pytest.param("half.onnx", marks=pytest.mark.slow)]
)
def test_half_the_size_predicts_nearly_the_same(run, tmp_path, name):
    if name.endswith(".onnx"):
        pytest.importorskip("onnxruntime", reason="ONNX export is an extra")
    said = export_run(run, tmp_path / name, ExportOptions(half=True))
    assert "same logits" in said
    whole = tmp_path / f"whole{(tmp_path / name).suffix}"
    export_run(run, whole)
    files = [p / "model.safetensors" if p.is_dir() else p for p in (tmp_path / name, whole)]
    small, large = (file.stat().st_size for file in files)
    assert small < 0.7 * large
    if files[0].suffix == ".safetensors":
        kinds = {tensor.dtype for tensor in load_file(files[0]).values()}
        assert kinds == {torch.float16, torch.int64}


def test_thresholds_and_temperature_go_with_an_export(run, tmp_path):
    from fastlt.evaluation.evaluate import evaluate_run

    evaluate_run(run, precision=0.3)
    export_run(run, tmp_path / "m.safetensors")
    known = fastlt.load(tmp_path / "m.safetensors").calibration
    assert known == fastlt.load(run).calibration and known.threshold is not None
    assert read_metadata(tmp_path / "m.safetensors")["calibration"]["precision"] == 0.3


@pytest.mark.parametrize("name", ["m.safetensors", "x"])
def test_what_is_there_is_replaced_by_force_alone(run, tmp_path, name, monkeypatch):
    place = tmp_path / name
    export_run(run, place)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="is there already: name another place"):
        export_run(run, place)
    monkeypatch.setattr(exports, "MAX_DIFFERENCE", -1.0)  # nothing is near enough
    with pytest.raises(UserError, match="gives other logits"):
        export_run(run, place, ExportOptions(force=True))
    assert sorted(tmp_path.rglob("*")) == before  # what was there is whole, and nothing beside it
    monkeypatch.undo()
    export_run(run, place, ExportOptions(force=True))
    assert sorted(tmp_path.rglob("*")) == before


def test_bad_names_and_options_are_refused(run, tmp_path):
    for name, options, message in (
        ("m.tflite", ExportOptions(), r"cannot export to 'm\.tflite'"),
        ("m.pt2", ExportOptions(half=True), r"--half is not for \.pt2"),
        ("x", ExportOptions(preprocessing=True), r"--preprocessing is for \.onnx"),
    ):
        with pytest.raises(UserError, match=message):
            export_run(run, tmp_path / name, options)
    with pytest.raises(UserError, match=r"no run or model"):
        export_run(tmp_path / "nowhere", tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_where_the_pack_is_gone_noise_is_compared(run, small_pack, tmp_path):
    away = small_pack.rename(small_pack.parent / "away")
    try:
        said = export_run(run, tmp_path / "m.safetensors")
    finally:
        away.rename(small_pack)
    assert "16 random images, for the pack is gone" in said


# --- a hub


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of a hub of models as an upload of small files needs."""

    calls: list[tuple[str, bytes]]

    def answer(self, code: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.calls.append((self.path, body))  # type: ignore[attr-defined]
        place = f"http://127.0.0.1:{self.server.server_port}"  # type: ignore[attr-defined]
        if self.path.endswith("/repos/create"):
            self.answer(200, {"url": f"{place}/me/m", "id": "me/m", "name": "me/m"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            kept = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
            ]
            self.answer(200, {"files": kept})
        elif "/commit/" in self.path:
            self.answer(
                200, {"commitUrl": f"{place}/me/m/commit/1", "commitOid": "1", "success": True}
            )
        else:
            self.answer(200, {"valid": True})

    def do_GET(self) -> None:
        self.server.calls.append((self.path, b""))  # type: ignore[attr-defined]
        self.answer(200, {"id": "me/m", "sha": "0" * 40, "siblings": []})

    def log_message(self, *ignored: object) -> None:
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.calls = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield server
    server.shutdown()


PUSH = """
import sys
from pathlib import Path
from fastlt.evaluation.push import push_folder
print(push_folder(Path(sys.argv[1]), "me/m", False))
"""


def test_a_folder_is_pushed_to_a_hub(run, hub, tmp_path):
    pytest.importorskip("huggingface_hub", reason="huggingface_hub comes with timm")
    export_run(run, tmp_path / "x")
    environment = {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_TOKEN": "hf_test",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "PATH": "",
    }
    command = [sys.executable, "-c", PUSH, str(tmp_path / "x")]
    said = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert "pushed to me/m" in said.stdout, said.stderr
    commits = [body.decode() for path, body in hub.calls if "/commit/" in path]
    assert len(commits) == 1
    rows = [json.loads(line) for line in commits[0].splitlines()]
    sent = {row["value"]["path"] for row in rows if row["key"] == "file"}
    assert {"model.safetensors", "README.md", "load.py", "model.pt2"} <= sent


def test_a_hub_that_is_away_leaves_the_folder(run, tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub", reason="huggingface_hub comes with timm")

    def refuse(*ignored, **also):
        raise OSError("no route to host")

    monkeypatch.setattr(hub.HfApi, "create_repo", refuse)
    export_run(run, tmp_path / "x")
    with pytest.raises(UserError, match=r"could not push to me/m \(no route to host\).*is whole"):
        push_folder(tmp_path / "x", "me/m", False)
    assert (tmp_path / "x" / "README.md").is_file()
