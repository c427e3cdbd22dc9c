"""Heads: what each is for the targets alone, and what it says of itself."""

import pytest
import torch
import torch.distributed as dist

from fastlt.config import config_type
from fastlt.models.heads import HEADS, section

FEATURES, CLASSES, TARGETS = 6, 9, 4


@pytest.fixture
def group():
    """A process group of this process alone, as class-parallel heads need one."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("name", HEADS)
def test_a_head_of_the_targets_predicts_their_logits(name, group):
    torch.manual_seed(0)
    head = HEADS[name].build(section()(head=name), FEATURES, CLASSES)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.rand_like(parameter))
    features = torch.randn(5, FEATURES)
    head(3 * features + 1)  # statistics of batch norm move
    head.eval()
    logits = features @ head.weight.T + head.bias if head.is_sharded else head(features)
    targets = head.eval().of_targets(TARGETS)
    assert type(targets) is HEADS[head.exported_as]
    assert targets.weight.shape == (TARGETS, FEATURES)
    torch.testing.assert_close(targets(features), logits[:, :TARGETS])


def test_numbers_of_heads_are_settings_with_a_meaning():
    fields = section().model_fields
    assert fields["head_scale"].default == 30.0 and fields["scale_alone"].default is False
    assert all(field.description for field in fields.values())


def test_settings_of_one_head_are_refused_with_another():
    with pytest.raises(ValueError, match=r"scale_alone is for model.head=scaled"):
        config_type()(model={"scale_alone": True})
    with pytest.raises(ValueError, match=r"head_scale_learnt is for model.head=cosine"):
        config_type()(model={"head_scale_learnt": True})
    with pytest.raises(ValueError, match="there is no head 'cosin', did you mean 'cosine'"):
        config_type()(model={"head": "cosin"})


def test_a_learnt_scale_has_a_gradient_and_is_exported_as_a_number():
    head = HEADS["cosine"].build(
        section()(head="cosine", head_scale=8.0, head_scale_learnt=True), FEATURES, CLASSES
    )
    head(torch.randn(5, FEATURES)).square().sum().backward()
    assert head.log_scale.grad is not None and head.log_scale.grad != 0
    with torch.no_grad():
        head.log_scale.add_(0.5)
    told = head.exported()
    assert told["head_scale"] == pytest.approx(8 * 2.71828**0.5, rel=1e-4)
    assert not told["head_scale_learnt"]
    again = HEADS["cosine"].build(section()(**told), FEATURES, TARGETS)
    again.load_state_dict(head.of_targets(TARGETS).state_dict())
    features = torch.randn(5, FEATURES)
    torch.testing.assert_close(again(features), head(features)[:, :TARGETS])
