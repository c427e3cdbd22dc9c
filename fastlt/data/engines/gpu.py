"""The torch engine with `data.decode=gpu`: a GPU decodes the JPEGs, cuts and resizes them; for
machines without DALI.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlt.data.damage import Inspector, stand_in
from fastlt.data.engines.dali import placed
from fastlt.data.engines.interface import NO_GPU_DECODER, Options
from fastlt.data.plan import Batch
from fastlt.decode.images import TURNS, BadImage, open_image, orientation
from fastlt.errors import UserError
from fastlt.packing.reader import Split, check_shards, picture

AHEAD = 2  # batches that are read from the disk meanwhile
PATIENCE = 300  # seconds for reading one: far more than any takes, but not for ever
# encoded JPEGs, (bytes,) uint8, to (3, H, W) uint8 on the device, not turned
Decoder = Callable[[list[Tensor]], list[Tensor]]


def torchvision_decoder(device: torch.device) -> Decoder:
    """Return torchvision's decoder. Raises UserError where it, or a GPU, is missing."""
    if device.type != "cuda":
        raise UserError(NO_GPU_DECODER)
    try:
        from torchvision.io import ImageReadMode, decode_jpeg
    except (ImportError, RuntimeError) as error:
        raise UserError(f"{NO_GPU_DECODER} ({error})") from error

    def decode(data: list[Tensor]) -> list[Tensor]:
        # torchvision decodes on a stream of its own that does not wait for the caller's, into
        # memory that kernels queued before may still read or write: without this, a training with
        # work queued ahead learns from corrupted images and overwrites its own tensors.
        torch.cuda.current_stream(device).synchronize()
        return decode_jpeg(data, mode=ImageReadMode.RGB, device=device)

    return decode


