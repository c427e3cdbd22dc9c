"""The contenders of `fastlt bench-data`.

All make the same JPEGs, cut at random, to batches (n, size, size, 3) uint8.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor

from fastlt.data.geometry import Geometry
from fastlt.data.loader import Loader
from fastlt.data.plan import Plan, Sampling
from fastlt.decode.region import check_transcoder
from fastlt_benchmarks.loaders.images import FILES, PACK, STOCK, TRANSCODED
from fastlt_benchmarks.loaders.limits import DecodingAlone
from fastlt_benchmarks.loaders.peers import dali_stock, ffcv_stock, pillow, simplejpeg, spdl
from fastlt_benchmarks.loaders.trials import Contender, Source, Task


def all_contenders() -> list[Contender]:
    """Return the contenders, those that fork first: a fork would tear threads apart."""
    return [
        Contender(
            "pillow",
            "DataLoader, an item a file: Pillow opens, crops, resizes",
            "peer",
            FILES,
            pillow,
            forks=True,
        ),
        Contender(
            "simplejpeg",
            "the same, by simplejpeg, resized by OpenCV or else Pillow",
            "peer",
            FILES,
            simplejpeg,
            forks=True,
        ),
        ours("torch-exact", "data.engine=torch data.decode=exact", PACK),
        ours("torch-region", "data.engine=torch data.decode=region", PACK),
        ours("torch-transcoded", "the same, of a pack written with --transcode", TRANSCODED),
        Contender(
            "spdl",
            "SPDL's pipeline: FFmpeg decodes, crops, resizes in threads",
            "peer",
            FILES,
            spdl,
        ),
        Contender(
            "ffcv-stock",
            "FFCV's RandomResizedCropRGBImageDecoder and flip",
            "peer",
            STOCK,
            ffcv_stock,
        ),
        ours("ffcv-exact", "data.engine=ffcv data.decode=exact", PACK),
        ours("ffcv-region", "data.engine=ffcv data.decode=region", PACK),
        ours("ffcv-transcoded", "the same, of a pack written with --transcode", TRANSCODED),
        Contender(
            "dali-stock",
            "DALI's decoders.image_random_crop, resize and flip",
            "peer",
            FILES,
            dali_stock,
        ),
        ours("dali", "data.engine=dali", PACK),
    ]


def all_limits() -> list[Contender]:
    """Return what no loader can beat."""
    whole, scaled = (partial(decoding_alone, is_scaled) for is_scaled in (False, True))
    return [
        Contender(
            "decoding",
            "libjpeg-turbo alone, fast DCT, whole images, a thread a core",
            "limit",
            PACK,
            whole,
        ),
        Contender(
            "decoding-scaled",
            "the same, to the least of 1/1 .. 1/8 that is not below --size",
            "limit",
            PACK,
            scaled,
        ),
    ]


def ours(name: str, what: str, form: str) -> Contender:
    """Return one of fastlt's engines as a contender."""
    engine, _, decode = name.partition("-")
    start = partial(
        start_ours, engine=engine, decode="exact" if decode == "exact" else "region", form=form
    )
    return Contender(name, what, "ours", form, start, forks=engine == "torch")


def start_ours(task: Task, engine: str, decode: str, form: str = PACK, **options: Any) -> Source:
    """Return what `fastlt train` loads with, in a plan's order; options as of Loader."""
    if form == TRANSCODED:
        check_transcoder("transcoding")
    pack = task.images.transcoded if form == TRANSCODED else task.images.pack
    assert pack is not None
    settings = {
        "workers": task.workers,
        "betons": pack.betons("train"),
        "decode": decode,
        "device": task.device,
        **options,
    }
    loader = Loader(pack.train, task.size, engine, **settings)
    geometry = Geometry("random-resized-crop", task.size, flip=True)
    plan = Plan(
        pack.train,
        num_targets=1,
        num_classes=1,
        geometry=geometry,
        sampling=Sampling(),
        batch=task.batch,
        seed=0,
    )

    def epoch(number: int) -> Iterator[Tensor]:
        for _, images in loader.iterate(plan.epoch(number)):
            yield images

    return Source(epoch, loader.close)


def decoding_alone(is_scaled: bool, task: Task) -> Source:
    """Return decoding without anything behind it."""
    decoding = DecodingAlone(task.images.split, task.size if is_scaled else None)
    return Source(decoding.epoch, decoding.close)
