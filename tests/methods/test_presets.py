"""Published methods as settings: what they set, whose settings win, and what their second stages
leave as it was.
"""

import json

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fastlt.config import load_config, never_reached
from fastlt.errors import UserError
from fastlt.evaluation.evaluate import evaluate_run
from fastlt.methods import method_settings
from fastlt.methods.presets import ONE_STAGE, SECOND_STAGE
from fastlt.models.export import load_exported
from fastlt.models.heads import ScaledHead
from fastlt.packing.reader import open_pack
from fastlt.training.loop import train
from fastlt.training.setup import check_head_weights
from fastlt.training.step import MaxNorm

SMALL = [
    "model.name=resnet8",
    "data.size=16",
    "data.batch=16",
    "data.padding=2",
    "data.engine=torch",
    "data.workers=0",
    "train.threads=1",
    "train.epochs=3",
    "train.eval_every=3",
]


def trained(pack, run, method, *settings, start=None):
    overrides = [*SMALL, f"data.pack={json.dumps(str(pack))}", *settings]
    config = load_config(
        "cifar100-siblings", overrides, method_settings(method, str(start) if start else None)
    )
    train(config, run, Console(quiet=True))
    return load_file(run / "model.safetensors")


@pytest.fixture(scope="module")
def first(small_pack, tmp_path_factory):
    """A first stage: its folder and its tensors."""
    run = tmp_path_factory.mktemp("first") / "run"
    return run, trained(small_pack, run, "mixup")


@pytest.mark.parametrize("method", ONE_STAGE)
def test_each_method_of_one_stage_trains(small_pack, tmp_path, method):
    trained(small_pack, tmp_path / "run", method)
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert evaluate_run(tmp_path / "run")["per_class"] == result["per_class"]


def stays(tensors, start, kind):
    """Which of the backbone's tensors are the same bits, of kind `conv`, `bn` (weights) or
    `running`.
    """
    names = [name for name in start if name.startswith("backbone.") and kind in name]
    assert names
    return all(torch.equal(tensors[name], start[name]) for name in names)


def test_crt_trains_a_new_head_on_the_backbone_as_it_is(small_pack, first, tmp_path):
    tensors = trained(small_pack, tmp_path / "run", "crt", start=first[0])
    assert (
        stays(tensors, first[1], "conv")
        and stays(tensors, first[1], "bn")
        and stays(tensors, first[1], "running")
    )
    assert not torch.allclose(tensors["head.weight"], first[1]["head.weight"], atol=0.05)


def test_lws_scales_the_rows_of_the_head_and_does_no_more(small_pack, first, tmp_path):
    tensors = trained(small_pack, tmp_path / "run", "lws", start=first[0])
    assert stays(tensors, first[1], "backbone")
    factors = tensors["head.weight"] / first[1]["head.weight"]
    torch.testing.assert_close(factors, factors[:, :1].expand_as(factors))
    torch.testing.assert_close(tensors["head.bias"], factors[:, 0] * first[1]["head.bias"])
    assert not torch.allclose(factors, torch.ones(()))
    assert type(load_exported(tmp_path / "run/model.safetensors")[0].head) is not ScaledHead


def test_mislas_shifts_batch_norm_and_no_weight_of_the_backbone(small_pack, first, tmp_path):
    tensors = trained(small_pack, tmp_path / "run", "mislas", start=first[0])
    assert stays(tensors, first[1], "conv") and stays(tensors, first[1], "bn1.weight")
    assert not stays(tensors, first[1], "running_mean")
    assert not torch.equal(tensors["head.weight"], first[1]["head.weight"])


def test_weight_balancing_caps_the_rows_of_the_head(small_pack, first, tmp_path):
    tensors = trained(
        small_pack, tmp_path / "run", "weight-balancing", "optim.weight_decay=0", start=first[0]
    )
    before, after = (t["head.weight"].norm(dim=1) for t in (first[1], tensors))
    limit = before.min() + 0.1 * (before.max() - before.min())
    assert (after <= limit * (1 + 1e-6)).all() and before.max() > limit
    assert stays(tensors, first[1], "backbone")


def test_a_second_stage_goes_on_to_the_same_bits(small_pack, first, tmp_path):
    whole = trained(small_pack, tmp_path / "whole", "weight-balancing", start=first[0])
    config = load_config(
        "cifar100-siblings",
        [
            *SMALL,
            f"data.pack={json.dumps(str(small_pack))}",
            "train.checkpoint_steps=1",
            "train.keep=9",
        ],
        method_settings("weight-balancing", str(first[0])),
    )
    train(config, tmp_path / "cut", Console(quiet=True))
    for path in sorted((tmp_path / "cut/checkpoints").iterdir())[1:]:
        for file in path.rglob("*"):
            file.unlink()
        path.rmdir()
    (tmp_path / "cut/result.json").unlink()
    train(config, tmp_path / "cut", Console(quiet=True))
    again = load_file(tmp_path / "cut/model.safetensors")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_rows_shorter_than_the_limit_stay():
    weight = torch.nn.Parameter(torch.tensor([[3.0, 4.0], [0.6, 0.8], [0.0, 0.0]]))
    rule = MaxNorm(weight, 0.4)  # 0, 1 and 5 long: 2 at most
    rule.project()
    torch.testing.assert_close(weight.detach(), torch.tensor([[1.2, 1.6], [0.6, 0.8], [0.0, 0.0]]))


