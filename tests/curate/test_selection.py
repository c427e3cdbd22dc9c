"""Which images are kept, told by hashes and features that are made up."""

import numpy as np
import pytest
import torch

from fastlt.curate.image_index import ImageIndex
from fastlt.curate.selection import give_up_small_classes, select_images
from fastlt.curate.settings import FilterConfig
from fastlt.packing.hashes import Hashes
from fastlt.packing.reader import open_pack

CPU = torch.device("cpu")
EAST, NORTH, UP = np.eye(3)


@pytest.fixture
def build_index(hued_pack):
    rng = np.random.default_rng(0)

    def make(features, labels, bits=None, exact=None):
        """Images that are all different but for what is told."""
        vectors = np.array(
            [vector / np.linalg.norm(vector) for vector in features], np.float16
        ).reshape(-1, 3)
        count = len(vectors)
        split = open_pack(hued_pack).train.subset(np.arange(count))
        split.label[:] = labels
        seen = np.array(bits if bits is not None else rng.integers(0, 2**63, count), np.uint64)
        digests = (
            exact
            if exact is not None
            else [bytes(rng.integers(0, 256, 32, np.uint8)) for _ in range(count)]
        )
        return ImageIndex(split, Hashes(digests, seen, ~seen, np.ones(count, bool)), vectors)

    return make


def reasons(index, known=None, owners=((0,),), **settings):
    return select_images(index, known or {}, owners, FilterConfig(**settings), CPU).reasons


def test_of_a_chain_of_duplicates_those_like_a_kept_one_are_dropped(build_index):
    """The second is like the first, the third like the second alone: it stays."""
    turned = [np.cos(a) * EAST + np.sin(a) * NORTH for a in (0, 0.15, 0.3)]
    assert reasons(build_index(turned, 0), gamma2=0.98) == ["", "duplicate: the same features", ""]
    assert reasons(build_index(turned, 0), gamma2=1.5) == ["", "", ""]
    bits = [0b0, 0b111, 0b111111]
    assert reasons(build_index([EAST] * 3, 0, bits), gamma2=1.5, hash_distance=3) == [
        "",
        "duplicate: the same look",
        "",
    ]
    assert reasons(build_index([EAST] * 3, 0, bits), gamma2=1.5, hash_distance=-1) == ["", "", ""]


def test_the_bytes_of_a_leak_are_no_earlier_image(build_index):
    """What is dropped as a leak does not make others duplicates; they are leaks themselves."""
    digests = [b"a" * 32, b"a" * 32, b"b" * 32, b"b" * 32]
    known = {"training": build_index([UP], 0, exact=[b"a" * 32])}
    assert reasons(build_index([EAST] * 4, 0, exact=digests), known, gamma2=1.5) == [
        "leak: the bytes of a training image",
        "leak: the bytes of a training image",
        "",
        "duplicate: the same bytes",
    ]


def test_a_copy_in_the_wrong_class_does_not_cost_the_right_one(build_index):
    index = build_index(
        [EAST, NORTH, NORTH, NORTH, EAST, EAST, EAST],
        [1, 1, 1, 1, 0, 0, 0],
        exact=[b"a" * 32, *[bytes([i]) * 32 for i in range(3)], b"a" * 32, b"x" * 32, b"y" * 32],
    )
    found = reasons(index, owners=[(0,), (0,)], gamma2=1.5, hash_distance=-1)
    assert found == ["unlike its class", *[""] * 6]


def test_leaks_by_look_and_by_features_name_whose_they_are(build_index):
    known = {"training": build_index([UP], 0, [0b1]), "test": build_index([EAST + 0.05 * NORTH], 0)}
    index = build_index([EAST, NORTH + EAST, NORTH + EAST + 0.3 * UP], 0, [1 << 20, 0b11, 1 << 40])
    verdicts = select_images(
        index, known, [(0,)], FilterConfig(gamma1=-1, gamma2=0.99, hash_distance=1), CPU
    )
    assert verdicts.reasons == [
        "leak: the features of a test image",
        "leak: the look of a training image",
        "",
    ]
    assert all("train-000000.tar:" in of for of in verdicts.of[:2])


def test_gamma1_is_the_cosine_to_the_prototype_of_the_class(build_index):
    index = build_index([*[EAST] * 8, NORTH + 2 * EAST, NORTH, UP, UP, UP], [*[0] * 10, 1, 1, 1])
    verdicts = select_images(
        index, {}, [(0,), (0,)], FilterConfig(gamma2=1.5, gamma1=0.7, hash_distance=-1), CPU
    )
    assert verdicts.reasons == [*[""] * 9, "unlike its class", "", "", ""]
    assert verdicts.likeness[8] == pytest.approx(2 / 5**0.5, abs=2e-3)


@pytest.mark.parametrize(
    ("kind", "dropped"), [("retrieved", []), ("targets", [0, 1]), ("both", [0, 1])]
)
def test_prototypes_may_be_of_the_owners_images(build_index, kind, dropped):
    known = {"training": build_index([UP] * 5 + [NORTH], [0] * 5 + [1])}
    index = build_index([EAST, EAST, NORTH, NORTH], [0, 0, 1, 1])
    found = reasons(index, known, [(0,), (1,)], gamma2=1.5, prototype=kind, hash_distance=-1)
    assert [image for image, reason in enumerate(found) if reason] == dropped


def test_classes_with_too_few_images_are_given_up_with_all_of_them(build_index):
    verdicts = select_images(
        build_index([EAST] * 5, [0, 0, 0, 1, 1]),
        {},
        [(0,), (0,)],
        FilterConfig(gamma2=1.5, hash_distance=-1),
        CPU,
    )
    give_up_small_classes(verdicts, np.array([0, 0, 0, 1, 1]), 3)
    assert verdicts.reasons == ["", "", "", *["too few images of its class are left"] * 2]
    assert verdicts.kept.tolist() == [0, 1, 2]
