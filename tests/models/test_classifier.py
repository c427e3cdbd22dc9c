import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from fastlt.classes import ClassSpace
from fastlt.config import load_config
from fastlt.errors import UserError
from fastlt.models.backbones import BasicBlock, CifarResNet
from fastlt.models.classifier import build_model
from fastlt.models.heads import CosineHead, section
from fastlt.packing.reader import open_pack
from fastlt.training.setup import prepare


def test_resnet32_has_the_published_size():
    """He et al. 2016, table 6: 0.46 M parameters (with option A shortcuts there are none besides
    convolutions and norms).
    """
    model = build_model(section()(name="resnet32"), 10, 32)
    assert sum(p.numel() for p in model.parameters()) == 464_154
    assert sum(isinstance(m, torch.nn.Conv2d) for m in model.modules()) == 31


def test_the_shortcut_subsamples_and_pads_with_zeros():
    block = BasicBlock(16, 32, 2).eval()
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.rand(2, 16, 8, 8)
    out = block(x)
    torch.testing.assert_close(out[:, 8:24], x[:, :, ::2, ::2])
    assert out[:, :8].abs().sum() == 0 and out[:, 24:].abs().sum() == 0


@pytest.mark.parametrize("size", [32, 33, 64])
def test_features_of_any_size(size):
    assert CifarResNet(8)(torch.rand(2, 3, size, size)).shape == (2, 64)


def test_the_cosine_head_gives_scaled_cosines():
    head = CosineHead(8, 5, 30.0)
    x = torch.randn(4, 8)
    expected = 30 * torch.nn.functional.cosine_similarity(x[:, None], head.weight[None], dim=2)
    torch.testing.assert_close(head(x), expected)


@pytest.mark.parametrize("name", ["test_vit", "vit_tiny_patch16_224"])
def test_weights_of_a_vision_transformer_may_be_of_another_image_size(name, tmp_path):
    """As DINOv2's are, stored for 518 pixels: position embeddings are resampled, all else is taken
    as it is.
    """
    stored = build_model(section()(name=name), 7, 224).backbone
    with torch.no_grad():  # positions that vary smoothly are about the same when they are resampled
        grid = torch.linspace(-1, 1, 14)[:, None] + torch.linspace(0, 2, 14)
        stored.pos_embed[:, -196:] = grid.reshape(1, -1, 1)
    save_file(stored.state_dict(), tmp_path / "w.safetensors")
    found = build_model(
        section()(name=name, weights=str(tmp_path / "w.safetensors")), 7, 112
    ).backbone
    assert torch.equal(found.patch_embed.proj.weight, stored.patch_embed.proj.weight)
    # of the class token
    torch.testing.assert_close(found.pos_embed[:, :-49], stored.pos_embed[:, :-196])
    wanted = grid.reshape(7, 2, 7, 2).mean(dim=(1, 3)).reshape(-1)
    assert (found.pos_embed[0, -49:, 0] - wanted).abs().max() < 0.1
    assert found(torch.rand(2, 3, 112, 112)).shape == (2, found.num_features)


def test_a_timm_backbone_gets_our_head():
    model = build_model(section()(name="resnet18"), 7, 64)
    assert model(torch.rand(2, 3, 64, 64)).shape == (2, 7)
    vit = build_model(section()(name="vit_tiny_patch16_224", drop_path=0.1), 7, 32)
    assert vit(torch.rand(2, 3, 32, 32)).shape == (2, 7)


def test_activations_that_are_computed_anew_change_no_gradient():
    gradients = []
    for anew in (False, True):
        torch.manual_seed(0)
        model = build_model(section()(name="test_vit", checkpoint_activations=anew), 5, 32).train()
        model(
            torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        ).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert model.backbone.grad_checkpointing
    with pytest.raises(UserError, match="resnet8 cannot compute its activations anew"):
        build_model(section()(name="resnet8", checkpoint_activations=True), 5, 32)


def test_an_unknown_model_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'resnet50"):
        build_model(section()(name="resnett50"), 7, 64)


def test_weights_from_a_file_and_from_one_that_does_not_fit(tmp_path):
    source = CifarResNet(8)
    save_file(
        {**source.state_dict(), "head.weight": torch.zeros(3, 64)}, tmp_path / "good.safetensors"
    )
    model = build_model(
        section()(name="resnet8", weights=str(tmp_path / "good.safetensors")), 10, 32
    )
    assert torch.equal(model.backbone.conv1.weight, source.conv1.weight)
    with pytest.raises(
        UserError, match=r"60 tensors are missing .*; 20 tensors have another shape"
    ):
        build_model(section()(name="resnet20", weights=str(tmp_path / "good.safetensors")), 10, 32)
    (tmp_path / "bad.safetensors").write_bytes(b"pickle?")
    with pytest.raises(UserError, match="must be a safetensors file"):
        build_model(section()(name="resnet8", weights=str(tmp_path / "bad.safetensors")), 10, 32)


