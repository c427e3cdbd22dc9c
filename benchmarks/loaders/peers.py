"""The loaders of others in `fastlt bench-data`, each used as its own documentation says."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.filesize import decimal
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastlt.data.engines.dali import import_dali
from fastlt.data.engines.ffcv.native import import_ffcv, torch_threads_kept
from fastlt_benchmarks.loaders.trials import PATIENCE, Source, Task
from fastlt_benchmarks.loss.contenders import Unavailable, not_installed
from fastlt_benchmarks.timing import free_bytes

# FFCV's loaders until the process ends: numba prints an error where what it compiled is collected
# before.
KEPT: list[Any] = []
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # the defaults of torchvision, FFCV and DALI


def random_box(height: int, width: int) -> tuple[int, int, int, int]:
    """Return (top, left, height, width) of a random resized crop."""
    for _ in range(10):
        area = height * width * random.uniform(*SCALE)
        aspect = math.exp(random.uniform(*map(math.log, RATIO)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, height - h), random.randint(0, width - w), h, w
    h, w = min(height, round(width / RATIO[0])), min(width, round(height * RATIO[1]))
    return (height - h) // 2, (width - w) // 2, h, w


# ---- DataLoader


class FileImages(Dataset):
    """A data set of files. decode: bytes and size to (size, size, 3) uint8."""

    def __init__(
        self, paths: list[str], size: int, decode: Callable[[bytes, int], np.ndarray]
    ) -> None:
        self.paths, self.size, self.decode = paths, size, decode

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, image: int) -> Tensor:
        with open(self.paths[image], "rb") as file:  # noqa: PTH123, for what is measured has no Path in it
            pixels = self.decode(file.read(), self.size)
        if random.random() < 0.5:
            pixels = pixels[:, ::-1]
        return torch.from_numpy(np.ascontiguousarray(pixels))


def data_loader(task: Task, decode: Callable[[bytes, int], np.ndarray]) -> Source:
    """Return torch's DataLoader over the files."""
    loader = DataLoader(
        FileImages(task.images.files, task.size, decode),
        task.batch,
        shuffle=True,
        num_workers=task.workers,
        persistent_workers=True,
        timeout=PATIENCE,
    )
    return Source(lambda number: iter(loader))


def pillow(task: Task) -> Source:
    """Return torch's DataLoader with Pillow."""
    return data_loader(task, decode_pillow)


def decode_pillow(data: bytes, size: int) -> np.ndarray:
    """Return a random crop, decoded by Pillow."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    top, left, height, width = random_box(image.height, image.width)
    crop = image.crop((left, top, left + width, top + height))
    return np.array(crop.resize((size, size), Image.Resampling.BILINEAR))


def simplejpeg(task: Task) -> Source:
    """Return torch's DataLoader with simplejpeg."""
    try:
        from simplejpeg import decode_jpeg
    except ImportError as error:
        raise Unavailable(not_installed(error)) from error
    return data_loader(task, partial(decode_simplejpeg, decode_jpeg))


def decode_simplejpeg(
    decode_jpeg: Callable[[bytes], np.ndarray], data: bytes, size: int
) -> np.ndarray:
    """Return a random crop, decoded by simplejpeg."""
    pixels = decode_jpeg(data)
    top, left, height, width = random_box(*pixels.shape[:2])
    crop = pixels[top : top + height, left : left + width]
    try:
        import cv2
    except ImportError:
        return np.array(Image.fromarray(crop).resize((size, size), Image.Resampling.BILINEAR))
    cv2.setNumThreads(0)  # a worker is a thread already
    return cv2.resize(crop, (size, size), interpolation=cv2.INTER_AREA)


# ---- SPDL


