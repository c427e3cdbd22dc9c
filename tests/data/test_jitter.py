"""Colour jitter is torchvision's, for each image with its own factor."""

import pytest
import torch

from fastlt.data import jitter
from fastlt.errors import UserError
from fastlt.utils import torchvision_shim

N = 6


@pytest.fixture(scope="module")
def functional():
    try:
        torchvision_shim.make_importable()
    except UserError:
        pytest.skip("no torchvision here")
    from torchvision.transforms.v2 import functional

    return functional


@pytest.fixture
def images() -> torch.Tensor:
    made = torch.rand(N, 3, 9, 13, generator=torch.Generator().manual_seed(0))
    made[1] = made[1, :1]  # grey
    made[2] = 0
    made[3, :, 0] = torch.tensor([1.0, 0, 0])[:, None]  # pure colours
    made[3, :, 1] = torch.tensor([0.0, 1, 1])[:, None]
    return made


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_a_factor_is_torchvisions(functional, images, name):
    factors = torch.tensor([0.0, 0.3, 1.0, 1.7, 2.0, 0.9])
    made = getattr(jitter, name)(images, factors[:, None, None, None])
    wanted = torch.stack(
        [
            getattr(functional, f"adjust_{name}")(x, f.item())
            for x, f in zip(images, factors, strict=True)
        ]
    )
    torch.testing.assert_close(made, wanted, atol=1e-5, rtol=0)


def test_a_turn_of_the_hue_is_torchvisions(functional, images):
    turns = torch.tensor([-0.5, 0.2, 0.1, 0.33, 0.5, -0.07])
    made = jitter.hue(images, turns[:, None, None, None])
    wanted = torch.stack(
        [functional.adjust_hue(x, t.item()) for x, t in zip(images, turns, strict=True)]
    )
    torch.testing.assert_close(made, wanted, atol=2e-4, rtol=0)


def test_nothing_to_do_leaves_the_images_alone():
    images = torch.randint(256, (2, 3, 5, 5), dtype=torch.uint8)
    assert jitter.colour_jitter(images, (0, 0, 0, 0), torch.Generator()) is images


def test_images_differ_and_the_generator_decides():
    images = torch.randint(256, (1, 3, 8, 8), dtype=torch.uint8).expand(N, -1, -1, -1)
    first, again, other = (
        jitter.colour_jitter(images, (0.4, 0.4, 0.4, 0.1), torch.Generator().manual_seed(s))
        for s in (1, 1, 2)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert first.dtype == torch.uint8 and len({x.numpy().tobytes() for x in first}) == N


@pytest.mark.parametrize("step", range(4))
def test_each_strength_is_that_of_its_step(step):
    images = torch.randint(256, (N, 3, 8, 8), dtype=torch.uint8)
    strengths = [0.0] * 4
    strengths[step] = 0.3
    made = jitter.colour_jitter(images, strengths, torch.Generator().manual_seed(5))
    amounts = (2 * torch.rand(4, N, generator=torch.Generator().manual_seed(5)) - 1)[step] * 0.3
    given = (amounts if step == jitter.HUE else 1 + amounts)[:, None, None, None]
    wanted = (jitter.STEPS[step](images.float() / 255, given) * 255).round().to(torch.uint8)
    assert torch.equal(made, wanted) and not torch.equal(made, images)


def test_it_compiles_to_the_same():
    images = torch.rand(N, 3, 8, 8)
    turns = torch.rand(N, 1, 1, 1) - 0.5
    torch.testing.assert_close(
        torch.compile(jitter.hue, backend="aot_eager", fullgraph=True)(images, turns),
        jitter.hue(images, turns),
    )
