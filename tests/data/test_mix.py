import pytest
import torch

from fastlt.config import AugmentConfig
from fastlt.data.mix import cutmix, erase, mixup_or_cutmix, randaugment


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_off_means_untouched():
    images = torch.rand(4, 3, 8, 8)
    mixed = mixup_or_cutmix(AugmentConfig(), images, torch.arange(4), generator())
    assert mixed.images is images and mixed.target_b is None and mixed.mix is None
    assert erase(images, 0.0, generator()) is images
    assert randaugment(images, 0, 2, generator()) is images


def test_mixup_is_the_convex_sum_with_the_second_label():
    images, target = torch.rand(5, 3, 8, 8), torch.arange(5)
    mixed = mixup_or_cutmix(AugmentConfig(mixup=0.8), images, target, generator())
    torch.testing.assert_close(mixed.images, mixed.mix * images + (1 - mixed.mix) * images.flip(0))
    assert torch.equal(mixed.target_b, target.flip(0))


def test_the_share_of_mixup_is_beta_distributed():
    config, images = AugmentConfig(mixup=0.8), torch.zeros(2, 3, 1, 1)
    rng = generator()
    shares = torch.stack([mixup_or_cutmix(config, images, torch.arange(2), rng).mix for _ in range(4000)])
    assert shares.mean().item() == pytest.approx(0.5, abs=0.02)
    assert shares.var().item() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), abs=0.005)


@pytest.mark.parametrize("share", [0.0, 0.31, 0.75, 1.0])
def test_cutmix_counts_the_pixels_that_are_left(share):
    images = torch.stack([torch.zeros(3, 33, 47), torch.ones(3, 33, 47)])
    for seed in range(20):
        pasted, left = cutmix(images, share, generator(seed))
        assert 1 - pasted[0, 0].mean().item() == pytest.approx(left, abs=1e-6)
        assert pasted[1, 0].mean().item() == pytest.approx(left, abs=1e-6)
        assert left >= share - 1e-6
    assert images[0].sum() == 0


def test_erasing_fills_a_box_with_noise_in_the_right_share_of_images():
    images = torch.full((2000, 3, 16, 16), 7.0)
    erased = erase(images, 0.25, generator())
    hole = (erased != 7.0).all(dim=1)
    assert (hole.flatten(1).any(dim=1)).float().mean().item() == pytest.approx(0.25, abs=0.03)
    for mask in hole[hole.flatten(1).any(dim=1)][:50]:
        rows, columns = mask.any(1), mask.any(0)
        assert mask.sum() == rows.sum() * columns.sum()  # a box, without gaps
    assert erased[erased != 7.0].std().item() == pytest.approx(1, abs=0.05)


def test_randaugment_is_reproducible_keeps_shape_and_changes_most_images():
    images = torch.randint(0, 256, (64, 3, 24, 20), dtype=torch.uint8, generator=generator(5))
    first, again = randaugment(images, 9, 2, generator(1)), randaugment(images, 9, 2, generator(1))
    assert torch.equal(first, again)
    assert first.shape == images.shape and first.dtype == torch.uint8
    changed = (first != images).flatten(1).any(dim=1).float().mean()
    assert 0.4 < changed < 0.95
    assert not torch.equal(first, randaugment(images, 9, 2, generator(2)))


def test_each_operation_of_randaugment_is_torchvisions():
    from fastlt import torchvision_shim
    from fastlt.data.mix import _operate

    torchvision_shim.make_importable()
    from torchvision.transforms.v2 import functional as T

    images = torch.randint(0, 256, (3, 3, 24, 24), dtype=torch.uint8, generator=generator(6))
    assert torch.equal(_operate(images, "solarize", 128), T.solarize(images, 128))
    assert torch.equal(_operate(images, "posterize", 4), T.posterize(images, 4))
    assert torch.equal(_operate(images, "brightness", -0.5), T.adjust_brightness(images, 0.5))
    assert torch.equal(_operate(images, "rotate", 30.0), T.rotate(images, 30.0))
    moved = _operate(images, "translate_x", 5.0)
    assert torch.equal(moved[..., 5:], images[..., :-5]) and moved[..., :5].sum() == 0