def spdl(task: Task) -> Source:
    """Return a pipeline of SPDL."""
    try:
        import spdl.io
        from spdl.pipeline import PipelineBuilder

        # its library, and FFmpeg's, are loaded at the first use
        spdl.io.demux_image(task.images.files[0])
    except ImportError as error:
        raise Unavailable(
            f"not installed ({error}): pip install spdl-core spdl-io, and FFmpeg's libraries"
        ) from error
    except RuntimeError as error:
        raise Unavailable("it finds no FFmpeg libraries that it knows") from error

    def epoch(number: int) -> Iterator[Tensor]:
        paths = random.sample(task.images.files, len(task.images.files))
        builder = PipelineBuilder().add_source(paths)
        builder = builder.pipe(
            partial(decode_spdl, spdl.io, task.size), concurrency=task.workers
        ).aggregate(task.batch)
        pipeline = builder.pipe(
            lambda frames: spdl.io.to_torch(spdl.io.convert_frames(frames))
        ).add_sink(2)
        with (built := pipeline.build(num_threads=task.workers)).auto_stop():
            yield from built.get_iterator(timeout=PATIENCE)

    return Source(epoch)


def decode_spdl(library: Any, size: int, path: str) -> Any:
    """Return a random crop, decoded by SPDL."""
    packets = library.demux_image(path)
    top, left, height, width = random_box(packets.height, packets.width)
    flip = "hflip," if random.random() < 0.5 else ""
    cut = f"crop={width}:{height}:{left}:{top}:exact=1,scale={size}:{size}:flags=bilinear"
    return library.decode_packets(packets, filter_desc=f"{cut},{flip}format=pix_fmts=rgb24")


# ---- FFCV


def ffcv_stock(task: Task) -> Source:
    """Return FFCV's own loader.

    Its batches are views of buffers that later ones overwrite: one copy less than the others make.
    """
    import_ffcv()
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor

    assert task.images.stock is not None
    ahead, split = 3, task.images.split
    needed = (
        3
        * int(split.height.max())
        * int(split.width.max())
        * min(task.batch, len(split))
        * (ahead + 2)
    )
    if needed > free_bytes(torch.device("cpu")) // 2:
        raise Unavailable(f"its buffers for images this large would take {decimal(needed)}")
    operations = [
        RandomResizedCropRGBImageDecoder((task.size, task.size), SCALE, RATIO),
        RandomHorizontalFlip(),
        ToTensor(),
    ]
    with torch_threads_kept():
        loader = Loader(
            str(task.images.stock),
            task.batch,
            task.workers,
            os_cache=True,
            order=OrderOption.RANDOM,
            drop_last=False,
            batches_ahead=ahead,
            pipelines={"image": operations},
        )
    KEPT.append(loader)

    def epoch(number: int) -> Iterator[Tensor]:
        with torch_threads_kept():
            batches = iter(loader)
            try:
                for (images,) in batches:
                    yield images
            finally:
                batches.close()

    return Source(epoch)


# ---- DALI


def dali_stock(task: Task) -> Source:
    """Return DALI's own pipeline, with external_source.

    Its own readers read on into the next epoch, and so into another contender's time.
    """
    pipeline_def, fn, types = import_dali()
    on_gpu = task.device.type == "cuda"
    left: list[list[str]] = []

    def files() -> list[np.ndarray]:
        if not left:
            raise StopIteration
        return [np.fromfile(path, np.uint8) for path in left.pop(0)]

    @pipeline_def(
        batch_size=task.batch,
        num_threads=task.workers,
        device_id=(task.device.index or 0) if on_gpu else None,
    )
    def pipeline() -> Any:
        data = fn.external_source(source=files, batch=True, dtype=types.UINT8, ndim=1)
        images = fn.decoders.image_random_crop(
            data,
            device="mixed" if on_gpu else "cpu",
            output_type=types.RGB,
            random_area=SCALE,
            random_aspect_ratio=RATIO,
        )
        images = fn.resize(images, size=[task.size, task.size], interp_type=types.INTERP_LINEAR)
        return fn.flip(images, horizontal=fn.random.coin_flip())

    made = pipeline()
    made.build()

    def epoch(number: int) -> Iterator[Tensor]:
        paths = random.sample(task.images.files, len(task.images.files))
        left[:] = [paths[start : start + task.batch] for start in range(0, len(paths), task.batch)]
        made.reset()
        while True:
            try:
                (images,) = made.run()
            except StopIteration:
                return
            yield torch.from_dlpack(images.as_tensor())

    return Source(epoch)
