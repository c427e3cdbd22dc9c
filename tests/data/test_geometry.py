"""Boxes and flips, against torchvision's formula and plain arithmetic."""

import math
import random

import numpy as np
import pytest

from fastlt.data.geometry import Geometry, boxes_of, place_uniforms

COUNT = 20_000


def boxes(
    geometry: Geometry, height: int, width: int, count: int = COUNT, seed: int = 0, epoch: int = 0
):
    side = np.ones(count, np.int32)
    return boxes_of(geometry, side * height, side * width, np.arange(count), seed, epoch)


def torchvision_box(height: int, width: int, scale, ratio) -> tuple[int, int, int, int]:
    """RandomResizedCrop.get_params, as torchvision documents and does it."""
    for _ in range(10):
        area = height * width * random.uniform(*scale)
        aspect = math.exp(random.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, height - h), random.randint(0, width - w), h, w
    if width / height < ratio[0]:
        w, h = width, round(width / ratio[0])
    elif width / height > ratio[1]:
        w, h = round(height * ratio[1]), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


@pytest.mark.parametrize(
    ("height", "width"),
    [(375, 500), (500, 333), (32, 32), (1, 1), (1, 900), (900, 1), (20, 4000), (3000, 7)],
)
def test_random_resized_boxes_lie_inside_the_image(height, width):
    found, _ = boxes(Geometry("random-resized-crop", 224), height, width, 2000)
    top, left, h, w = found.T
    assert (found[:, :2] >= 0).all() and (h >= 1).all() and (w >= 1).all()
    assert (top + h <= height).all() and (left + w <= width).all()


@pytest.mark.parametrize(("height", "width"), [(375, 500), (300, 120), (64, 400)])
def test_random_resized_boxes_are_distributed_as_torchvisions(height, width):
    geometry = Geometry("random-resized-crop", 224, scale=(0.2, 0.9))
    found = boxes(geometry, height, width)[0].astype(float)
    random.seed(0)
    wanted = np.array(
        [torchvision_box(height, width, geometry.scale, geometry.ratio) for _ in range(COUNT)],
        float,
    )
    for values, reference in ((found[:, i], wanted[:, i]) for i in range(4)):
        # standard error of a mean; two means differ by 1.4 of it
        step = reference.std() / math.sqrt(COUNT)
        assert abs(values.mean() - reference.mean()) < 6 * step + 1e-9
        assert np.abs(
            np.quantile(values, [0.1, 0.5, 0.9]) - np.quantile(reference, [0.1, 0.5, 0.9])
        ).max() < 0.03 * max(height, width)


def test_aspect_ratio_and_area_keep_to_their_limits():
    h, w = boxes(Geometry("random-resized-crop", 224), 1000, 1000)[0].T[2:].astype(float)
    assert 0.745 < (w / h).min() < 0.76 and 1.32 < (w / h).max() < 1.34
    assert 0.079 < (h * w).min() / 1e6 < 0.085 and (h * w).max() / 1e6 > 0.97


def test_extreme_shapes_get_the_largest_centred_box_of_an_allowed_shape():
    found, _ = boxes(Geometry("random-resized-crop", 224, scale=(0.9, 1.0)), 30, 400, 100)
    assert (found == [0, 180, 30, 40]).all()


def test_pad_crop_shifts_are_uniform_and_independent():
    found, _ = boxes(Geometry("pad-crop", 32, padding=4), 32, 32)
    assert (found[:, 2:] == 32).all()
    table = np.zeros((9, 9))
    np.add.at(table, (found[:, 0] + 4, found[:, 1] + 4), 1)
    expected = COUNT / 81
    chi_squared = ((table - expected) ** 2 / expected).sum()
    assert chi_squared < 133  # 80 degrees of freedom: exceeded by chance once in 10,000


def test_pad_crop_of_other_sizes_shifts_in_output_pixels():
    found, _ = boxes(Geometry("pad-crop", 32, padding=4), 64, 128, 2000)
    assert set(found[:, 0]) == set(range(-8, 9, 2)) and set(found[:, 1]) == set(range(-16, 17, 4))
    assert (found[:, 2:] == [64, 128]).all()


@pytest.mark.parametrize("kind", ["random-resized-crop", "pad-crop", "centre-crop"])
def test_half_of_the_images_are_mirrored_where_asked(kind):
    flips = boxes(Geometry(kind, 32, flip=True), 40, 40)[1]
    assert abs(flips.mean() - 0.5) < 5 * 0.5 / math.sqrt(COUNT)
    assert not boxes(Geometry(kind, 32), 40, 40)[1].any()


def test_flips_do_not_depend_on_the_box():
    found, flips = boxes(Geometry("pad-crop", 32, flip=True), 32, 32)
    assert abs(np.corrcoef(found[:, 0], flips)[0, 1]) < 5 / math.sqrt(COUNT)
    assert abs(np.corrcoef(flips[1:], flips[:-1])[0, 1]) < 5 / math.sqrt(COUNT)


@pytest.mark.parametrize("kind", ["random-resized-crop", "pad-crop"])
def test_a_box_is_a_function_of_its_place_not_of_its_batch(kind):
    geometry = Geometry(kind, 32, flip=True)
    rng = np.random.default_rng(0)
    heights, widths, places = (rng.integers(20, 400, 50) for _ in range(3))
    whole, flips = boxes_of(geometry, heights, widths, places, 7, 2)
    order = rng.permutation(50)
    some, some_flips = boxes_of(geometry, heights[order], widths[order], places[order], 7, 2)
    assert np.array_equal(some, whole[order]) and np.array_equal(some_flips, flips[order])


def test_seed_epoch_and_place_all_change_the_draw():
    geometry = Geometry("random-resized-crop", 32)
    first = boxes(geometry, 300, 400, 200)[0]
    assert np.array_equal(first, boxes(geometry, 300, 400, 200)[0])
    for other in (boxes(geometry, 300, 400, 200, seed=1), boxes(geometry, 300, 400, 200, epoch=1)):
        assert (first != other[0]).any(axis=1).mean() > 0.95
    assert len(np.unique(first, axis=0)) > 190


def test_uniforms_are_uniform_in_every_column():
    uniforms = place_uniforms(np.arange(COUNT), seed=12, epoch=3, count=6)
    assert uniforms.min() >= 0 and uniforms.max() < 1
    for column in uniforms.T:
        counts = np.histogram(column, 20, (0, 1))[0]
        assert (
            (counts - COUNT / 20) ** 2 / (COUNT / 20)
        ).sum() < 51  # chi-squared, 19 degrees: once in 10,000
    correlation = np.corrcoef(uniforms.T) - np.eye(6)
    assert np.abs(correlation).max() < 5 / math.sqrt(COUNT)


@pytest.mark.parametrize(
    ("height", "width", "resize", "box"),
    [
        (32, 32, 0, (0, 0, 32, 32)),  # CIFAR: as it is
        (375, 500, 256, (23, 86, 328, 328)),  # 375 * 224 / 256 = 328.1
        (512, 256, 256, (144, 16, 224, 224)),
        (100, 100, 0, (0, 0, 100, 100)),
    ],
)
def test_centre_crop(height, width, resize, box):
    size = 32 if height == 32 else 224
    found, flips = boxes(Geometry("centre-crop", size, resize=resize), height, width, 5)
    assert (found == box).all() and not flips.any()
