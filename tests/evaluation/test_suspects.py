"""Images that look as if they were of another class."""

import pytest
import torch

from fastlt.evaluation.probe import Labelled
from fastlt.evaluation.suspects import NOT_SUSPECTED, confident, probabilities


def clusters(seed, classes=5, each=20, spread=0.3):
    draw = torch.Generator().manual_seed(seed)
    means = torch.randn(classes, 16, generator=draw)
    labels = torch.arange(classes).repeat_interleave(each)
    return means[labels] + spread * torch.randn(len(labels), 16, generator=draw), labels


def test_an_image_has_no_vote_about_itself():
    features, labels = clusters(0)
    found = probabilities(Labelled(features, labels), 5, k=3)
    unit = torch.nn.functional.normalize(features)
    for place in (0, 7, 99):
        alike = unit @ unit[place]
        alike[place] = -2
        nearest = alike.topk(3)
        weights = (nearest.values / 0.07).exp()
        wanted = torch.zeros(5).index_add_(0, labels[nearest.indices], weights)
        torch.testing.assert_close(found[place], wanted / wanted.sum())


@pytest.mark.parametrize("seed", range(4))
def test_planted_labels_are_found(seed):
    features, labels = clusters(seed)
    draw = torch.Generator().manual_seed(seed)
    planted = torch.randperm(len(labels), generator=draw)[:8]
    given = labels.clone()
    given[planted] = (labels[planted] + 1) % 5
    found = confident(given, probabilities(Labelled(features, given), 5))
    suspected = set(found.places.tolist())
    assert len(suspected & set(planted.tolist())) >= 7 and len(suspected) <= 9
    for place in suspected & set(planted.tolist()):
        assert found.instead[place] == labels[place]
    assert found.confidence[found.places].diff().max() <= 0


def test_the_rule_is_that_of_the_paper():
    found = torch.tensor([[0.9, 0.1, 0.0], [0.3, 0.7, 0.0], [0.2, 0.8, 0.0], [0.45, 0.55, 0.0]])
    labels = torch.tensor([0, 0, 1, 1])  # the means of their own are 0.6 and 0.675
    suspects = confident(labels, found)
    assert suspects.instead.tolist() == [NOT_SUSPECTED, 1, NOT_SUSPECTED, NOT_SUSPECTED]
    alone = confident(torch.tensor([0, 0, 2]), found[:3])  # a class of one image suspects nothing
    assert alone.instead.tolist() == [NOT_SUSPECTED] * 3
