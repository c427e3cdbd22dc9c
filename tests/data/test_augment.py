"""The step from uint8 to what the model takes: the plain formula, and the same when compiled."""

import pytest
import torch

from fastlt.config import AugmentConfig
from fastlt.data.augment import compiled_finish, finish, normalise, scale_and_shift
from fastlt.data.jitter import colour_jitter
from fastlt.data.mixup import Draws, draw

CPU = torch.device("cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def pixels(count: int, height: int, width: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0,
        256,
        (count, height, width, 3),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(seed),
    )


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_normalising_is_the_plain_formula_to_the_last_bit_but_one(dtype, channels_last):
    images = torch.arange(256, dtype=torch.uint8).repeat(3 * 5).view(5, 16, 16, 3)[:, :, :13]
    made = finish(images, *scale_and_shift(MEAN, STD, CPU), Draws(), channels_last, dtype)
    exact = (images.double() / 255 - torch.tensor(MEAN).double()) / torch.tensor(STD).double()
    assert made.shape == (5, 3, 16, 13) and made.dtype == dtype
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert made.is_contiguous(memory_format=layout)
    error = (made.double() - exact.permute(0, 3, 1, 2)).abs().max().item()
    # half a step of bf16 from 2 to 4 is 2^-7
    assert error < {torch.float32: 1e-6, torch.bfloat16: 2**-7 + 1e-6}[dtype]


def test_normalise_leaves_its_input_alone():
    images = pixels(2, 4, 4)
    before = images.clone()
    normalise(images, (0.5,) * 3, (0.5,) * 3)
    assert torch.equal(images, before)


CONFIGS = {
    "nothing": {},
    "erasing, mixup": {"erasing": 0.5, "mixup": 0.8},
    "cutmix": {"cutmix": 1.0},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_it_is_the_same_and_stays_compiled(config, dtype):
    torch._dynamo.reset()
    compiled = compiled_finish()
    for step in range(6):
        count = 5 if step == 5 else 8  # the last batch of an epoch may be smaller
        images, generator = pixels(count, 17, 30, step), torch.Generator().manual_seed(step)
        draws = draw(AugmentConfig(**config), count, 17, 30, generator, CPU)
        given = (images, *scale_and_shift(MEAN, STD, CPU), draws, dtype == torch.bfloat16, dtype)
        with torch._dynamo.config.patch(error_on_recompile=1 <= step < 5):
            made = compiled(*given)
        tolerance = (
            {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2**-6, "rtol": 0}
        )
        torch.testing.assert_close(made, finish(*given), **tolerance)


def test_colour_jitter_compiled_is_the_same():
    torch._dynamo.reset()
    images = pixels(4, 9, 14).permute(0, 3, 1, 2)
    for seed in range(4):
        made = [
            colour_jitter(images, (0.4, 0.4, 0.4, 0.1), torch.Generator().manual_seed(seed), c)
            for c in (False, True)
        ]
        assert (made[0].int() - made[1].int()).abs().max() <= 1
