"""Copies to the device: batches on a stream of their own, one ahead of the computation."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fastlt.data.plan import Batch


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return the tensor on `device`; one that is there already is returned as it is.

    From pinned memory the copy to a GPU runs beside the computation.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def prefetch_to_device(
    batches: Iterable[tuple[Batch, Tensor]], device: torch.device
) -> Iterator[tuple[Batch, Tensor]]:
    """Yield the same batches with their images on `device`.

    Nothing changes on a CPU, nor for images that are on the device already.
    """
    if device.type != "cuda":
        yield from batches
        return
    stream, before = torch.cuda.Stream(device), None
    for batch, images in batches:
        coming = batch, _send(images, device, stream)
        if before is not None:
            yield _wait_for(*before, stream)
        before = coming
    if before is not None:
        yield _wait_for(*before, stream)


def _send(images: Tensor, device: torch.device, stream: torch.cuda.Stream) -> Tensor:
    if images.device.type != "cpu":
        return images
    with torch.cuda.stream(stream):
        return to_device(images, device)


def _wait_for(batch: Batch, images: Tensor, stream: torch.cuda.Stream) -> tuple[Batch, Tensor]:
    current = torch.cuda.current_stream(images.device)
    current.wait_stream(stream)
    # its memory is not to be used again before the computation is through with it
    images.record_stream(current)
    return batch, images
