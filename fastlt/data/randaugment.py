"""RandAugment of a whole batch on the compute device, by torchvision's operations."""

from typing import Any

import torch
from torch import Tensor

from fastlt.utils import torchvision_shim


def randaugment(
    images: Tensor, magnitude: int, operations: int, generator: torch.Generator
) -> Tensor:
    """RandAugment (arXiv 1909.13719) on (N, 3, H, W) uint8: each image draws its operations; those
    of one kind go together.

    As in timm's, which the release trains with, a drawn operation is carried out with probability
    1/2. Which images go together depends on the draw, so this is not compiled.
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


def _apply_by_kind(
    images: Tensor, space: list[tuple[str, float, bool]], kinds: Tensor, signs: Tensor
) -> Tensor:
    result = images.clone(memory_format=torch.contiguous_format)
    for kind, (name, strength, signed) in enumerate(space):
        for negative in (False, True) if signed else (False,):
            chosen = (kinds == kind) & ((signs == negative) if signed else torch.ones_like(signs))
            if name != "identity" and chosen.any():
                places = chosen.nonzero()[:, 0].to(images.device)
                result[places] = _operate(result[places], name, -strength if negative else strength)
    return result


def _operations(magnitude: int, height: int, width: int) -> list[tuple[str, float, bool]]:
    """Name, strength at `magnitude` of 10, and whether its sign is drawn; the ranges at 10 are
    torchvision's largest.
    """
    m = magnitude / 10
    return [
        ("identity", 0.0, False),
        ("shear_x", 0.3 * m, True),
        ("shear_y", 0.3 * m, True),
        ("translate_x", 150 / 331 * width * m, True),
        ("translate_y", 150 / 331 * height * m, True),
        ("rotate", 30 * m, True),
        ("brightness", 0.9 * m, True),
        ("color", 0.9 * m, True),
        ("contrast", 0.9 * m, True),
        ("sharpness", 0.9 * m, True),
        ("posterize", 8 - round(4 * m), False),
        ("solarize", 255 * (1 - m), False),
        ("autocontrast", 0.0, False),
        ("equalize", 0.0, False),
    ]


def _operate(images: Tensor, name: str, strength: float) -> Tensor:
    torchvision_shim.make_importable()
    from torchvision.transforms.v2 import functional as T

    enhance: dict[str, Any] = {
        "brightness": T.adjust_brightness,
        "color": T.adjust_saturation,
        "contrast": T.adjust_contrast,
        "sharpness": T.adjust_sharpness,
    }
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
    move = [
        round(strength) if name == "translate_x" else 0,
        round(strength) if name == "translate_y" else 0,
    ]
    angle = -strength if name == "rotate" else 0.0
    return T.affine(images, angle=angle, translate=move, scale=1.0, shear=shear)
