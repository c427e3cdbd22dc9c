"""Weights from the hub: without a network, and from its cache."""

import pytest
import torch
from helpers.method_cases import need_timm
from safetensors.torch import save_file

from fastlt.errors import UserError
from fastlt.models import hub
from fastlt.models.classifier import build_model
from fastlt.models.heads import section


def test_a_hub_that_is_switched_off_is_not_asked(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: pytest.fail("asked"))
    assert not hub.has_hub()


def test_a_hub_that_does_not_answer_is_away(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert not hub.has_hub()


def test_pretrained_weights_without_a_hub_are_refused_at_once(monkeypatch):
    need_timm()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="the hub cannot be reached: give a file"):
        build_model(section()(name="resnet26t.ra2_in1k", pretrained=True), 3, 64)


def test_cached_weights_are_taken_without_the_hub(monkeypatch, tmp_path):
    need_timm()
    import huggingface_hub
    import timm

    whole = timm.create_model("test_resnet")
    path = tmp_path / "model.safetensors"
    save_file(whole.state_dict(), path)
    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "try_to_load_from_cache",
        lambda repo, file: asked.append((repo, file)) or str(path),
    )
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = build_model(section()(name="test_resnet", pretrained=True), 3, 64).backbone
    assert torch.equal(found.conv1[0].weight, whole.conv1[0].weight)
    assert asked == [("timm/test_resnet.r160_in1k", "model.safetensors")]
