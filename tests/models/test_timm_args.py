"""Backbones of timm with arguments of their own: how they are built, exported and probed."""

import numpy as np
import pytest
import torch
from helpers.method_cases import QUIET, need_timm, trained
from safetensors.torch import save_file

from fastlt.errors import UserError
from fastlt.evaluation.export import export_run
from fastlt.evaluation.predict import load_model
from fastlt.models.backbones import import_timm
from fastlt.models.classifier import build_model
from fastlt.models.heads import section
from fastlt.models.timm_folder import load_timm_folder
from fastlt.studies.probe import ProbeOptions, run_probe

ARGS = {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
VIT = [
    "model.name=vit_tiny_patch16_224",
    "model.args={patch_size = 8, embed_dim = 48, depth = 2, num_heads = 3}",
    "data.size=32",
]
CLIP = "vit_xsmall_patch16_clip_224.tinyclip_yfcc15m"


@pytest.fixture(autouse=True)
def timm():
    need_timm()


def test_patches_are_averaged_after_the_last_norm():
    plain, averaged = (
        build_model(section()(name=VIT[0][11:], args=ARGS, pooling=pooling), 3, 32).eval()
        for pooling in ("default", "patches")
    )
    averaged.load_state_dict(plain.state_dict())  # the same tensors
    images = torch.randn(2, 3, 32, 32)
    tokens = plain.backbone.forward_features(images)
    assert tokens.shape == (2, 17, 48)
    torch.testing.assert_close(averaged.features(images), tokens[:, 1:].mean(dim=1))
    torch.testing.assert_close(plain.features(images), tokens[:, 0])
    with pytest.raises(UserError, match=r"model\.pooling=patches is for vision transformers"):
        build_model(section()(name="resnet18", pooling="patches"), 3, 32)
    with pytest.raises(UserError, match="does not take"):
        build_model(section()(name="resnet18", args={"patch_size": 8}), 3, 32)


def test_timm_loads_what_was_trained_with_arguments(small_pack, tmp_path):
    settings = [*VIT, "model.pooling=patches", "train.epochs=1", "optim.lr=0.01"]
    run = trained(small_pack, tmp_path / "run", "plain", *settings)
    assert "timm's vit_tiny_patch16_224" in export_run(run, tmp_path / "folder")
    images = torch.randn(2, 3, 32, 32)
    wanted = load_model(run, "cpu").module(images)
    torch.testing.assert_close(load_timm_folder(tmp_path / "folder")(images), wanted)


def test_a_probe_with_texts_compares_in_the_space_of_clip(small_pack, tmp_path):
    whole = import_timm(CLIP).create_model(CLIP, img_size=32)
    save_file(whole.state_dict(), tmp_path / "clip.safetensors")
    vectors = np.random.default_rng(0).normal(size=(3, whole.num_classes)).astype(np.float32)
    np.savez(tmp_path / "text.npz", names=np.array(["a", "b", "c"]), text=vectors)
    weights, text = str(tmp_path / "clip.safetensors"), str(tmp_path / "text.npz")
    options = ProbeOptions(str(small_pack), CLIP, weights, 32, text=text, out=tmp_path)
    rows = {row.name: row for row in run_probe(options, QUIET)}
    assert rows["zero-shot, text"].figures["top1"] is not None
    with pytest.raises(UserError, match=r"model\.projection is for images of CLIP"):
        build_model(section()(name="test_vit", projection=True), 3, 32)
