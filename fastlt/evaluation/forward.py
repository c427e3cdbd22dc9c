"""The forward pass of evaluation: pixels in, what a model makes of them out."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastlt.data.augment import normalise
from fastlt.data.prefetch import to_device


@torch.inference_mode()
def output_of(
    model: Callable[[Tensor], Tensor],
    pixels: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return what a model makes of pixels (N, H, W, 3) uint8, which are normalised first.

    dtype: of autocast; float32: none.
    """
    images = normalise(to_device(pixels, device), mean, std, channels_last=True)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        return model(images)
