"""Small images of one size, such as CIFAR's, are decoded once and kept: cropping them costs less
than handing them over.
"""

from collections.abc import Callable, Generator, Iterable
from functools import partial

import numpy as np
import torch
from numpy.lib.stride_tricks import as_strided
from PIL import Image

from fastlt.data.engines.interface import NO_GPU_DECODER, Options
from fastlt.data.plan import Batch
from fastlt.data.prefetch import to_device
from fastlt.decode.images import fill_box
from fastlt.packing.reader import Split, check_shards, identity, picture
from fastlt.utils.files import whole_file
from fastlt.utils.lock import in_turn

MAX_SIDE = 64  # pixels
MAX_BYTES = 512 * 2**20


def fits(split: Split) -> bool:
    """Whether the decoded split is small enough to be kept in memory."""
    if len(split) == 0:
        return False
    height, width = int(split.height[0]), int(split.width[0])
    one_size = bool((split.height == height).all() and (split.width == width).all())
    return (
        one_size and max(height, width) <= MAX_SIDE and 3 * height * width * len(split) <= MAX_BYTES
    )


def decoded(split: Split) -> np.ndarray:
    """(n, H, W, 3) uint8."""
    images = np.empty((len(split), int(split.height[0]), int(split.width[0]), 3), np.uint8)
    for i in range(len(split)):
        images[i] = np.asarray(picture(split, i))
    return images


class ResidentEngine:
    """The engine of small images: all are decoded at the start, exactly, whatever `decode` says.

    On a GPU they are kept, cropped and flipped there. With `shared`, the decoded images are a file
    in that folder that is mapped into memory, once for all processes that train on them. Raises
    UserError naming a damaged image.
    """

    name = "resident"
    order = 10
    decode = "exact"

    def __init__(self, split: Split, options: Options) -> None:
        check_shards(split)
        self.damaged: dict[int, str] = {}
        self._size, self._device = options.size, options.device
        self._shared, self._split = options.shared, split
        self._margin = 0  # black pixels around each image
        self._images = self._kept(partial(decoded, split))
        self._send()

    @staticmethod
    def suits(split: Split, options: Options) -> bool:
        """Return True: where it can be used, nothing is faster."""
        return True

    @staticmethod
    def obstacle(split: Split, options: Options) -> str | None:
        """Return a sentence where the images differ in size or do not fit into memory."""
        if options.decode == "gpu" and options.device.type != "cuda":
            return NO_GPU_DECODER
        if fits(split):
            return None
        return (
            f"the resident engine keeps images of one size, at most {MAX_SIDE} pixels a side and "
            f"{MAX_BYTES // 2**20} MiB in all, and those of {split.folder} are not such: set "
            "data.engine=auto"
        )

    def _kept(self, make: Callable[[], np.ndarray]) -> np.ndarray:
        """What is made, in memory or, where it is to be shared, in a file, which may be there
        already.
        """
        if self._shared is None:
            return make()
        path = self._shared / f"{identity(self._split)}-{self._margin}.npy"
        with in_turn(
            path.with_suffix(".lock")
        ):  # of processes that begin together, one makes it and the others wait
            if not path.is_file():
                with whole_file(path) as temporary, temporary.open("wb") as file:
                    np.save(file, make())
            return np.load(path, mmap_mode="r")

    def batches(self, batches: Iterable[Batch]) -> Generator[torch.Tensor, None, None]:
        """The images of each batch, (n, size, size, 3) uint8, the caller's to keep; crops of their
        own size on the device.
        """
        for batch in batches:
            if (batch.boxes[:, 2:] == self._size).all():
                self._surround(self._overhang(batch.boxes[:, 0], batch.boxes[:, 1]))
                yield (
                    torch.from_numpy(self._shifted(batch))
                    if self._there is None
                    else self._shifted_there(batch, self._there)
                )
            else:
                yield torch.from_numpy(self._resized(batch))

    def _shifted_there(self, batch: Batch, images: torch.Tensor) -> torch.Tensor:
        """As _shifted, on the device."""
        rows = np.stack(
            [
                batch.images,
                batch.boxes[:, 0] + self._margin,
                batch.boxes[:, 1] + self._margin,
                batch.flips,
            ]
        )
        places = to_device(torch.from_numpy(rows.astype(np.int64)), self._device)
        return shifted(images, places, self._size)

    def _shifted(self, batch: Batch) -> np.ndarray:
        """Return crops of the output's own size, by one gather out of all possible windows.

        numpy does it faster than torch.
        """
        size, images = self._size, self._images
        top, left = batch.boxes[:, 0], batch.boxes[:, 1]
        count, height, width, _ = images.shape
        windows = as_strided(
            images,
            shape=(count, height - size + 1, width - size + 1, size, 3 * size),
            strides=(*images.strides[:3], images.strides[1], 1),
            writeable=False,
        )
        crops = windows[batch.images, top + self._margin, left + self._margin]
        mirrored = np.arange(3 * size).reshape(size, 3)[::-1].reshape(-1)
        crops[batch.flips] = crops[batch.flips].take(mirrored, axis=2)
        return crops.reshape(-1, size, size, 3)

    def _overhang(self, top: np.ndarray, left: np.ndarray) -> int:
        """Return the pixels by which a batch reaches over the edge at most."""
        height, width = (side - 2 * self._margin for side in self._images.shape[1:3])
        ends = (-top, -left, top + self._size - height, left + self._size - width)
        return max(0, *(int(end.max(initial=0)) for end in ends))

    def _surround(self, margin: int) -> None:
        if margin > self._margin:
            more, bare = margin - self._margin, self._images
            self._margin = margin
            self._images = self._kept(
                lambda: np.pad(bare, ((0, 0), (more, more), (more, more), (0, 0)))
            )
            self._send()

    def _send(self) -> None:
        self._there: torch.Tensor | None = None
        if self._device.type != "cpu":
            # torch wants memory that may be written to
            mine = self._images if self._shared is None else np.array(self._images)
            self._there = torch.from_numpy(mine).to(self._device)

    def _resized(self, batch: Batch) -> np.ndarray:
        out = np.empty((len(batch.images), self._size, self._size, 3), np.uint8)
        bare = slice(self._margin, -self._margin or None)
        for i, image in enumerate(batch.images.tolist()):
            pixels = Image.fromarray(self._images[image, bare, bare])
            out[i] = fill_box(pixels, batch.boxes[i], batch.flips[i], self._size)
        return out

    def close(self) -> None:
        """Nothing is left to end."""


def shifted(images: torch.Tensor, places: torch.Tensor, size: int) -> torch.Tensor:
    """Return windows (n, size, size, 3) of images (N, H, W, 3) uint8.

    places: (4, n) int64, image, top, left, and 1 to mirror it.
    """
    count, height, width, channels = images.shape
    image, top, left, flip = places.unbind()
    steps = images.stride()
    shape = (count, height - size + 1, width - size + 1, size, size * channels)
    crops = images.as_strided(shape, (*steps[:3], steps[1], 1))[image, top, left].view(
        -1, size, size, channels
    )
    return torch.where(flip.bool()[:, None, None, None], crops.flip(2), crops)
