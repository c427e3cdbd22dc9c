"""The `dali` engine, in which NVIDIA DALI decodes, crops and resizes.

It does so on a GPU, with its JPEG hardware, or else on the CPU.

The plan's boxes, on the plan's images, in the plan's order. Pixels are close to the other engines',
not equal: shrinking weighs pixels by a triangle, where those average over areas.
"""

from collections import deque
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import numpy as np
import torch

from fastlt.data.damage import Inspector
from fastlt.data.engines.interface import HW_DECODER_LOAD as HW_DECODER_LOAD
from fastlt.data.engines.interface import NO_GPU_DECODER, Options
from fastlt.data.engines.interface import PREFETCH as PREFETCH
from fastlt.data.engines.torch import BatchDataset
from fastlt.data.plan import Batch
from fastlt.errors import MissingExtra, UserError
from fastlt.packing.reader import Split, check_shards, picture

LARGEST_BATCH = 2048
# which are damaged, and the inputs, which DALI reads where they are
Fed = tuple[Batch, np.ndarray, tuple[Any, ...]]
# in place of what is damaged: DALI may crash at it
BLANK = np.frombuffer(b"P6 1 1 255\n\0\0\0", np.uint8)


def import_dali() -> tuple[Any, Any, Any]:
    """(pipeline_def, fn, types). Raises UserError that names the extra where DALI is missing."""
    try:
        from nvidia.dali import fn, pipeline_def, types
    except (ImportError, OSError) as error:
        raise MissingExtra(
            f"the dali engine cannot be loaded ({error}): `pip install fastlt[dali]`, or set "
            "data.engine=torch"
        ) from error
    return pipeline_def, fn, types


def has_dali() -> bool:
    """Return whether DALI can be imported."""
    try:
        import_dali()
    except UserError:
        return False
    return True


class DaliEngine:
    """The engine that decodes regions with NVIDIA DALI and delivers the images on `device`.

    strict and `damaged` are as in TorchEngine. Raises UserError where DALI is missing or cannot
    use the device.
    """

    name = "dali"
    order = 20

    def __init__(self, split: Split, options: Options) -> None:
        check_shards(split)
        size, device = options.size, options.device
        self.damaged: dict[int, str] = {}
        self.decode = "gpu" if device.type == "cuda" else "region"
        self._split, self._size, self._device = split, size, device
        self._whole = BatchDataset(split, size, False, options.strict)
        self._inspector = Inspector(split, options.workers)
        self._feed: Iterator[tuple[Any, ...]] = iter(())
        self._reading = False
        settings = {
            "num_threads": max(1, options.workers),
            "prefetch_queue_depth": options.prefetch,
        }
        self._build = lambda: _build(
            lambda: next(self._feed), size, device, settings, options.hw_decoder_load
        )
        self._pipeline: Any = self._build()

    @staticmethod
    def suits(split: Split, options: Options) -> bool:
        """Return whether images may be decoded on a GPU: on a CPU, others are faster."""
        return options.device.type == "cuda" and options.decode in ("auto", "gpu")

    @staticmethod
    def obstacle(split: Split, options: Options) -> str | None:
        """Return a sentence where DALI is missing, or cannot decode as asked."""
        if options.decode == "exact":
            return (
                "the dali engine decodes regions only: set data.engine=torch or ffcv for exact "
                "decoding"
            )
        if options.decode == "gpu" and options.device.type != "cuda":
            return NO_GPU_DECODER
        try:
            import_dali()
        except UserError as error:
            return str(error)
        return None

    def batches(self, batches: Iterable[Batch]) -> Generator[torch.Tensor, None, None]:
        """The images of each batch, (n, size, size, 3) uint8 on the engine's device, the caller's
        to keep.

        UserErrors as in TorchEngine. One epoch at a time: RuntimeError otherwise.
        """
        if self._reading:
            raise RuntimeError("the engine is still in another epoch: close its iterator first")
        self._reading = True
        left, again = iter(batches), deque[Batch]()
        fed: deque[Fed] = deque()
        at_end = False
        try:
            while not at_end:
                self._feed = self._inputs(again, left, fed)
                at_end = yield from self._run(fed)
                if not at_end:
                    # DALI gives up a whole pipeline for one image: Pillow makes this batch, and a
                    # new one goes on behind it.
                    self._renew()
                    failed, *rest = (batch for batch, *_ in fed)
                    again, fed = deque(rest), deque()
                    yield self._made_whole(failed)
        finally:
            self._reading = False
            if (
                not at_end
            ):  # batches that nobody asked for any more would come first in the next epoch
                self._renew()

    def _renew(self) -> None:
        """The old one goes first: its threads may still read what it was fed."""
        self._pipeline = None
        self._pipeline = self._build()

    def _run(self, fed: "deque[Fed]") -> Generator[torch.Tensor, None, bool]:
        """True at the plan's end; False where DALI fails at the first batch of `fed`."""
        while True:
            try:
                (images,) = self._pipeline.run()
            except StopIteration:
                self._pipeline.reset()
                return True
            except RuntimeError as error:
                if not fed or "decoders" not in str(error):
                    raise
                return False
            batch, damaged, _ = fed.popleft()
            made = torch.from_dlpack(images.as_tensor())
            yield self._repaired(made, batch, damaged) if damaged.any() else made

    def _repaired(self, made: torch.Tensor, batch: Batch, damaged: np.ndarray) -> torch.Tensor:
        made = made.clone()
        for i in np.flatnonzero(damaged).tolist():
            pixels = self._whole.exact(
                int(batch.images[i]), batch.boxes[i], bool(batch.flips[i]), self.damaged
            )
            made[i] = torch.from_numpy(np.array(pixels)).to(made.device)
        return made

    def _made_whole(self, batch: Batch) -> torch.Tensor:
        made = self._whole[batch]
        if isinstance(made, str):
            raise UserError(made)
        images, damaged = made
        self.damaged |= damaged
        return images.to(self._device)

    def _inputs(
        self, again: Iterable[Batch], left: Iterator[Batch], fed: "deque[Fed]"
    ) -> Iterator[tuple[Any, ...]]:
        """What the pipeline asks for, batch by batch, kept in `fed`: views of the mapped bytes, and
        where to cut.
        """
        for source in (again, left):
            for batch in source:
                damaged = self._inspector.damaged(batch.images)
                data = [
                    BLANK if bad else self._bytes(i)
                    for i, bad in zip(batch.images.tolist(), damaged, strict=True)
                ]
                places = placed(batch, self._split, self._size)
                for values, blank in zip(places, (0, 1, 1, 0), strict=True):
                    values[damaged] = blank
                inputs = data, *places, batch.flips.astype(np.int32)
                fed.append((batch, damaged, inputs))
                yield inputs

    def _bytes(self, image: int) -> np.ndarray:
        """The stored bytes, (n,) uint8, without a copy.

        WebP as a pixel map, for not all of it can be read by DALI.
        """
        data = self._split.read(image)
        if bytes(data[:4]) != b"RIFF":
            return np.frombuffer(data, np.uint8)
        pixels = picture(self._split, image)
        return np.frombuffer(b"P6 %d %d 255\n" % pixels.size + pixels.tobytes(), np.uint8)

    def close(self) -> None:
        """End the threads."""
        self._inspector.close()
        del self._pipeline


