"""Prototypes and near-duplicates, against all pairs at once."""

import numpy as np
import pytest
import torch

from fastlt.curate import features as deep
from fastlt.curate.features import later_copies, nearest, robust_mean
from fastlt.curate.settings import FilterConfig
from fastlt.errors import UserError
from fastlt.evaluation.features import open_backbone

CPU = torch.device("cpu")


def directions(count, size, rng):
    vectors = rng.normal(size=(count, size)).astype(np.float32)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


@pytest.fixture(params=[(7, 5), (64, 64), (1000, 1000), (13, 1000)])
def blocks(request, monkeypatch):
    monkeypatch.setattr(deep, "ROWS", request.param[0])
    monkeypatch.setattr(deep, "COLUMNS", request.param[1])


def test_the_nearest_is_that_of_the_whole_matrix_whatever_the_blocks(blocks):
    rng = np.random.default_rng(1)
    queries, known = directions(97, 8, rng), directions(150, 8, rng)
    similar = queries.astype(np.float32) @ known.astype(np.float32).T
    wanted = {row: int(similar[row].argmax()) for row in range(97) if similar[row].max() >= 0.8}
    assert 0 < len(wanted) < 97
    assert dict(nearest(queries, known, 0.8, CPU)) == wanted
    assert not list(nearest(queries, known[:0], 0.8, CPU))


def test_copies_are_those_of_an_earlier_one_that_is_none_itself(blocks):
    features = directions(300, 6, np.random.default_rng(2))
    similar = features.astype(np.float32) @ features.astype(np.float32).T >= 0.85
    kept: list[int] = []
    for image in range(300):
        if not similar[image, kept].any():
            kept.append(image)
    found = dict(later_copies(features, 0.85, CPU))
    assert sorted(set(range(300)) - found.keys()) == kept and len(kept) < 300
    assert all(
        earlier < image and earlier in kept and similar[image, earlier]
        for image, earlier in found.items()
    )


def test_thousands_that_are_alike_are_copies_of_the_first(blocks):
    features = np.repeat(directions(1, 8, np.random.default_rng(3)), 3000, axis=0)
    assert dict(later_copies(features, 0.98, CPU)) == dict.fromkeys(range(1, 3000), 0)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.45])
def test_the_prototype_stays_with_the_majority(share):
    rng = np.random.default_rng(0)
    centre = rng.normal(size=64)
    centre /= np.linalg.norm(centre)
    other = rng.normal(size=64)
    other /= np.linalg.norm(other)
    wrong = round(200 * share)
    members = np.concatenate(
        [
            centre + 0.05 * rng.normal(size=(200 - wrong, 64)),
            other + 0.05 * rng.normal(size=(wrong, 64)),
        ]
    )
    members /= np.linalg.norm(members, axis=1, keepdims=True)
    found = robust_mean(rng.permutation(members).astype(np.float16))
    assert found @ centre > 0.99 and np.linalg.norm(found) == pytest.approx(1)


def test_of_few_images_there_is_a_prototype_too():
    one = directions(1, 8, np.random.default_rng(0))
    np.testing.assert_allclose(robust_mean(one), one[0], atol=1e-3)


def test_weights_that_are_not_there_are_an_error(tmp_path):
    with pytest.raises(UserError, match=r"there is no file .* with weights"):
        open_backbone(FilterConfig(weights=str(tmp_path / "nowhere.safetensors")))
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        open_backbone(FilterConfig(weights=str(tmp_path)))
