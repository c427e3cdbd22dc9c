import importlib.util

import pytest
import torch

from fastlt.config import OptimConfig, ScheduleConfig, load_config
from fastlt.errors import UserError
from fastlt.models.backbones import CifarResNet
from fastlt.models.classifier import Classifier
from fastlt.models.heads import LinearHead
from fastlt.training.optim import Averaged, build_optimizer, lr_factor, set_lr


def classifier():
    torch.manual_seed(0)
    return Classifier(CifarResNet(8), LinearHead(64, 10))


def test_the_published_cifar_schedule():
    factor = lr_factor(
        ScheduleConfig(name="step", warmup_epochs=5, steps={"160": 0.01, "180": 0.0001}), 200
    )
    assert [factor(epoch) for epoch in (0, 0.9, 1, 4, 5, 159.9, 160, 179, 180, 199)] == [
        0.2,
        0.2,
        0.4,
        1.0,
        1.0,
        1.0,
        0.01,
        0.01,
        0.0001,
        0.0001,
    ]


def test_a_broken_number_of_warm_up_epochs_never_overshoots():
    factor = lr_factor(ScheduleConfig(name="step", warmup_epochs=2.5, steps={"9": 0.1}), 10)
    assert [factor(epoch) for epoch in (0, 1, 2, 3)] == [0.4, 0.8, 1.0, 1.0]


def test_cosine_with_warm_up():
    factor = lr_factor(ScheduleConfig(name="cosine", warmup_epochs=10, final_lr=0.1), 110)
    assert [factor(0), factor(5), factor(10)] == [0, 0.5, 1]
    assert factor(60) == pytest.approx(0.55)
    assert factor(110) == pytest.approx(0.1)


def test_one_cycle_is_torchs():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], 0.1)
    steps = 1000
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.1, total_steps=steps + 1, cycle_momentum=False
    )
    ours = lr_factor(ScheduleConfig(name="one-cycle"), 10)
    for step in range(0, steps):
        assert 0.1 * ours(10 * step / steps) == pytest.approx(theirs.get_last_lr()[0], abs=5e-4)
        optimizer.step()
        theirs.step()


def test_the_base_rate_scales_with_the_batch():
    optimizer = build_optimizer(OptimConfig(lr=1e-3, lr_base_batch=256), classifier(), 1024)
    set_lr(optimizer, 0.5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(2e-3)
    accumulated = build_optimizer(
        OptimConfig(lr=1e-3, lr_base_batch=256, accumulate=4), classifier(), 256
    )
    assert accumulated.param_groups[0]["base_lr"] == pytest.approx(4e-3)


def test_averaged_weights_forget_the_start_and_follow():
    model = classifier()
    average = Averaged(model, 0.9999)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0)
        model.backbone.bn1.running_mean.fill_(2.0)
        for step in range(1, 200):
            average.update(model, step)
    for parameter in average.average.parameters():
        torch.testing.assert_close(parameter, torch.ones_like(parameter), rtol=0, atol=1e-3)
    torch.testing.assert_close(
        average.average.backbone.bn1.running_mean, torch.full((16,), 2.0), rtol=0, atol=1e-2
    )


def test_timm_parameters_that_want_no_decay_get_none():
    backbone = vit()
    for decay in (0.75, 1.0):
        optimizer = build_optimizer(
            OptimConfig(name="adamw", weight_decay=0.05, layer_decay=decay),
            Classifier(backbone, LinearHead(192, 10)),
            8,
        )
        decays = {
            id(p): group["weight_decay"]
            for group in optimizer.param_groups
            for p in group["params"]
        }
        assert decays[id(backbone.pos_embed)] == decays[id(backbone.cls_token)] == 0
        assert decays[id(backbone.blocks[0].mlp.fc1.weight)] == 0.05


def vit():
    from fastlt.utils import torchvision_shim

    if importlib.util.find_spec("timm") is None:
        pytest.skip("layer decay is for timm backbones, which are an extra")
    torchvision_shim.make_importable()
    import timm

    return timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32)


def test_adamw_spares_vectors_and_sgd_decays_all():
    adamw = build_optimizer(OptimConfig(name="adamw", weight_decay=0.05), classifier(), 128)
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.05, 0.0]
    assert all(p.ndim <= 1 for p in adamw.param_groups[1]["params"])
    sgd = build_optimizer(OptimConfig(weight_decay=2e-4), classifier(), 128)
    assert sum(p.numel() for g in sgd.param_groups for p in g["params"]) == sum(
        p.numel() for p in classifier().parameters()
    )


def test_layer_decay_falls_towards_the_input():
    backbone = vit()
    model = Classifier(backbone, LinearHead(192, 10))
    optimizer = build_optimizer(OptimConfig(name="adamw", lr=1.0, layer_decay=0.75), model, 128)
    rate = {id(p): group["base_lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rate) == len(list(model.parameters()))
    assert rate[id(model.head.weight)] == 1
    assert rate[id(backbone.blocks[11].mlp.fc1.weight)] == pytest.approx(0.75)
    assert rate[id(backbone.blocks[0].mlp.fc1.weight)] == pytest.approx(0.75**12)
    assert rate[id(backbone.patch_embed.proj.weight)] == pytest.approx(0.75**13)


@pytest.mark.parametrize("name", ["cosine", "step", "one-cycle"])
def test_the_rate_of_head_only_epochs_is_scaled_and_then_what_it_would_be(name):
    steps = {"9": 0.1} if name == "step" else {}
    plain = lr_factor(ScheduleConfig(name=name, steps=steps), 10)
    config = ScheduleConfig(name=name, steps=steps, head_only_epochs=3, head_only_lr=60)
    scaled = lr_factor(config, 10)
    assert [scaled(epoch) / plain(epoch) for epoch in (0.5, 2.99)] == pytest.approx([60, 60])
    assert [scaled(epoch) for epoch in (3, 9.5)] == [plain(epoch) for epoch in (3, 9.5)]


def test_a_rate_of_epochs_that_there_are_not_is_refused():
    with pytest.raises(UserError, match=r"head_only_lr is for epochs of the head alone"):
        load_config("cifar100-lt", ["schedule.head_only_lr=60"])