def placed(
    batch: Batch, split: Split, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The part of each box that is inside its image, (n, 2) int32 corner and sides; its sides in
    the output, (n, 2) float32, and where the output begins, counted from it, (n, 2) int32.
    """
    corner, sides = batch.boxes[:, :2].astype(np.int64), batch.boxes[:, 2:].astype(np.int64)
    limits = np.stack([split.height[batch.images], split.width[batch.images]], axis=1)
    low, high = corner.clip(0, limits - 1), (corner + sides).clip(1, limits)
    high = np.maximum(high, low + 1)
    first, last = (np.rint((edge - corner) * size / sides).astype(np.int64) for edge in (low, high))
    last = np.maximum(last, first + 1)
    return (
        low.astype(np.int32),
        (high - low).astype(np.int32),
        (last - first).astype(np.float32),
        (-first).astype(np.int32),
    )


def _build(
    source: Any, size: int, device: torch.device, settings: dict[str, int], hw_decoder_load: float
) -> Any:
    pipeline_def, fn, types = import_dali()
    on_gpu = device.type == "cuda"

    @pipeline_def(exec_dynamic=True)
    def pipeline() -> Any:
        data, corner, sides, made, start, flip = fn.external_source(
            source=source,
            num_outputs=6,
            batch=True,
            no_copy=True,
            dtype=[types.UINT8, types.INT32, types.INT32, types.FLOAT, types.INT32, types.INT32],
            ndim=[1, 1, 1, 1, 1, 0],
        )
        hardware = {"hw_decoder_load": hw_decoder_load} if on_gpu else {}
        images = fn.decoders.image_slice(
            data,
            corner,
            sides,
            device="mixed" if on_gpu else "cpu",
            output_type=types.RGB,
            axis_names="HW",
            normalized_anchor=False,
            normalized_shape=False,
            **hardware,
        )
        images = fn.resize(images, size=made, interp_type=types.INTERP_LINEAR, antialias=True)
        images = fn.slice(
            images,
            start=start,
            shape=[size, size],
            axes=[0, 1],
            out_of_bounds_policy="pad",
            fill_values=0,
        )
        return fn.flip(images, horizontal=flip)

    try:
        made = pipeline(
            batch_size=LARGEST_BATCH, device_id=(device.index or 0) if on_gpu else None, **settings
        )
        made.build()
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"DALI cannot use {device} ({reason}): set data.engine=torch, or train.device=cpu"
        ) from error
    return made