def test_the_head_starts_from_given_rows(tmp_path):
    rows = torch.randn(4, 64)
    save_file({"weight": rows}, tmp_path / "text.safetensors")
    config = section()(
        name="resnet8", head="cosine", head_weights=str(tmp_path / "text.safetensors")
    )
    assert torch.equal(build_model(config, 10, 32).head.weight[:4], rows)
    with pytest.raises(UserError, match=r"weight of shape \(4, 64\); the head is \(3, 64\)"):
        build_model(config, 3, 32)


def test_pretrained_weights_of_a_cifar_resnet_do_not_exist():
    with pytest.raises(UserError, match="no pretrained weights for resnet32"):
        build_model(section()(name="resnet32", pretrained=True), 10, 32)


@pytest.mark.parametrize("name", ["resnet8", "resnet18", "test_vit", "tf_efficientnet_lite0"])
def test_maps_and_their_pooling_make_the_features(name):
    model = build_model(section()(name=name), 5, 64).eval()
    images = torch.randn(2, 3, 64, 64)
    maps = model.maps(images)
    width = model.backbone.num_features
    assert maps.ndim == 4 and maps.shape[:2] == (2, width)
    assert model.pool(maps).shape == (2, width)
    if name != "test_vit":  # which takes its class token instead
        torch.testing.assert_close(model.pool(maps), model.backbone(images))


def space_of(*names):
    ones = [1] * len(names)
    return ClassSpace(target_names=list(names), train_counts=ones, val_counts=ones)


def text_features(path, names, width=64):
    vectors = np.random.default_rng(0).normal(size=(len(names), width)).astype(np.float32)
    np.savez(path, names=np.array(names), text=3 * vectors)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("head", ["linear", "cosine"])
def test_a_head_starts_from_the_vectors_of_its_classes_names(tmp_path, head):
    known = ["yak", "Polar bear", "ant", "unused"]
    unit = text_features(tmp_path / "text.npz", known)
    for place in (tmp_path / "text.npz", f"{tmp_path / 'text.npz'}:text"):
        config = section()(name="resnet8", head=head, head_weights=str(place))
        model = build_model(config, 3, 32, space_of("polar_bear", "ant", "yak"))
        torch.testing.assert_close(model.head.weight.detach(), torch.from_numpy(unit[[1, 2, 0]]))


def test_vectors_that_are_missing_or_of_another_width_are_refused(tmp_path):
    text_features(tmp_path / "text.npz", ["yak"])
    config = section()(name="resnet8", head_weights=str(tmp_path / "text.npz"))
    with pytest.raises(UserError, match="has no vector of 'ant' and of 1 more classes"):
        build_model(config, 3, 32, space_of("yak", "ant", "bee"))
    text_features(tmp_path / "text.npz", ["yak"], width=5)
    with pytest.raises(UserError, match=r"a weight of shape \(1, 5\)"):
        build_model(config, 1, 32, space_of("yak"))


def test_rows_follow_the_names_of_a_pack_whose_auxiliaries_are_reordered(small_pack, tmp_path):
    unit = text_features(tmp_path / "text.npz", ["a", "b", "c", "x", "y"])
    vectors = {"a": (1, 0), "b": (0, 1), "c": (1, 1), "x": (0.5, 0.5), "y": (0.1, 0.9)}
    values = np.array(list(vectors.values()), np.float32)
    np.savez(tmp_path / "near.npz", names=list(vectors), v=values)
    settings = [
        f"data.pack={small_pack}",
        "model.name=resnet8",
        "model.head=cosine",
        f"model.head_weights={tmp_path / 'text.npz'}",
        f"data.similarity={tmp_path / 'near.npz'}",
        "data.band=[0.99, 1]",
    ]
    config = load_config("demo", settings)
    with prepare(config, tmp_path / "run", open_pack(small_pack)) as trainer:
        assert trainer.space.names == ["a", "b", "c", "y"]
        rows = torch.from_numpy(unit[[0, 1, 2, 4]])
        torch.testing.assert_close(trainer.model.head.weight.detach().cpu(), rows)
