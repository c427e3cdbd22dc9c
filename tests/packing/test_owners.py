"""What studies change of auxiliary classes: their targets, and how clean they are."""

import numpy as np
import pytest

from fastlt.errors import UserError
from fastlt.packing.collect import collect
from fastlt.packing.collection import Collection, ImageRef
from fastlt.packing.owners import limit_owners, overlap


def images(name, path, counts, first=0):
    return [
        ImageRef(f"{name}{i}/{path}{n}", first + i, path, n)
        for i, count in enumerate(counts)
        for n in range(count)
    ]


def made(counts=(3, 1, 2), unused=(4, 0, 6), auxiliary=10):
    """Targets with `counts` images, and two auxiliaries: of all of them, and of the last."""
    first = len(counts)
    targets = [f"t{i}" for i in range(first)]
    refs = images("t", "x", counts)
    rest = images("t", "u", unused)
    more = images("a", "a", (auxiliary, auxiliary), first)
    pairs = [(i, first) for i in range(first)] + [(first - 1, first + 1)]
    return Collection(targets, refs + more, list(rest), ["a0", "a1"], pairs, unused=rest)


EVERY = {0, 1, 2}


@pytest.mark.parametrize(("most", "owners"), [(1, {1}), (2, {1, 2}), (3, EVERY), (9, EVERY)])
def test_the_targets_with_the_fewest_images_are_kept(most, owners):
    collection = made()
    limit_owners(collection, most)
    assert {target for target, auxiliary in collection.pairs if auxiliary == 3} == owners
    assert (2, 4) in collection.pairs and collection.pairs == sorted(collection.pairs)


def test_images_of_targets_take_the_place_of_a_share():
    collection = made()
    before = {ref.key for ref in collection.unused}
    overlap(collection, 0.3)
    for auxiliary, sources in ((3, {"t0", "t2"}), (4, {"t2"})):
        images = [ref for ref in collection.train if ref.label == auxiliary]
        strange = [ref for ref in images if ref.path == "u"]
        assert len(images) == 10 and len(strange) == 3
        assert {ref.key.split("/")[0] for ref in strange} == sources
    taken = {ref.key for ref in collection.train if ref.path == "u"}
    assert len(taken) == 6 and taken <= before
    # what is trained on is not validated on
    assert {ref.key for ref in collection.val} == before - taken
    assert {ref.key for ref in collection.unused} == before - taken


def test_where_there_are_too_few_that_is_noted():
    collection = made()
    overlap(collection, 0.6)
    assert sum(ref.path == "u" for ref in collection.train) == 9  # six, and what they left
    assert collection.warnings == [
        "1 auxiliary classes have less overlap, as their targets have no images left: a1"
    ]
    with pytest.raises(UserError, match="no target of an auxiliary class has images"):
        overlap(made(unused=(0, 0, 0)), 0.6)


def test_the_deep_task(shared_data):
    place = shared_data / "cifar100"
    if not place.is_dir():
        pytest.skip("CIFAR-100 is not here")
    found = collect(f"cifar100:{place}", task="cifar100-deep")
    assert (len(found.target_names), len(found.auxiliary_names), len(found.pairs)) == (20, 80, 80)
    rank = np.random.RandomState(0).permutation(20)
    counts = [sum(ref.label == i for ref in found.train) for i in range(20)]
    assert counts == [int(500 * 0.01 ** (rank[i] / 19)) for i in range(20)]
    first = [ref.part for ref in found.train if ref.label == 3]
    assert first == list(range(len(first)))  # the first of the strip
    random = collect(f"cifar100:{place}", task="cifar100-deep", auxiliary="random")
    assert {*random.auxiliary_names} == {*found.auxiliary_names}
    ours, theirs = (
        {one.auxiliary_names[auxiliary - 20]: target for target, auxiliary in one.pairs}
        for one in (random, found)
    )
    assert all(ours[name] != theirs[name] for name in ours)
    clean = collect(f"cifar100:{place}", task="cifar100-siblings")
    dirty = collect(f"cifar100:{place}", task="cifar100-siblings", overlap=0.1)
    assert len(clean.train) == len(dirty.train)
    changed = [a for a, b in zip(clean.train, dirty.train, strict=True) if a != b]
    assert len(changed) == 30 * 50 and all(ref.label >= 20 for ref in changed)
