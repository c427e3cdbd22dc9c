"""Random erasing, mixup and cutmix of a whole batch on the compute device: what is drawn, and what
is made of it.

Random numbers come from a generator that the caller seeds per step, so a resumed run draws what an
undisturbed one draws. What is drawn are tensors, so what is compiled stays compiled whatever comes
out.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastlt.config import AugmentConfig
from fastlt.data.prefetch import to_device


class Draws(NamedTuple):
    """Of one step, on the device; None: off."""

    holes: Tensor | None = (
        # (N, 4) int64: top, left, bottom, right of what is erased of each image; empty for most
        None
    )
    noise: Tensor | None = None  # (N, 3, H, W), what fills them
    # (2,) float32: the weights of an image and of its partner, and of their labels
    mix: Tensor | None = None
    pasted: Tensor | None = (
        # (4,) int64: top, left, bottom, right of what cutmix takes of the partner; None: mixup
        None
    )


def draw(
    config: AugmentConfig,
    count: int,
    height: int,
    width: int,
    generator: torch.Generator,
    device: torch.device,
) -> Draws:
    """For a batch of `count` images.

    Where mixup and cutmix are both on, one of them by a fair coin (as timm).
    """
    holes, noise = (
        draw_holes(config.erasing, count, height, width, generator, device)
        if config.erasing
        else (None, None)
    )
    if not (config.mixup or config.cutmix) or count < 2:
        return Draws(holes, noise)
    cut = config.cutmix > 0 and (config.mixup == 0 or _uniform(generator) < 0.5)
    share = _beta(config.cutmix if cut else config.mixup, generator)
    pasted = None
    if cut:
        box, share = draw_pasted(share, height, width, generator)
        pasted = to_device(torch.tensor(box), device)
    return Draws(
        holes,
        noise,
        to_device(torch.tensor([share, 1 - share], dtype=torch.float32), device),
        pasted,
    )


def draw_holes(
    probability: float,
    count: int,
    height: int,
    width: int,
    generator: torch.Generator,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Random erasing with noise per pixel (arXiv 1708.04896): area 2..33 %, aspect ratio 0.3..3.3.

    Returns holes and noise.
    """
    u = torch.rand(5, count, generator=generator)
    area = (0.02 + u[1] * (1 / 3 - 0.02)) * height * width
    aspect = torch.exp((u[2] * 2 - 1) * torch.log(torch.tensor(10 / 3)))
    h, w = (
        (area * aspect).sqrt().clamp(max=height - 1).int(),
        (area / aspect).sqrt().clamp(max=width - 1).int(),
    )
    h = h * (u[0] < probability)
    top, left = (u[3] * (height - h)).int(), (u[4] * (width - w)).int()
    holes = torch.stack([top, left, top + h, left + w], dim=1).long()
    # all that noise is not to be copied there
    on_device = torch.Generator(device).manual_seed(generator.initial_seed())
    return to_device(holes, device), torch.randn(
        count, 3, height, width, generator=on_device, device=device
    )


def draw_pasted(
    share: float, height: int, width: int, generator: torch.Generator
) -> tuple[list[int], float]:
    """The box of cutmix, of area 1 - share (arXiv 1905.04899), and the share of the first image
    that is really left.
    """
    half_h, half_w = (int(side * (1 - share) ** 0.5 / 2) for side in (height, width))
    row, column = int(_uniform(generator) * height), int(_uniform(generator) * width)
    top, bottom = max(0, row - half_h), min(height, row + half_h)
    left, right = max(0, column - half_w), min(width, column + half_w)
    return [top, left, bottom, right], 1 - (bottom - top) * (right - left) / (height * width)


def erase(images: Tensor, holes: Tensor, noise: Tensor) -> Tensor:
    """Return normalised images (N, 3, H, W) with noise in the holes."""
    return torch.where(_inside(holes, *images.shape[2:]), noise.to(images.dtype), images)


def mix(images: Tensor, weights: Tensor, pasted: Tensor | None) -> Tensor:
    """Each image (N, 3, H, W) with that of the mirrored place in the batch."""
    if pasted is None:
        return images * weights[0] + images.flip(0) * weights[1]
    return torch.where(_inside(pasted[None], *images.shape[2:]), images.flip(0), images)


def _inside(boxes: Tensor, height: int, width: int) -> Tensor:
    """Return which pixels lie in the boxes, (N, 1, H, W) bool."""
    rows, columns = (
        torch.arange(height, device=boxes.device),
        torch.arange(width, device=boxes.device),
    )
    top, left, bottom, right = boxes[:, :, None].unbind(dim=1)
    in_rows, in_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
    return in_rows[:, None, :, None] & in_columns[:, None, None, :]


def _uniform(generator: torch.Generator) -> float:
    return torch.rand((), generator=generator).item()


def _beta(alpha: float, generator: torch.Generator) -> float:
    """One draw of Beta(alpha, alpha), from two Gamma draws."""
    x, y = torch._standard_gamma(
        torch.full((2,), alpha, dtype=torch.float64), generator=generator
    ).tolist()
    return x / (x + y) if x + y > 0 else 0.5
