"""Colour jitter of a whole batch on the compute device: each image has its own factors, the order
of the steps is the batch's.

As torchvision's ColorJitter, which draws an order for each image.
"""

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

GREY = (0.2989, 0.587, 0.114)  # of red, green and blue, as torchvision has them


def colour_jitter(
    images: Tensor, strengths: Sequence[float], generator: torch.Generator, compiled: bool = False
) -> Tensor:
    """Return images (N, 3, H, W) uint8 with jittered colours.

    `strengths` are those of brightness, contrast, saturation (factors 1 - s to 1
    + s) and hue (turns -s to s).

    compiled: each step is, for there are 24 orders of them.
    """
    if not any(strengths):
        return images
    uniforms = 2 * torch.rand(len(strengths), len(images), generator=generator) - 1
    amounts = (uniforms * torch.tensor(strengths)[:, None]).to(images.device)[..., None, None, None]
    result = images.float() / 255
    for step in torch.randperm(len(strengths), generator=generator).tolist():
        if strengths[step]:
            result = _step(step, compiled)(
                result, amounts[step] if step == HUE else (1 + amounts[step]).clamp(min=0)
            )
    return (result * 255).round().to(torch.uint8)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Return images (N, 3, H, W) in 0..1, here and below, times factor (N, 1, 1, 1)."""
    return (images * factor).clamp(0, 1)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Return images blended with their mean grey."""
    return _blend(images, _grey(images).mean(dim=(1, 2, 3), keepdim=True), factor)


def saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Return images blended with their grey version."""
    return _blend(images, _grey(images), factor)


def hue(images: Tensor, turns: Tensor) -> Tensor:
    """Turn the colour wheel; brightness and saturation, in HSV, stay."""
    highest, lowest = images.amax(dim=1, keepdim=True), images.amin(dim=1, keepdim=True)
    spread = highest - lowest
    red, green, blue = images.split(1, dim=1)
    safe = torch.where(spread == 0, torch.ones_like(spread), spread)
    sixths = torch.where(
        highest == red,
        (green - blue) / safe,
        torch.where(highest == green, 2 + (blue - red) / safe, 4 + (red - green) / safe),
    )
    # Each channel falls from highest to lowest and back on its own third of the wheel (hsv to rgb
    # without cases).
    place = torch.cat([offset + sixths + 6 * turns for offset in (5, 3, 1)], dim=1) % 6
    return highest - spread * torch.minimum(place, 4 - place).clamp(0, 1)


HUE = 3
STEPS = (brightness, contrast, saturation, hue)


@cache
def _step(step: int, compiled: bool) -> Callable[[Tensor, Tensor], Tensor]:
    return torch.compile(STEPS[step], fullgraph=True) if compiled else STEPS[step]


def _blend(images: Tensor, other: Tensor, factor: Tensor) -> Tensor:
    return (images * factor + other * (1 - factor)).clamp(0, 1)


def _grey(images: Tensor) -> Tensor:
    """Return the brightness of each pixel, (N, 1, H, W)."""
    red, green, blue = images.split(1, dim=1)
    return GREY[0] * red + GREY[1] * green + GREY[2] * blue
