"""Small images that are decoded once, for one process or for several."""

import multiprocessing
import threading
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastlt.data.engines import resident
from fastlt.data.engines.interface import Options
from fastlt.data.engines.resident import ResidentEngine, decoded
from fastlt.data.geometry import Geometry
from fastlt.data.plan import Plan, Sampling
from fastlt.packing.reader import identity, open_pack


@pytest.mark.parametrize("padding", [0, 4])
def test_what_is_shared_is_what_each_would_decode(small_pack, tmp_path, padding, monkeypatch):
    split = open_pack(small_pack).train
    batches = list(
        Plan(
            split, 3, 5, Geometry("pad-crop", 16, flip=True, padding=padding), Sampling(), 8, seed=1
        ).epoch(0)
    )
    own = list(ResidentEngine(split, Options(16)).batches(batches))
    first = list(ResidentEngine(split, Options(16, shared=tmp_path)).batches(batches))
    monkeypatch.setattr(
        "fastlt.data.engines.resident.decoded", lambda split: pytest.fail("decoded again")
    )
    engine = ResidentEngine(split, Options(16, shared=tmp_path))
    second = list(engine.batches(batches))
    assert isinstance(engine._images, np.memmap) and not engine._images.flags.writeable
    for a, b, c in zip(own, first, second, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_labels_do_not_matter_and_other_images_do(small_pack):
    pack = open_pack(small_pack)
    assert identity(pack.train) == identity(
        replace(pack.train, label=pack.train.label[::-1].copy())
    )
    assert (
        len({identity(pack.train), identity(pack.val), identity(pack.train.subset(np.arange(5)))})
        == 3
    )


@pytest.mark.slow
def test_processes_that_begin_together_decode_once(small_pack, tmp_path):
    split, spawn = open_pack(small_pack).train, multiprocessing.get_context("spawn")
    ready = spawn.Barrier(3)
    processes = [
        spawn.Process(target=begin_together, args=(split, tmp_path, ready)) for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "told").read_text() == "decoded\n" and len(list(tmp_path.glob("*.npy"))) == 1


def begin_together(split, shared, ready):
    def decode(split):
        with (shared / "told").open("a") as told:
            told.write("decoded\n")
        with suppress(
            threading.BrokenBarrierError
        ):  # others that came here too, before there is a file, would be told
            ready.wait(timeout=1)
        return decoded(split)

    resident.decoded = decode
    ready.wait()
    ResidentEngine(split, Options(16, shared=shared))
