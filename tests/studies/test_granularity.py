"""Granularity of features that are made up, against plain loops, and of a real run."""

import json

import numpy as np
import pytest
from rich.console import Console

from fastlt.classes import ClassSpace
from fastlt.config import load_config
from fastlt.errors import UserError
from fastlt.evaluation.feature_settings import FeatureSettings
from fastlt.studies.granularity import medoids, run_granularity, score, structure
from fastlt.training.loop import train


def blobs(centres, spread, count, rng):
    """(classes * count, D) of length 1 and labels, around centres (classes, D)."""
    labels = np.repeat(np.arange(len(centres)), count)
    vectors = centres[labels] + spread * rng.normal(size=(len(labels), centres.shape[1]))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16), labels


@pytest.mark.parametrize("seed", range(3))
def test_the_score_is_that_of_plain_loops(seed):
    rng = np.random.default_rng(seed)
    features, labels = blobs(rng.normal(size=(7, 5)), 0.8, 9, rng)
    found, f = score(features, labels), features.astype(np.float64)
    centres = []
    for label in range(7):
        members = f[labels == label]
        centres.append(members[int(np.argmax([sum(a @ b for b in members) for a in members]))])
    ranks = [
        np.mean(
            [
                sum(1 - f[i] @ c < 1 - f[i] @ centres[k] - 1e-9 for c in centres) / 6
                for i in np.flatnonzero(labels == k)
            ]
        )
        for k in range(7)
    ]
    assert found.granularity == pytest.approx(1 - np.mean(ranks), abs=1e-3) and found.classes == 7
    apart = [min(1 - a @ b for j, b in enumerate(centres) if i != j) for i, a in enumerate(centres)]
    assert found.between == pytest.approx(np.mean(apart), abs=1e-3)


def test_finer_classes_score_lower_and_labels_that_say_nothing_a_half():
    rng = np.random.default_rng(0)
    coarse = rng.normal(size=(6, 32))
    fine = np.repeat(coarse, 4, axis=0) + 0.35 * rng.normal(size=(24, 32))
    features, labels = blobs(fine, 0.6, 40, rng)
    by_parent, by_class = score(features, labels // 4), score(features, labels)
    assert (
        by_parent.granularity
        > by_class.granularity
        > score(features, rng.permutation(labels)).granularity
    )
    assert by_parent.ratio < by_class.ratio
    assert score(features, rng.permutation(labels)).granularity == pytest.approx(0.5, abs=0.1)
    apart, labels = blobs(10 * rng.normal(size=(5, 32)), 0.1, 20, rng)
    assert score(apart, labels).granularity == 1


def test_numbers_of_classes_and_of_images_may_be_any():
    features = np.eye(3, dtype=np.float16)[[0, 0, 1, 2]]
    assert score(features, np.array([5, 5, 9, 70])).classes == 3
    np.testing.assert_array_equal(medoids(features, np.array([0, 0, 1, 2])), np.eye(3))
    with pytest.raises(UserError, match="needs two classes"):
        score(features, np.zeros(4, int))


def test_what_lies_between_is_nearer_to_both():
    angles = np.radians([0, 40, 20, 90, 200])  # a, b; x between them, y beside, z far
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float16)
    space = ClassSpace(
        target_names=["a", "b"],
        auxiliary_names=["x", "y", "z"],
        train_counts=[1] * 5,
        val_counts=[1, 1],
    )
    (pair,) = structure(features, np.arange(5), space)
    assert (pair.target, pair.nearest, pair.auxiliary) == ("a", "b", "x")
    assert (
        pair.distance == pytest.approx(1 - np.cos(np.radians(40)), abs=1e-3) and pair.confused == 0
    )
    (pair,) = structure(features[[0, 1, 3, 4]], np.array([0, 1, 3, 4]), space)
    assert pair.auxiliary == "" and pair.to_both is None


def test_images_nearer_to_the_other_medoid_are_confused():
    # of the first five two lie with the others
    angles = np.radians([0, 1, -1, 30, 31, 40, 41, 39, 38])
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float16)
    space = ClassSpace(target_names=["a", "b"], train_counts=[5, 4], val_counts=[1, 1])
    (pair,) = structure(features, np.array([0] * 5 + [1] * 4), space)
    assert pair.confused == pytest.approx((2 / 5 + 0) / 2)


def test_a_pack_by_the_features_of_a_run(small_pack, tmp_path):
    config = load_config(
        "demo", [f"data.pack={small_pack}", "train.epochs=1", "data.size=16", "data.batch=8"]
    )
    train(config, tmp_path / "run", Console(quiet=True))
    console = Console(record=True, width=160)
    (tmp_path / "h.csv").write_text("class,parent\na,p\nb,p\nc,q\n")
    settings = FeatureSettings(weights=str(tmp_path / "run"))
    run_granularity(
        str(small_pack), settings, str(tmp_path / "h.csv"), tmp_path / "g.json", console
    )
    told = json.loads((tmp_path / "g.json").read_text())
    assert {name: of["classes"] for name, of in told["scores"].items()} == {
        "targets": 3,
        "parents": 2,
        "targets and auxiliaries": 5,
    }
    said = console.export_text()
    assert "nearest targets" in said and "pairs of nearest targets" in said
    (tmp_path / "h.csv").write_text("class,parent\na,p\n")
    with pytest.raises(UserError, match="has no parent of 'b', and of 1 more"):
        run_granularity(str(small_pack), settings, str(tmp_path / "h.csv"), None, console)
