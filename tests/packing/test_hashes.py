"""What two images have in common, by their bytes and by their looks."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from fastlt.decode.images import open_image
from fastlt.packing.hashes import COSINES, Hashes, _near, concatenated, look, same_look, small_grey


def hashes(seen, mirrored=None, has_look=None) -> Hashes:
    seen = np.array(seen, np.uint64)
    mirrored = np.array(mirrored if mirrored is not None else ~seen, np.uint64)
    return Hashes(
        [bytes(32)] * len(seen),
        seen,
        mirrored,
        np.array(has_look if has_look is not None else [True] * len(seen)),
    )


def encoded(image: Image.Image, kind="JPEG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def bits_apart(one: int, other: int) -> int:
    return bin(one ^ other).count("1")


def test_the_transform_is_the_cosine_transform():
    basis = COSINES / np.linalg.norm(COSINES, axis=1, keepdims=True)
    np.testing.assert_allclose(basis @ basis.T, np.eye(8), atol=1e-12)


@pytest.mark.parametrize("distance", range(6))
def test_all_pairs_within_the_distance_are_found_and_no_others(distance):
    rng = np.random.default_rng(distance)
    known = rng.integers(0, 2**63, 300).astype(np.uint64)
    flips = [
        np.bitwise_or.reduce(np.uint64(1) << rng.choice(64, k, replace=False).astype(np.uint64))
        for k in rng.integers(1, 9, 200)
    ]
    queries = known[rng.integers(0, 300, 200)] ^ np.array(flips, np.uint64)
    wanted = {
        (i, j)
        for i in range(200)
        for j in range(300)
        if bits_apart(int(queries[i]), int(known[j])) <= distance
    }
    found = {
        (int(i), int(j))
        for rows, columns in _near(queries, known, distance)
        for i, j in zip(rows, columns, strict=True)
    }
    assert found == wanted
    assert {
        tuple(pair) for pair in same_look(hashes(queries), hashes(known), distance).tolist()
    } >= wanted


def test_thousands_with_one_look_cost_no_square():
    same = hashes([7] * 50_000 + [8])
    pairs = same_look(same, same, 5)
    assert len(pairs) == 2 * 50_001 and set(pairs[:, 1].tolist()) == {0, 50_000}


def test_many_alike_are_compared_in_blocks(monkeypatch):
    monkeypatch.setattr("fastlt.packing.hashes.BLOCK", 50)
    same = hashes([7] * 40)
    assert same_look(same, same, 0).tolist() == [[i, 0] for i in range(40)]


def test_off_flat_and_empty():
    assert len(same_look(hashes([1]), hashes([1]), -1)) == 0
    assert len(same_look(hashes([]), hashes([1]), 3)) == 0
    assert len(same_look(hashes([1], has_look=[False]), hashes([1]), 3)) == 0
    assert same_look(hashes([5], mirrored=[9]), hashes([9]), 0).tolist() == [[0, 0]]
    assert len(concatenated([hashes([1, 2]), hashes([3])]).take(np.array([2, 0]))) == 2


def test_photographs_keep_their_look_when_resized_or_compressed_anew(shared_data):
    photos = sorted((shared_data / "photos/images").glob("*/*.jpg"))[::8]
    greys = [small_grey(photo.read_bytes()) for photo in photos]
    looks = [look(grey) for grey in greys]
    distances = []
    for photo, grey, original in zip(photos, greys, looks, strict=True):
        image = open_image(photo.read_bytes()).convert("RGB")
        smaller = encoded(
            image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS),
            quality=60,
        )
        distances.append(bits_apart(look(small_grey(smaller)), original))
        again = encoded(ImageOps.mirror(image), quality=75)
        assert bits_apart(look(small_grey(again)[:, ::-1]), original) <= 6
        assert bits_apart(look(grey[:, ::-1]), look(small_grey(again))) <= 6
    assert np.mean(np.array(distances) <= 4) > 0.95
    others = [bits_apart(one, other) for i, one in enumerate(looks) for other in looks[:i]]
    assert len(photos) > 50 and np.mean(np.array(others) <= 4) < 1e-3
