"""What a step is given: images, augmented and normalised on the compute device."""

import numpy as np
import torch
from torch import Tensor

from fastlt.config import Config
from fastlt.data.augment import compiled_finish, scale_and_shift
from fastlt.data.augment import finish as finish_batch
from fastlt.data.jitter import colour_jitter
from fastlt.data.mixup import draw
from fastlt.data.prefetch import to_device
from fastlt.data.randaugment import randaugment


def make_input(
    config: Config,
    pixels: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return augmented, normalised images (N, 3, H, W) and labels on the device.

    pixels: (N, H, W, 3) uint8, or features (N, D) float32, which are left as they are. dtype: that
    of autocast, to which the first layer would turn the images anyway.
    """
    if pixels.is_floating_point():
        return to_device(pixels, device), to_device(labels, device), None, None
    augment, data = config.augment, config.data
    # not for the short batch that may end an epoch
    compiled = is_compiled(config, device) and data.batch * data.views % len(pixels) == 0
    target, pixels = to_device(labels, device), to_device(pixels, device)
    if augment.randaugment or any(augment.jitter):
        planes = colour_jitter(pixels.permute(0, 3, 1, 2), augment.jitter, generator, compiled)
        pixels = randaugment(
            planes, augment.randaugment, augment.randaugment_ops, generator
        ).permute(0, 2, 3, 1)
    count, height, width, _ = pixels.shape
    draws = draw(augment, count, height, width, generator, device)
    scales = scale_and_shift(tuple(data.mean), tuple(data.std), device)
    finish = compiled_finish() if compiled else finish_batch
    images = finish(pixels, *scales, draws, config.train.channels_last, dtype)
    return (
        (images, target, None, None)
        if draws.mix is None
        else (images, target, target.flip(0), draws.mix[0])
    )


def step_seed(seed: int, step: int, stream: int, rank: int = 0) -> int:
    """Return the seed of a stream of random numbers of a step."""
    return int(
        np.random.SeedSequence([seed, step, stream, *([rank] if rank else [])]).generate_state(
            1, np.uint64
        )[0]
        >> 1
    )


def is_compiled(config: Config, device: torch.device) -> bool:
    """Return whether a training is compiled on a device."""
    return config.train.compile == "on" or (
        config.train.compile == "auto" and device.type == "cuda"
    )


def seed_generators(seed: int, device: torch.device) -> None:
    """Seed torch's generators of the CPU and of a device, as torch.manual_seed does for all.

    That keeps a trace of its caller for each kind of device, which takes longer than a step of a
    head does.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)
    elif device.type != "cpu":
        torch.manual_seed(seed)
