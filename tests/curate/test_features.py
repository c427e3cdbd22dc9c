"""Prototypes and near-duplicates, against all pairs at once."""

import numpy as np
import pytest
import torch

from fastlt.curate import features as deep
from fastlt.curate.features import near_pairs, open_backbone, robust_mean
from fastlt.curate.settings import FilterConfig
from fastlt.errors import UserError

CPU = torch.device("cpu")


def directions(count, size, rng):
    vectors = rng.normal(size=(count, size)).astype(np.float32)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)


@pytest.mark.parametrize(("rows", "columns"), [(7, 5), (64, 64), (1000, 1000), (13, 1000)])
@pytest.mark.parametrize("earlier", [False, True])
def test_pairs_are_those_of_the_whole_matrix_whatever_the_blocks(monkeypatch, rows, columns, earlier):
    monkeypatch.setattr(deep, "ROWS", rows)
    monkeypatch.setattr(deep, "COLUMNS", columns)
    rng = np.random.default_rng(rows)
    known = directions(150, 8, rng)
    queries = known if earlier else directions(97, 8, rng)
    similar = queries.astype(np.float32) @ known.astype(np.float32).T
    wanted = similar >= 0.6
    if earlier:
        wanted = np.tril(wanted, -1)
    found, cosines = (np.concatenate(part) for part in zip(*near_pairs(queries, known, 0.6, CPU, earlier), strict=True))
    assert {tuple(pair) for pair in found.tolist()} == {tuple(pair) for pair in np.argwhere(wanted).tolist()}
    np.testing.assert_allclose(cosines, similar[found[:, 0], found[:, 1]], atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.45])
def test_the_prototype_stays_with_the_majority(share):
    rng = np.random.default_rng(0)
    centre = rng.normal(size=64)
    centre /= np.linalg.norm(centre)
    other = rng.normal(size=64)
    other /= np.linalg.norm(other)
    wrong = round(200 * share)
    members = np.concatenate([centre + 0.05 * rng.normal(size=(200 - wrong, 64)), other + 0.05 * rng.normal(size=(wrong, 64))])
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
