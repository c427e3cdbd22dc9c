"""Batches on their way to a GPU: copied on a stream of their own, one ahead, while the one before
is computed on.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fastlt.data.plan import Batch


def staged(
    batches: Iterable[tuple[Batch, Tensor]], device: torch.device
) -> Iterator[tuple[Batch, Tensor]]:
    """The same batches with their images on `device`; nothing changes on a CPU, nor for images that
    are there already.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream, before = torch.cuda.Stream(device), None
    for batch, images in batches:
        coming = batch, _sent(images, device, stream)
        if before is not None:
            yield _arrived(*before, stream)
        before = coming
    if before is not None:
        yield _arrived(*before, stream)


def _sent(images: Tensor, device: torch.device, stream: torch.cuda.Stream) -> Tensor:
    if images.device.type != "cpu":
        return images
    with torch.cuda.stream(stream):
        return images.pin_memory().to(device, non_blocking=True)


def _arrived(batch: Batch, images: Tensor, stream: torch.cuda.Stream) -> tuple[Batch, Tensor]:
    current = torch.cuda.current_stream(images.device)
    current.wait_stream(stream)
    # its memory is not to be used again before the computation is through with it
    images.record_stream(current)
    return batch, images
