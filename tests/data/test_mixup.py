"""Erasing, mixup and cutmix are what their papers say."""

import pytest
import torch

from fastlt.config import AugmentConfig
from fastlt.data.mixup import Draws, draw, draw_holes, draw_pasted, erase, mix

CPU = torch.device("cpu")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_off_means_nothing_is_drawn():
    assert draw(AugmentConfig(), 4, 8, 8, generator(), CPU) == Draws()
    # nobody to mix with
    assert draw(AugmentConfig(mixup=0.8), 1, 8, 8, generator(), CPU) == Draws()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_mixup_is_the_convex_sum_with_the_partner(dtype):
    images = torch.rand(5, 3, 7, 9, dtype=dtype, generator=generator(3))
    weights = draw(AugmentConfig(mixup=0.8), 5, 7, 9, generator(), CPU).mix
    assert weights.sum().item() == pytest.approx(1)
    mixed = mix(images, weights, None)
    for i in range(5):
        torch.testing.assert_close(
            mixed[i], (weights[0] * images[i] + weights[1] * images[4 - i]).to(mixed.dtype)
        )


def test_the_share_of_mixup_is_beta_distributed():
    config, rng = AugmentConfig(mixup=0.8), generator()
    shares = torch.stack([draw(config, 2, 1, 1, rng, CPU).mix[0] for _ in range(4000)])
    assert shares.mean().item() == pytest.approx(0.5, abs=0.02)
    assert shares.var().item() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.005)


def test_mixup_and_cutmix_share_the_steps():
    config, rng = AugmentConfig(mixup=0.8, cutmix=1.0), generator()
    cut = [draw(config, 2, 8, 8, rng, CPU).pasted is not None for _ in range(1000)]
    assert sum(cut) / 1000 == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("share", [0.0, 0.31, 0.75, 1.0])
def test_cutmix_counts_the_pixels_that_are_left(share):
    images = torch.stack([torch.zeros(3, 33, 47), torch.ones(3, 33, 47)])
    for seed in range(20):
        (top, left, bottom, right), left_over = draw_pasted(share, 33, 47, generator(seed))
        pasted = mix(images, torch.zeros(2), torch.tensor([top, left, bottom, right]))
        assert 1 - pasted[0, 0].mean().item() == pytest.approx(left_over, abs=1e-6)
        assert left_over >= share - 1e-6
        wanted = images.clone()
        wanted[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
        assert torch.equal(pasted, wanted)
    assert images[0].sum() == 0


def test_cutmix_weighs_labels_by_the_pixels_that_are_left():
    for seed in range(20):
        drawn = draw(AugmentConfig(cutmix=1.0), 6, 30, 20, generator(seed), CPU)
        top, left, bottom, right = drawn.pasted.tolist()
        assert drawn.mix[0].item() == pytest.approx(1 - (bottom - top) * (right - left) / 600)


def test_erasing_fills_a_box_with_noise_in_the_right_share_of_images():
    images = torch.full((2000, 3, 16, 24), 7.0)
    holes, noise = draw_holes(0.25, 2000, 16, 24, generator(), CPU)
    erased = erase(images, holes, noise)
    hole = (erased != 7.0).all(dim=1)
    assert (hole.flatten(1).any(dim=1)).float().mean().item() == pytest.approx(0.25, abs=0.03)
    for image in range(300):
        top, left, bottom, right = holes[image].tolist()
        assert 0 <= top <= bottom <= 16 and 0 <= left <= right <= 24
        wanted = images[image].clone()
        wanted[:, top:bottom, left:right] = noise[image, :, top:bottom, left:right]
        assert torch.equal(erased[image], wanted)
    areas = ((holes[:, 2] - holes[:, 0]) * (holes[:, 3] - holes[:, 1])).float()
    assert areas[areas > 0].min() > 0 and areas.max() <= 16 * 24 / 3
    assert erased[erased != 7.0].std().item() == pytest.approx(1, abs=0.05)