class GpuEngine:
    """The torch engine for `data.decode=gpu`; strict and `damaged` are as in TorchEngine.

    An image that is no JPEG, or that the device cannot decode, is left to Pillow. `decoder` is
    torchvision's unless another one is given.
    """

    name = "torch"
    order = 50
    decode = "gpu"

    def __init__(self, split: Split, options: Options, decoder: Decoder | None = None) -> None:
        check_shards(split)
        self.damaged: dict[int, str] = {}
        self._split, self._size = split, options.size
        self._device, self._strict = options.device, options.strict
        self._decode = decoder or torchvision_decoder(options.device)
        self._reader = ThreadPoolExecutor(1, "fastlt-read")
        self._inspector = Inspector(split, options.workers)

    @staticmethod
    def suits(split: Split, options: Options) -> bool:
        """Return whether decoding on a GPU was asked for."""
        return options.decode == "gpu"

    @staticmethod
    def obstacle(split: Split, options: Options) -> str | None:
        """Return a sentence where another decode is asked for, or the decoder is missing."""
        if options.decode != "gpu":
            return "this engine is for data.decode=gpu"
        try:
            torchvision_decoder(options.device)
        except UserError as error:
            return str(error)
        return None

    def batches(self, batches: Iterable[Batch]) -> Generator[Tensor, None, None]:
        """The images of each batch, (n, size, size, 3) uint8 on the device, the caller's to keep.

        UserErrors as in TorchEngine.
        """
        left = iter(batches)
        read: deque[tuple[Batch, Future[list[Tensor | None]]]] = deque()
        while True:
            for batch in islice(left, AHEAD - len(read)):
                read.append((batch, self._reader.submit(self._read, batch)))
            if not read:
                return
            batch, data = read.popleft()
            yield self._made(batch, data.result(timeout=PATIENCE))

    def _read(self, batch: Batch) -> list[Tensor | None]:
        """The bytes of the JPEGs, copied; None for other images, and for damaged ones."""
        views = [self._split.read(image) for image in batch.images.tolist()]
        is_sound = [view[:2] == b"\xff\xd8" for view in views] & ~self._inspector.damaged(
            batch.images
        )
        return [
            torch.frombuffer(bytearray(view), dtype=torch.uint8) if sound else None
            for view, sound in zip(views, is_sound, strict=True)
        ]

    def _made(self, batch: Batch, data: list[Tensor | None]) -> Tensor:
        out = torch.zeros(
            len(data), self._size, self._size, 3, dtype=torch.uint8, device=self._device
        )
        jpegs = [i for i, encoded in enumerate(data) if encoded is not None]
        decoded = dict(
            zip(
                jpegs,
                self._decoded([encoded for encoded in data if encoded is not None]),
                strict=True,
            )
        )
        corner, sides, made, start = placed(batch, self._split, self._size)
        for i, encoded in enumerate(data):
            image = decoded.get(i)
            upright = None if image is None or encoded is None else turned(image, encoded)
            if upright is None or upright.shape[1:] != self._sides(batch.images[i]):
                upright = self._by_pillow(batch, i)
            if upright is None:
                out[i] = self._replaced(batch, i)
            else:
                place(
                    upright,
                    corner[i],
                    sides[i],
                    made[i].astype(int),
                    start[i],
                    bool(batch.flips[i]),
                    out[i],
                )
        return out

    def _decoded(self, data: list[Tensor]) -> list[Tensor | None]:
        """None for what the device cannot decode: together they fail together, so then each is
        tried alone.
        """
        if not data:
            return []
        try:
            return list(self._decode(data))
        except RuntimeError:
            return [self._decoded([one])[0] for one in data] if len(data) > 1 else [None]

    def _sides(self, image: int) -> tuple[int, int]:
        return int(self._split.height[image]), int(self._split.width[image])

    def _by_pillow(self, batch: Batch, i: int) -> Tensor | None:
        """(3, H, W) on the device; None where Pillow cannot either."""
        image = int(batch.images[i])
        try:
            pixels = np.array(picture(self._split, image))
        except UserError as error:
            if self._strict:
                raise
            self.damaged[image] = str(error)
            return None
        return torch.from_numpy(pixels).to(self._device).permute(2, 0, 1)

    def _replaced(self, batch: Batch, i: int) -> Tensor:
        image = int(batch.images[i])
        pixels = stand_in(
            self._split,
            image,
            batch.boxes[i],
            bool(batch.flips[i]),
            self._size,
            self.damaged[image],
        )
        return torch.from_numpy(np.array(pixels)).to(self._device)

    def close(self) -> None:
        """End the threads."""
        self._inspector.close()
        self._reader.shutdown(cancel_futures=True)


def turned(image: Tensor, encoded: Tensor) -> Tensor | None:
    """Return image (3, H, W) turned by its EXIF orientation; None if its header is unreadable."""
    try:
        turn = orientation(open_image(encoded.numpy().tobytes()))
    except BadImage:
        return None
    if turn not in TURNS:
        return image
    if turn >= 5:
        image = image.transpose(1, 2)
    backwards = [axis for axis, turns in ((1, (3, 4, 7, 8)), (2, (2, 3, 6, 7))) if turn in turns]
    return image.flip(backwards) if backwards else image


def place(
    image: Tensor, corner: Any, sides: Any, made: Any, start: Any, flip: bool, out: Tensor
) -> None:
    """Resize a part of image (3, H, W) and put it into out (size, size, 3): see `placed`."""
    (top, left), (height, width) = corner.tolist(), sides.tolist()
    part = image[None, :, top : top + height, left : left + width].float()
    part = torch.nn.functional.interpolate(
        part, made.tolist(), mode="bilinear", antialias=True, align_corners=False
    )
    square = torch.zeros(3, *out.shape[:2], device=image.device)
    (row, column), (rows, columns) = (-start).tolist(), part.shape[2:]
    inside = square[:, row : row + rows, column : column + columns]
    inside.copy_(part[0, :, : inside.shape[1], : inside.shape[2]])
    out.copy_(
        (square.flip(2) if flip else square).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
    )
