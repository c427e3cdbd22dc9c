"""Augmentation of a whole batch on the compute device, after the crop: RandAugment, random erasing, mixup, cutmix.

Random numbers come from a generator that the caller seeds per step, so a resumed run draws what an undisturbed one draws.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastlt import torchvision_shim
from fastlt.config import AugmentConfig


class Mixed(NamedTuple):
    images: Tensor  # (N, 3, H, W)
    target_b: Tensor | None  # (N,) the second label, None: not mixed
    mix: Tensor | None  # () float32, weight of the first label


def mixup_or_cutmix(config: AugmentConfig, images: Tensor, target: Tensor, generator: torch.Generator) -> Mixed:
    """Mixes each image with that of the mirrored place in the batch. Where both are on, one of them by a fair coin (as timm)."""
    if not (config.mixup or config.cutmix) or len(images) < 2:
        return Mixed(images, None, None)
    cut = config.cutmix > 0 and (config.mixup == 0 or _uniform(generator) < 0.5)
    share = _beta(config.cutmix if cut else config.mixup, generator)
    if cut:
        images, share = cutmix(images, share, generator)
    else:
        images = images * share + images.flip(0) * (1 - share)
    return Mixed(images, target.flip(0), torch.full((), share, device=images.device))


def cutmix(images: Tensor, share: float, generator: torch.Generator) -> tuple[Tensor, float]:
    """Pastes a box of area 1 - share (arXiv 1905.04899); returns the share of the first image that is really left."""
    height, width = images.shape[2:]
    half_h, half_w = (int(side * (1 - share) ** 0.5 / 2) for side in (height, width))
    row, column = int(_uniform(generator) * height), int(_uniform(generator) * width)
    top, bottom = max(0, row - half_h), min(height, row + half_h)
    left, right = max(0, column - half_w), min(width, column + half_w)
    pasted = images.clone(memory_format=torch.preserve_format)
    pasted[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
    return pasted, 1 - (bottom - top) * (right - left) / (height * width)


def erase(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Random erasing with noise per pixel (arXiv 1708.04896): area 2..33 %, aspect ratio 0.3..3.3, on normalised images."""
    if not probability:
        return images
    n, _, height, width = images.shape
    u = torch.rand(5, n, generator=generator)
    area = (0.02 + u[1] * (1 / 3 - 0.02)) * height * width
    aspect = torch.exp((u[2] * 2 - 1) * torch.log(torch.tensor(10 / 3)))
    h, w = (area * aspect).sqrt().clamp(max=height - 1).int(), (area / aspect).sqrt().clamp(max=width - 1).int()
    top, left = (u[3] * (height - h)).int(), (u[4] * (width - w)).int()
    rows, columns = torch.arange(height), torch.arange(width)
    in_rows = (rows >= top[:, None]) & (rows < (top + h)[:, None]) & (u[0] < probability)[:, None]
    in_columns = (columns >= left[:, None]) & (columns < (left + w)[:, None])
    hole = (in_rows[:, None, :, None] & in_columns[:, None, None, :]).to(images.device)
    on_device = torch.Generator(images.device).manual_seed(generator.initial_seed())  # all that noise is not to be copied there
    noise = torch.randn(images.shape, generator=on_device, device=images.device, dtype=images.dtype)
    return torch.where(hole, noise, images)


def randaugment(images: Tensor, magnitude: int, operations: int, generator: torch.Generator) -> Tensor:
    """RandAugment (arXiv 1909.13719) on (N, 3, H, W) uint8: each image draws its operations; those of one kind go together.

    As in timm's, which the release trains with, a drawn operation is carried out with probability 1/2.
    """
    if not magnitude:
        return images
    space = _operations(magnitude, *images.shape[2:])
    for _ in range(operations):
        kinds = torch.randint(len(space), (len(images),), generator=generator)
        kinds[torch.rand(len(images), generator=generator) < 0.5] = 0  # the identity
        signs = torch.rand(len(images), generator=generator) < 0.5
        images = _apply_by_kind(images, space, kinds, signs)
    return images


def _apply_by_kind(images: Tensor, space: list[tuple[str, float, bool]], kinds: Tensor, signs: Tensor) -> Tensor:
    result = images.clone(memory_format=torch.contiguous_format)
    for kind, (name, strength, signed) in enumerate(space):
        for negative in (False, True) if signed else (False,):
            chosen = (kinds == kind) & ((signs == negative) if signed else torch.ones_like(signs))
            if name != "identity" and chosen.any():
                places = chosen.nonzero()[:, 0].to(images.device)
                result[places] = _operate(result[places], name, -strength if negative else strength)
    return result


def _operations(magnitude: int, height: int, width: int) -> list[tuple[str, float, bool]]:
    """Name, strength at `magnitude` of 10, and whether its sign is drawn; the ranges at 10 are torchvision's largest."""
    m = magnitude / 10
    return [
        ("identity", 0.0, False), ("shear_x", 0.3 * m, True), ("shear_y", 0.3 * m, True),
        ("translate_x", 150 / 331 * width * m, True), ("translate_y", 150 / 331 * height * m, True), ("rotate", 30 * m, True),
        ("brightness", 0.9 * m, True), ("color", 0.9 * m, True), ("contrast", 0.9 * m, True), ("sharpness", 0.9 * m, True),
        ("posterize", 8 - round(4 * m), False), ("solarize", 255 * (1 - m), False), ("autocontrast", 0.0, False),
        ("equalize", 0.0, False),
    ]  # fmt: skip


def _operate(images: Tensor, name: str, strength: float) -> Tensor:
    torchvision_shim.make_importable()
    from torchvision.transforms.v2 import functional as T

    enhance: dict[str, Any] = {
        "brightness": T.adjust_brightness, "color": T.adjust_saturation, "contrast": T.adjust_contrast,
        "sharpness": T.adjust_sharpness,
    }  # fmt: skip
    if name in enhance:
        return enhance[name](images, 1 + strength)
    if name == "posterize":
        return T.posterize(images, int(strength))
    if name == "solarize":
        return T.solarize(images, strength)
    if name == "autocontrast":
        return T.autocontrast(images)
    if name == "equalize":
        return T.equalize(images)
    degrees = torch.rad2deg(torch.atan(torch.tensor(strength))).item()
    shear = [degrees if name == "shear_x" else 0.0, degrees if name == "shear_y" else 0.0]
    move = [round(strength) if name == "translate_x" else 0, round(strength) if name == "translate_y" else 0]
    angle = -strength if name == "rotate" else 0.0
    return T.affine(images, angle=angle, translate=move, scale=1.0, shear=shear)


def _uniform(generator: torch.Generator) -> float:
    return torch.rand((), generator=generator).item()


def _beta(alpha: float, generator: torch.Generator) -> float:
    """One draw of Beta(alpha, alpha), from two Gamma draws."""
    x, y = torch._standard_gamma(torch.full((2,), alpha, dtype=torch.float64), generator=generator).tolist()
    return x / (x + y) if x + y > 0 else 0.5
