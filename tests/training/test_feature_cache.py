"""Heads that are trained on features computed once."""

import json

import pytest
import torch
from helpers.method_cases import QUIET, config_of, need_timm, prepared, trained
from safetensors.torch import load_file

from fastlt.config import ConfigError
from fastlt.errors import UserError
from fastlt.training.features import features_folder, views_id, views_of
from fastlt.training.loop import open_packs, train

HEAD = ["model.adapt=head", "optim.lr=0.05"]
CACHED = [*HEAD, "data.features=cache"]
# without chance, a view is what is trained on otherwise
STILL = ["data.crop=centre-crop", "data.flip=false"]


def test_training_on_features_is_training_on_images(small_pack, tmp_path):
    images = trained(small_pack, tmp_path / "images", "plain", *HEAD, *STILL)
    cached = trained(
        small_pack, tmp_path / "cached", "plain", *CACHED, *STILL, "data.feature_views=1"
    )
    expected, found = (load_file(run / "model.safetensors") for run in (images, cached))
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():  # features are kept in bfloat16
        torch.testing.assert_close(found[name], tensor, rtol=0.02, atol=0.005)


def test_views_are_cut_anew_and_drawn_evenly(small_pack, tmp_path):
    settings = [*CACHED, "data.feature_views=3", "train.epochs=60"]
    with prepared(small_pack, tmp_path / "run", "plain", *settings) as trainer:
        values = views_of(
            trainer.model,
            trainer.pack,
            trainer.config,
            trainer.device,
            trainer.dtype,
            tmp_path / "run",
        )
        assert values.shape == (3, len(trainer.pack.train), 64)
        assert values.dtype == torch.bfloat16
        assert not torch.equal(values[0], values[1])
        seen = torch.zeros(3)
        for epoch in range(60):
            for batch in trainer.plan.epoch(epoch):
                views = torch.from_numpy(batch.boxes[:, 0]).long()
                seen += torch.bincount(views, minlength=3)
            loaded = next(trainer.train_loader.iterate(trainer.plan.epoch(epoch)))
            batch, features = loaded
            views = torch.from_numpy(batch.boxes[:, 0]).long()
            expected = values[views, torch.from_numpy(batch.images)].float()
            assert torch.equal(features, expected)
        assert (seen / seen.sum() - 1 / 3).abs().max() < 0.03


def test_other_heads_losses_and_auxiliaries_read_the_same_file(small_pack, tmp_path):
    folder = features_folder(open_packs(config_of(small_pack, "plain").data), tmp_path)
    before = {*folder.glob("*.npy")}
    one = ["data.feature_views=2", "data.padding=1"]
    trained(small_pack, tmp_path / "a", "plain", *CACHED, *one)
    kept = {*folder.glob("*.npy")} - before
    stamps = {path: path.stat().st_mtime_ns for path in kept}
    assert 1 <= len(kept) <= 2  # of the views, and of val, which others may have computed
    others = ["model.head=cosine", "loss.silence=0", "data.neighbours=1", "optim.lr=0.3"]
    trained(small_pack, tmp_path / "b", "plain", *CACHED, *one, *others)
    assert {*folder.glob("*.npy")} - before == kept
    assert {path: path.stat().st_mtime_ns for path in kept} == stamps
    trained(small_pack, tmp_path / "c", "plain", *CACHED, *one, "data.flip=false")
    assert len({*folder.glob("*.npy")} - before) == len(kept) + 1


def test_a_run_on_features_resumes_with_equal_bits(small_pack, tmp_path):
    whole = trained(small_pack, tmp_path / "whole", "plain", *CACHED, "train.epochs=3")
    config = config_of(small_pack, "plain", *CACHED, "train.epochs=3")

    class Killed(Exception):
        pass

    def kill(record):
        if record["epoch"] == 0:
            raise Killed

    with pytest.raises(Killed):
        train(config, tmp_path / "cut", QUIET, kill)
    train(config, tmp_path / "cut", QUIET)
    for name, tensor in load_file(whole / "model.safetensors").items():
        assert torch.equal(load_file(tmp_path / "cut" / "model.safetensors")[name], tensor), name
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [0, 1, 2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["data.features=cache"], "set model.adapt=head"),
        ([*CACHED, "augment.mixup=0.2"], "augment.mixup=0"),
        ([*CACHED, "data.start_size=8"], "data.start_size=0"),
    ],
)
def test_what_moves_features_is_refused(small_pack, settings, message):
    with pytest.raises(ConfigError, match=message):
        config_of(small_pack, "plain", *settings)


def test_methods_that_need_images_are_refused(small_pack, tmp_path):
    with (
        pytest.raises(UserError, match=r"does not go with data\.features=cache"),
        prepared(small_pack, tmp_path / "run", "lcreg", *CACHED),
    ):
        pass


def test_features_of_another_pooling_are_others(small_pack, tmp_path):
    need_timm()
    vit = [*CACHED, "model.name=test_vit", "data.size=32"]
    names = set()
    for pooling in ("default", "patches"):
        with prepared(
            small_pack, tmp_path / pooling, "plain", *vit, f"model.pooling={pooling}"
        ) as trainer:
            names.add(views_id(trainer.model.backbone, trainer.pack.train, trainer.config))
    assert len(names) == 2
