"""Weights of others in a backbone: every form in which they come, and all that may not fit."""

import math
import pickle

import pytest
import torch
from helpers.method_cases import need_timm
from safetensors.torch import save_file
from torch import nn

from fastlt.config import load_config
from fastlt.errors import UserError
from fastlt.models.adapt import still_modules
from fastlt.models.adapt.layers import freeze, layers_of
from fastlt.models.backbones import CifarResNet
from fastlt.models.classifier import build_model
from fastlt.models.heads import section
from fastlt.models.preprocessing import with_preprocessing
from fastlt.models.pretrained import load_backbone
from fastlt.models.timm_folder import crop_share
from fastlt.models.weight_files import read_weights


def timm_model(name, **options):
    need_timm()
    return build_model(section()(name=name, **options), 5, 64).backbone


def as_file(tensors, path):
    """Write tensors as the ending says."""
    if path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    else:
        torch.save(tensors, path)
    return path


WRAPPED = {
    "as it is": lambda own: own,
    "of DDP": lambda own: {f"module.{name}": tensor for name, tensor in own.items()},
    "of torch.compile": lambda own: {f"_orig_mod.{name}": tensor for name, tensor in own.items()},
    "of a RUN": lambda own: {
        **{f"backbone.{name}": tensor for name, tensor in own.items()},
        "head.weight": torch.zeros(7, 64),
    },
    "of a wrapped model": lambda own: {f"module.model.{name}": t for name, t in own.items()},
    "without counters": lambda own: {n: t for n, t in own.items() if "num_batches" not in n},
}


@pytest.mark.parametrize("ending", [".safetensors", ".pth", ".bin"])
@pytest.mark.parametrize("form", WRAPPED)
def test_weights_come_in_many_forms(tmp_path, form, ending):
    source, found = CifarResNet(8), CifarResNet(8)
    for norm in (module for module in source.modules() if isinstance(module, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean)
    tensors = WRAPPED[form](source.state_dict())
    said = load_backbone(found, as_file(tensors, tmp_path / f"w{ending}"))
    for name, tensor in source.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    assert any("7 classes is left out" in one for one in said) == (form == "of a RUN")
    assert any("num_batches_tracked for 7" in one for one in said) == (form == "without counters")


@pytest.mark.parametrize("key", ["state_dict", "model", "model_ema"])
def test_checkpoints_of_trainers_are_unwrapped(tmp_path, key):
    tensors = CifarResNet(8).state_dict()
    torch.save({key: tensors, "epoch": 3}, tmp_path / "c.pth")
    assert read_weights(tmp_path / "c.pth").keys() == tensors.keys()
    torch.save({"model": {"state_dict": tensors}}, tmp_path / "c.pth")
    assert read_weights(tmp_path / "c.pth").keys() == tensors.keys()


class Harmful:
    def __reduce__(self):
        return (print, ("code of a file was run",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"a": Harmful()}), r"cannot read the weights|holds more than tensors"),
        (b"", r"cannot read the weights"),
        (None, r"there is no file"),
    ],
)
def test_files_that_are_none_are_refused(tmp_path, capsys, content, message):
    path = tmp_path / "w.pth"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_weights(path)
    assert "code of a file" not in capsys.readouterr().out


