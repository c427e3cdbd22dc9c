import pickle

import pytest
import torch

from fastlt.classes import ClassSpace
from fastlt.config import OptimConfig
from fastlt.errors import UserError
from fastlt.models.backbones import CifarResNet
from fastlt.models.classifier import Classifier
from fastlt.models.heads import LinearHead
from fastlt.training import checkpoint as ckpt
from fastlt.training.optim import build_optimizer

SPACE = ClassSpace(target_names=["a", "b"], train_counts=[5, 5], val_counts=[1, 1])


def stepped(seed, name="sgd", channels_last=False):
    """A model after two optimiser steps."""
    torch.manual_seed(seed)
    model = Classifier(CifarResNet(8), LinearHead(64, 4))
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    optimizer = build_optimizer(OptimConfig(name=name), model, 8)
    for _ in range(2):
        model(torch.rand(4, 3, 16, 16)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_restored_run_takes_the_same_step_bit_for_bit(tmp_path, name, channels_last):
    model, optimizer = stepped(0, name, channels_last)
    ckpt.write_checkpoint(
        tmp_path,
        2,
        ckpt.snapshot(model, optimizer, None),
        {"class_space": ckpt.class_space_id(SPACE)},
        keep=2,
    )
    other, other_optimizer = stepped(1, name, channels_last)
    ckpt.load_checkpoint(ckpt.checkpoints(tmp_path)[-1], other, other_optimizer)
    images = torch.rand(4, 3, 16, 16)
    for net, optim in ((model, optimizer), (other, other_optimizer)):
        net(images).square().sum().backward()
        optim.step()
    for (key, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    for parameter, twin in zip(model.parameters(), other.parameters(), strict=True):
        for key, value in optimizer.state[parameter].items():
            if value is not None:
                assert torch.equal(value, other_optimizer.state[twin][key])
                assert value.stride() == other_optimizer.state[twin][key].stride()


def test_only_the_last_ones_are_kept_and_nothing_partial_stays(tmp_path):
    model, optimizer = stepped(0)
    for step in (1, 2, 3):
        ckpt.write_checkpoint(tmp_path, step, ckpt.snapshot(model, optimizer, None), {}, keep=2)
    assert [path.name for path in ckpt.checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    (tmp_path / "checkpoints" / ".step-00000004.ab12.partial").mkdir()
    ckpt.remove_leftovers(tmp_path)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_another_class_space_is_refused(tmp_path):
    other = ClassSpace(target_names=["b", "a"], train_counts=[5, 5], val_counts=[1, 1])
    state = {"class_space": ckpt.class_space_id(SPACE), "pack": "a"}
    ckpt.check_pack(tmp_path, state, SPACE, "a")
    with pytest.raises(UserError, match="another class space"):
        ckpt.check_pack(tmp_path, state, other, "b")
    with pytest.raises(UserError, match="the pack has changed"):
        ckpt.check_pack(tmp_path, state, SPACE, "b")


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a foreign file ran code",))


def test_a_foreign_file_never_runs_code(tmp_path):
    model, optimizer = stepped(0)
    ckpt.write_checkpoint(tmp_path, 1, ckpt.snapshot(model, optimizer, None), {}, keep=1)
    path = ckpt.checkpoints(tmp_path)[0]
    (path / "model.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(UserError, match="damaged"):
        ckpt.load_checkpoint(path, model)
    torch.save({"x": Bomb()}, path / "model.safetensors")
    with pytest.raises(UserError, match="damaged"):
        ckpt.load_checkpoint(path, model)


def test_a_model_of_another_shape_is_refused(tmp_path):
    model, optimizer = stepped(0)
    ckpt.write_checkpoint(tmp_path, 1, ckpt.snapshot(model, optimizer, None), {}, keep=1)
    with pytest.raises(UserError, match="does not fit"):
        ckpt.load_checkpoint(
            ckpt.checkpoints(tmp_path)[0], Classifier(CifarResNet(14), LinearHead(64, 4))
        )
