"""A batch on the compute device, from the loader's uint8 to what the model takes: one step,
compiled where the model is.
"""

from collections.abc import Callable, Sequence
from functools import cache, lru_cache

import torch
from torch import Tensor

from fastlt.data.mixup import Draws, erase, mix


def normalise(
    images: Tensor, mean: Sequence[float], std: Sequence[float], channels_last: bool = False
) -> Tensor:
    """Return (images / 255 - mean) / std of images (n, H, W, 3) uint8, as (n, 3, H, W) float32.

    The result is on the device of the images.
    """
    return scaled(images, *scale_and_shift(tuple(mean), tuple(std), images.device), channels_last)


@lru_cache(maxsize=8)
def scale_and_shift(
    mean: tuple[float, ...], std: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Two of (3,) float32; kept, for a copy to a GPU would make every batch wait."""
    centre, spread = (torch.tensor(values, dtype=torch.float64) for values in (mean, std))
    return (1 / (255 * spread)).to(device, torch.float32), (-centre / spread).to(
        device, torch.float32
    )


def scaled(images: Tensor, scale: Tensor, shift: Tensor, channels_last: bool) -> Tensor:
    """Return images (n, H, W, 3) uint8 * scale + shift, as (n, 3, H, W) float32."""
    count, height, width, _ = images.shape
    if not channels_last:
        planes = images.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
        return planes.mul_(scale.view(3, 1, 1)).add_(shift.view(3, 1, 1))
    # Whole rows as the inner dimension: with 3 channels innermost the CPU's vector units would go
    # half empty.
    rows = images.reshape(count, height, width * 3).to(torch.float32)
    rows = rows.mul_(scale.repeat(width)).add_(shift.repeat(width))
    return rows.view(count, height, width, 3).permute(0, 3, 1, 2)


def finish(
    pixels: Tensor,
    scale: Tensor,
    shift: Tensor,
    draws: Draws,
    channels_last: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Return pixels (N, H, W, 3) uint8 normalised, erased and mixed, as (N, 3, H, W) of dtype.

    In float32 up to there: 8-bit input in bf16 arithmetic would lose a bit or two.
    """
    images = scaled(pixels, scale, shift, channels_last)
    if draws.holes is not None and draws.noise is not None:
        images = erase(images, draws.holes, draws.noise)
    if draws.mix is not None:
        images = mix(images, draws.mix, draws.pasted)
    return images.to(dtype)


@cache
def compiled_finish() -> Callable[..., Tensor]:
    """Return `finish`, compiled once for the process."""
    return torch.compile(finish, fullgraph=True)