def test_the_users_settings_win_and_epochs_scale():
    config = load_config("cifar100-lt", [], method_settings("ldam-drw", None))
    assert (config.loss.name, config.model.head, config.loss.drw_epoch) == ("ldam", "cosine", 160)
    config = load_config(
        "cifar100-lt", ["train.epochs=40", "loss.max_margin=0.3"], method_settings("ldam-drw", None)
    )
    assert (config.loss.drw_epoch, config.loss.max_margin) == (32, 0.3)
    assert (
        load_config(
            "cifar100-lt", ["loss.drw_epoch=7"], method_settings("ldam-drw", None)
        ).loss.drw_epoch
        == 7
    )


@pytest.mark.parametrize("method", SECOND_STAGE)
def test_second_stages_are_short_freeze_the_backbone_and_fit_every_recipe(method):
    for recipe in (
        "cifar100-lt",
        "imagenet-lt-resnet50",
        "imagenet-lt-dinov2-b14",
        "places-lt-vit-b16",
    ):
        config = load_config(recipe, [], method_settings(method, "run"))
        assert config.train.epochs == config.schedule.head_only_epochs == 10
        assert config.model.weights == "run" and not never_reached(config)
        longer = load_config(recipe, ["train.epochs=30"], method_settings(method, "run"))
        assert longer.train.epochs == longer.schedule.head_only_epochs == 30


def test_a_model_to_begin_with_goes_with_any_method_and_with_none(small_pack, first, tmp_path):
    config = load_config("cifar100-lt", [], method_settings("ce", "run"))
    assert config.model.weights == "run" and config.model.head_weights == ""
    assert load_config("cifar100-lt", [], method_settings(None, "run")).model.weights == "run"
    assert load_config("cifar100-lt", [], method_settings(None, None)) == load_config("cifar100-lt")
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        trained(small_pack, tmp_path / "run", "ce", start=tmp_path)


def test_methods_that_do_not_exist_or_lack_their_first_stage_are_refused():
    with pytest.raises(UserError, match=r"there is no method 'ldam'.*did you mean 'ldam-drw'"):
        method_settings("ldam", None)
    with pytest.raises(
        UserError,
        match=r"--method crt begins with the model of another run: name it with --start RUN",
    ):
        method_settings("crt", None)
    with pytest.raises(UserError, match=r"model\.scale_alone is for model.head=scaled"):
        load_config("cifar100-lt", ["model.scale_alone=true"])
    with pytest.raises(UserError, match=r"optim\.max_norm is for linear heads"):
        load_config("cifar100-lt", ["model.head=cosine", "optim.max_norm=0.1"])
    with pytest.raises(UserError, match=r"schedule\.shift_bn is for epochs of the head alone"):
        load_config("cifar100-lt", ["schedule.shift_bn=true"])


def test_epochs_that_never_come_are_told():
    assert never_reached(load_config("cifar100-lt", ["train.epochs=160"])) == [
        "schedule.steps 160",
        "schedule.steps 180",
    ]
    assert never_reached(load_config("cifar100-lt")) == []


@pytest.mark.parametrize("epochs", ["20", '"20"', "20.0"])
def test_epochs_however_they_are_written_reach_the_method(epochs):
    config = load_config(
        "cifar100-lt", [f"train.epochs={epochs}"], method_settings("ldam-drw", None)
    )
    assert config.train.epochs == 20 and config.loss.drw_epoch == 16
    second = load_config("cifar100-lt", [f"train.epochs={epochs}"], method_settings("crt", "run"))
    assert second.train.epochs == second.schedule.head_only_epochs == 20


@pytest.mark.parametrize("epochs", [2, 3, 5])
def test_deferred_weights_come_in_short_runs_too(epochs):
    config = load_config(
        "cifar100-lt", [f"train.epochs={epochs}"], method_settings("ldam-drw", None)
    )
    assert 0 < config.loss.drw_epoch < epochs


def test_a_second_stage_needs_the_same_targets_and_kind_of_head(small_pack, tmp_path):
    small = [
        "model.name=resnet8",
        "data.size=16",
        "data.batch=16",
        "data.workers=0",
        "train.epochs=1",
        "train.threads=1",
        f"data.pack={json.dumps(str(small_pack))}",
    ]
    first = load_config("cifar100-siblings", small, method_settings("ldam-drw", None))
    train(first, tmp_path / "ldam", Console(quiet=True))
    with pytest.raises(
        UserError, match=r"has a cosine head, which is no start for model\.head=scaled"
    ):
        train(
            load_config("cifar100-siblings", small, method_settings("lws", str(tmp_path / "ldam"))),
            tmp_path / "b",
            Console(quiet=True),
        )
    train(
        load_config("cifar100-siblings", small, method_settings("ce", None)),
        tmp_path / "ce",
        Console(quiet=True),
    )
    space = open_pack(small_pack).space
    other = space.model_copy(update={"target_names": ["a", "b", "other"]})
    with pytest.raises(UserError, match="was trained for other targets"):
        check_head_weights(
            load_config("cifar100-siblings", small, method_settings("lws", str(tmp_path / "ce"))),
            other,
        )
    check_head_weights(
        load_config("cifar100-siblings", small, method_settings("lws", str(tmp_path / "ce"))), space
    )