def test_code_in_a_file_is_not_run(tmp_path, capsys):
    torch.save({"state_dict": {"a": torch.zeros(1)}, "more": Harmful()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"holds more than tensors"):
        read_weights(tmp_path / "w.pth")
    assert "code of a file" not in capsys.readouterr().out


def test_what_does_not_fit_names_the_first_tensors(tmp_path):
    tensors = CifarResNet(8).state_dict()
    del tensors["conv1.weight"], tensors["bn1.weight"]
    tensors["stages.0.conv1.weight"] = torch.zeros(4, 4, 3, 3)
    tensors["extra"] = torch.zeros(1)
    path = as_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(UserError) as caught:
        load_backbone(CifarResNet(8), path)
    said = str(caught.value)
    assert "2 tensors are missing (conv1.weight, bn1.weight)" in said
    assert "stages.0.conv1.weight (4, 4, 3, 3) instead of (16, 16, 3, 3)" in said
    assert "1 tensor is unknown (extra)" in said


def test_what_the_model_has_not_is_told(tmp_path):
    tensors = {**CifarResNet(8).state_dict(), "decoder.x": torch.zeros(1)}
    said = load_backbone(CifarResNet(8), as_file(tensors, tmp_path / "w.safetensors"))
    assert said == ["1 tensor is left out (decoder.x)"]


def test_position_embeddings_of_another_size_are_resized_and_told(tmp_path):
    need_timm()
    stored = build_model(section()(name="test_vit"), 7, 224).backbone
    path = as_file(stored.state_dict(), tmp_path / "w.safetensors")
    notes = []
    config = section()(name="test_vit", weights=str(path))
    found = build_model(config, 7, 112, notes=notes).backbone
    assert found.pos_embed.shape[1] < stored.pos_embed.shape[1]
    assert any("pos_embed is resized from 1 x" in note for note in notes)


def test_real_weights_that_lack_counters_are_taken(shared_data):
    path = shared_data / "weights" / "tf_efficientnet_lite0.safetensors"
    if not path.is_file():
        pytest.skip("the weights are not there")
    notes = []
    found = build_model(
        section()(name="tf_efficientnet_lite0", weights=str(path)), 3, 64, notes=notes
    )
    assert torch.equal(found.backbone.conv_stem.weight, read_weights(path)["conv_stem.weight"])
    assert any("classifier of 1,000 classes is left out" in note for note in notes)
    assert any("no num_batches_tracked for 49 batch norms" in note for note in notes)


# --- preprocessing


def config_with(*settings):
    return load_config("fit", ["loss.name=ce", *settings])


def test_images_follow_the_weights_unless_set(tmp_path):
    need_timm()
    model = ["model.name=tf_efficientnet_lite0", "model.pretrained=true"]
    config, said = with_preprocessing(config_with(*model))
    data = config.data
    assert (data.size, data.eval_resize, data.mean) == (224, 256, (0.5, 0.5, 0.5))
    assert any("data.size=224" in one and "lite0" in one for one in said)
    config, said = with_preprocessing(config_with(*model, "data.size=128", "data.mean=[0.1,0,0]"))
    assert (config.data.size, config.data.eval_resize) == (128, 146)
    assert config.data.mean == (0.1, 0, 0)
    assert any("has data.mean=[0.5,0.5,0.5], which your settings" in one for one in said)
    for other in (["model.name=resnet18"], ["model.name=resnet20"]):
        unchanged = config_with(*other)
        assert with_preprocessing(unchanged) == (unchanged, [])


def test_a_folder_of_timm_says_how_its_images_are(tmp_path):
    need_timm()
    (tmp_path / "config.json").write_text(
        '{"architecture": "resnet18", "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "crop_pct": 0.5,'
        '"std": [0.4, 0.5, 0.6], "input_size": [3, 96, 96], "interpolation": "bicubic"}}'
    )
    save_file(timm_model("resnet18").state_dict(), tmp_path / "model.safetensors")
    config, _ = with_preprocessing(config_with("model.name=resnet18", f"model.weights={tmp_path}"))
    data = config.data
    assert (data.size, data.eval_resize) == (96, 192)
    assert (data.mean, data.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_timm_resizes_to_the_same_side():
    for size in range(1, 300):
        for resize in (size, round(size / 0.875), size + 1, round(size / 0.95)):
            assert math.floor(size / crop_share(size, resize)) == resize


# --- what is trained


@pytest.mark.parametrize("name", ["resnet8", "test_vit", "tf_efficientnet_lite0", "resnet18"])
def test_layers_are_frozen_from_below(name):
    backbone = CifarResNet(8) if name == "resnet8" else timm_model(name)
    layers = layers_of(backbone, name)
    assert layers.keys() == {key for key, _ in backbone.named_parameters()}
    last = max(layers.values())
    freeze(backbone, "last:2", name)
    trained = {key for key, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert trained == {key for key, layer in layers.items() if layer > last - 2} and trained
    with pytest.raises(UserError, match=rf"has {last} layers above its stem"):
        freeze(backbone, f"last:{last + 1}", name)


def test_modules_without_a_trained_parameter_stand_still():
    backbone = CifarResNet(8)
    freeze(backbone, "last:1", "resnet8")
    trained = {id(parameter) for parameter in backbone.parameters() if parameter.requires_grad}
    still = still_modules(backbone, trained, "last:1")
    assert set(still) == {backbone.conv1, backbone.bn1, backbone.stages[0], backbone.stages[1]}
    assert still_modules(backbone, set(), "last:1") == [backbone]
