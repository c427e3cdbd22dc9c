"""Packs of some images of another one, under other labels."""

import numpy as np
import pytest
from rich.console import Console

from fastlt.config import load_config
from fastlt.packing.reader import open_pack, picture
from fastlt.packing.relabel import Selection, derive_pack
from fastlt.packing.writer import verify_pack
from fastlt.training.loop import train


def chosen(split, of):
    """of: label of the pack -> new label."""
    images = np.flatnonzero(np.isin(split.label, list(of)))[::-1]
    return Selection(images, np.array([of[int(label)] for label in split.label[images]]))


@pytest.fixture
def derived(small_pack, tmp_path):
    pack = open_pack(small_pack)
    of = {0: 1, 1: 1, 2: 0}  # a and b together, and c
    return pack, derive_pack(
        pack, tmp_path / "derived", ["c", "ab"], chosen(pack.train, of), chosen(pack.val, of)
    )


def test_images_are_the_same_and_labels_are_others(derived):
    pack, place = derived
    found = open_pack(place)
    assert verify_pack(place) == len(found.manifest["files"]) and found.space.target_names == [
        "c",
        "ab",
    ]
    assert found.space.train_counts == [3, 18] and found.id != pack.id
    own = chosen(pack.train, {0: 1, 1: 1, 2: 0})
    for i in range(len(found.train)):
        assert (
            picture(found.train, i).tobytes() == picture(pack.train, int(own.images[i])).tobytes()
        )
        assert found.train.label[i] == own.labels[i]
    assert all((place / "train" / shard).is_symlink() for shard in found.train.shards)


def test_it_is_trained_on_like_any_other_and_may_be_moved_with_the_pack(derived, tmp_path):
    _, place = derived
    config = load_config(
        "demo",
        [f"data.pack={place}", "train.epochs=1", "data.size=16", "data.batch=8", "loss.name=ce"],
    )
    result = train(config, tmp_path / "run", Console(quiet=True))
    assert len(result["per_class"]) == 2
