import torch

from fastlt.data.randaugment import randaugment


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_off_means_untouched():
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    assert randaugment(images, 0, 2, generator()) is images


def test_randaugment_is_reproducible_keeps_shape_and_changes_most_images():
    images = torch.randint(0, 256, (64, 3, 24, 20), dtype=torch.uint8, generator=generator(5))
    first, again = randaugment(images, 9, 2, generator(1)), randaugment(images, 9, 2, generator(1))
    assert torch.equal(first, again)
    assert first.shape == images.shape and first.dtype == torch.uint8
    changed = (first != images).flatten(1).any(dim=1).float().mean()
    assert 0.4 < changed < 0.95
    assert not torch.equal(first, randaugment(images, 9, 2, generator(2)))


def test_each_operation_of_randaugment_is_torchvisions():
    from fastlt.data.randaugment import _operate
    from fastlt.utils import torchvision_shim

    torchvision_shim.make_importable()
    from torchvision.transforms.v2 import functional as T

    images = torch.randint(0, 256, (3, 3, 24, 24), dtype=torch.uint8, generator=generator(6))
    assert torch.equal(_operate(images, "solarize", 128), T.solarize(images, 128))
    assert torch.equal(_operate(images, "posterize", 4), T.posterize(images, 4))
    assert torch.equal(_operate(images, "brightness", -0.5), T.adjust_brightness(images, 0.5))
    assert torch.equal(_operate(images, "rotate", 30.0), T.rotate(images, 30.0))
    moved = _operate(images, "translate_x", 5.0)
    assert torch.equal(moved[..., 5:], images[..., :-5]) and moved[..., :5].sum() == 0
