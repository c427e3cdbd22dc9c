"""Models between the start and the end of a run."""

import pytest
import torch
from helpers.method_cases import need_timm, trained
from safetensors.torch import load_file, save_file

from fastlt.config import load_config
from fastlt.errors import UserError
from fastlt.evaluation.evaluate import evaluate_run
from fastlt.evaluation.predict import load_model
from fastlt.evaluation.views import evaluate_views
from fastlt.models.classifier import build_model
from fastlt.models.heads import section
from fastlt.packing.reader import open_pack, picture
from fastlt.studies.blend import between, blend_run, ends_of, score_blends
from fastlt.utils.run_files import read_result


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(8)
    place = tmp_path_factory.mktemp("weights") / "resnet8.safetensors"
    save_file(build_model(section()(name="resnet8"), 3, 16).backbone.state_dict(), place)
    return place


@pytest.fixture(scope="module")
def run(small_pack, weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    start = [f"model.weights={weights}", "model.head=cosine", "model.head_weights=means"]
    return trained(small_pack, folder, "plain", *start, "optim.lr=0.02")


def test_the_ends_are_the_weights_of_the_file_and_of_the_run(run, weights):
    ends = ends_of(run, load_config(str(run / "config.toml")))
    stored, last = load_file(weights), load_file(run / "model.safetensors")
    for weight, backbone in ((0, stored), (1, None)):
        for name, tensor in between(ends, weight).state_dict().items():
            known = last[name] if backbone is None else backbone.get(name.removeprefix("backbone."))
            if known is not None and tensor.is_floating_point():
                torch.testing.assert_close(tensor, known, rtol=1e-6, atol=1e-6)
    half = between(ends, 0.5).state_dict()["backbone.conv1.weight"]
    mean = (stored["conv1.weight"] + last["backbone.conv1.weight"]) / 2
    torch.testing.assert_close(half, mean)
    head = ends.start.head.weight
    assert not torch.equal(head, last["head.weight"])  # the means that it started from
    torch.testing.assert_close(between(ends, 0).head.weight, head)


def test_a_blend_is_evaluated_as_a_run(run, tmp_path):
    table = score_blends(run)
    assert table[1.0]["top1"] == read_result(run)["top1"] and len(table) == 11
    blend_run(run, 0.3, tmp_path / "blend")
    assert evaluate_run(tmp_path / "blend")["top1"] == pytest.approx(table[0.3]["top1"])
    with pytest.raises(UserError, match="is there already"):
        blend_run(run, 0.3, tmp_path / "blend")


def test_a_head_that_began_by_chance_stays(small_pack, weights, tmp_path):
    folder = trained(small_pack, tmp_path / "run", "plain", f"model.weights={weights}")
    ends = ends_of(folder, load_config(str(folder / "config.toml")))
    last = load_file(folder / "model.safetensors")
    assert torch.equal(between(ends, 0.0).head.weight, last["head.weight"])


def test_lora_is_blended_as_the_weights_that_it_is_merged_into(small_pack, weights, tmp_path):
    need_timm()
    pytest.importorskip("peft")
    settings = [f"model.weights={weights}", "model.adapt=lora", "optim.lr=0.05"]
    folder = trained(small_pack, tmp_path / "run", "plain", *settings)
    ends = ends_of(folder, load_config(str(folder / "config.toml")))
    first, last = (between(ends, weight).state_dict() for weight in (0.0, 1.0))
    stored = load_file(weights)
    name = "stages.2.conv1.weight"
    assert torch.equal(first[f"backbone.{name}"], stored[name])
    assert not torch.equal(last[f"backbone.{name}"], stored[name])


def test_runs_without_a_start_are_refused(small_pack, tmp_path):
    folder = trained(small_pack, tmp_path / "run", "plain")
    with pytest.raises(UserError, match="did not start from pretrained weights"):
        blend_run(folder, 0.5, tmp_path / "out")
    with pytest.raises(UserError, match="must be from 0"):
        blend_run(folder, 1.5, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_views_of_evaluation_are_averaged(run, small_pack):
    plain, views = evaluate_run(run), evaluate_views(run, None, "val", "none")
    assert views["top1"] == plain["top1"] and views["confusion"] == plain["confusion"]
    model = load_model(run, "cpu")
    val = open_pack(small_pack).val
    images = torch.stack([model.transform(picture(val, number)) for number in range(len(val))])
    temperature = model.calibration.temperature
    with torch.no_grad():
        both = [(model.module(x) / temperature).softmax(1) for x in (images, images.flip(3))]
    predicted = (both[0] + both[1]).argmax(1)
    right = (predicted == torch.from_numpy(val.label.astype("int64"))).float().mean()
    assert evaluate_views(run, None, "val", "flip")["top1"] == pytest.approx(100 * float(right))
