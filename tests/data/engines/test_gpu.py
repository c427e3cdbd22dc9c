"""`data.decode=gpu`: all but the decoder itself on whatever device there is, and the decoder where
there is a GPU.
"""

import numpy as np
import pytest
import torch
from helpers.scenes import by_pillow, saved, scene

from fastlt.data.engines.gpu import GpuEngine, torchvision_decoder, turned
from fastlt.data.engines.interface import Options
from fastlt.data.engines.torch import TorchEngine
from fastlt.data.geometry import Geometry
from fastlt.data.plan import Plan, Sampling
from fastlt.decode.images import decode
from fastlt.errors import UserError

CPU = torch.device("cpu")
# grey levels on average: a triangle of weights where the other engines average over areas
DIFFERENCE = 4


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry("random-resized-crop", 24, flip=True),
        Geometry("pad-crop", 24, flip=True, padding=8),
        Geometry("centre-crop", 24, resize=30),
    ],
    ids=lambda geometry: geometry.kind,
)
def test_every_kind_of_image_is_near_to_the_reference(mixed_pack, geometry):
    split = mixed_pack.train
    batches = [
        batch
        for epoch in range(2)
        for batch in Plan(split, 1, 1, geometry, Sampling(), 5, seed=1).epoch(epoch)
    ]
    engine = GpuEngine(split, Options(24, 2), by_pillow)
    tiny = next(i for i in range(len(split)) if split.key(i) == "a/tiny.jpg")
    for batch, made, wanted in zip(
        batches,
        engine.batches(batches),
        TorchEngine(split, Options(24, 0)).batches(batches),
        strict=True,
    ):
        difference = (made.int() - wanted.int()).abs().float().mean((1, 2, 3)).numpy()
        assert (
            made.dtype == torch.uint8
            and (difference[batch.images != tiny] < DIFFERENCE).all()
            and (difference < 12).all()
        )
    engine.close()


@pytest.mark.parametrize("turn", range(1, 9))
def test_images_are_turned_upright(turn):
    data = saved(scene(30, 50), "JPEG", turn)
    (stored,) = by_pillow([torch.frombuffer(bytearray(data), dtype=torch.uint8)])
    made = turned(stored, torch.frombuffer(bytearray(data), dtype=torch.uint8))
    assert np.array_equal(made.permute(1, 2, 0).numpy(), decode(data))


def test_what_fails_on_the_device_is_replaced_or_stops(mixed_pack):
    split = mixed_pack.train
    batches = list(Plan(split, 1, 1, Geometry("centre-crop", 24), Sampling(), 5, seed=1).epoch(0))

    def never(data):
        raise RuntimeError("out of order")

    engine = GpuEngine(split, Options(24, 2), never)
    for made, wanted in zip(
        engine.batches(batches), TorchEngine(split, Options(24, 0)).batches(batches), strict=True
    ):
        assert (made.int() - wanted.int()).abs().float().mean() < DIFFERENCE  # by Pillow
    assert not engine.damaged


def test_without_a_gpu_it_is_refused():
    with pytest.raises(UserError, match=r"data\.decode=gpu needs an NVIDIA GPU"):
        torchvision_decoder(CPU)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_the_gpus_own_decoder(mixed_pack):
    split, device = mixed_pack.train, torch.device("cuda")
    batches = list(
        Plan(
            split, 1, 1, Geometry("random-resized-crop", 24, flip=True), Sampling(), 5, seed=1
        ).epoch(0)
    )
    for made, wanted in zip(
        GpuEngine(split, Options(24, 2, device=device)).batches(batches),
        TorchEngine(split, Options(24, 0)).batches(batches),
        strict=True,
    ):
        assert made.device.type == "cuda"
        assert (made.cpu().int() - wanted.int()).abs().float().mean() < DIFFERENCE
