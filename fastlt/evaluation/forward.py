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

    Features (N, D) of theirs are given to it as they are. dtype: of autocast; float32: none.
    """
    images = to_device(pixels, device)
    if not pixels.is_floating_point():
        images = normalise(images, mean, std, channels_last=True)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        return model(images)
