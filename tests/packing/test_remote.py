"""Packs at an address: the same images, within the cache's bound, and an end to every wait."""

import errno
import functools
import http.server
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.scenes import QUIET, saved, scene

from fastlt.data.geometry import Geometry
from fastlt.data.loader import Loader
from fastlt.data.plan import Plan, Sampling
from fastlt.decode.images import decode
from fastlt.errors import UserError
from fastlt.packing import remote
from fastlt.packing.reader import Pack, open_pack
from fastlt.packing.sources import read_collection
from fastlt.packing.writer import PackOptions, write_pack

GEOMETRY = Geometry("random-resized-crop", 24, flip=True)
SHARD = 12_000  # bytes


@pytest.fixture(scope="module")
def pack(tmp_path_factory) -> Pack:
    """24 photos of two classes, in 8 shards or so."""
    folder = tmp_path_factory.mktemp("remote")
    for split, count in (("train", 12), ("val", 2)):
        for name in "ab":
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                (folder / split / name / f"{i}.jpg").write_bytes(
                    saved(scene(60 + i, 80 + ord(name)), "JPEG")
                )
    collection = read_collection(folder / "train", None, folder / "val", None, None, None)
    return open_pack(
        write_pack(collection, PackOptions(folder / "pack", workers=1, shard_size=SHARD), QUIET)
    )


class Server(http.server.ThreadingHTTPServer):
    """Files of a folder; `asked` are the paths, in order."""

    def __init__(self, folder: Path) -> None:
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/pack"


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self) -> None:
        self.server.asked.append(self.path)
        super().do_GET()

    def log_message(self, *arguments) -> None:
        pass


@pytest.fixture
def server(pack, tmp_path, monkeypatch):
    pytest.importorskip("aiohttp", reason="no aiohttp here: it comes with the extra `remote`")
    monkeypatch.setenv("FASTLT_CACHE", str(tmp_path / "cache"))
    shutil.copytree(pack.path, tmp_path / "served" / "pack")
    made = Server(tmp_path / "served")
    yield made
    made.shutdown()
    made.server_close()


def kept_bytes(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.rglob("*.tar"))


def plan_of(split, window: int = 0, **ranks) -> Plan:
    return Plan(split, 2, 2, GEOMETRY, Sampling(), 4, seed=1, window=window, **ranks)


def test_the_images_are_those_of_the_pack(server, pack):
    found = open_pack(server.url)
    assert found.id == pack.id and len(found.train) == len(pack.train)
    assert not any(path.endswith(".tar") for path in server.asked)  # until an image is wanted
    for i in range(len(pack.train)):
        assert bytes(found.train.read(i)) == bytes(pack.train.read(i))
    assert found.train.where(3).startswith(f"{server.url}/train/train-")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_gives_the_same_and_each_shard_comes_once(server, pack, workers):
    found = open_pack(server.url + "/")
    here, there = (
        Loader(split, 24, "torch", workers, decode="auto") for split in (pack.train, found.train)
    )
    for epoch in range(2):
        made, wanted = (
            [x for _, x in loader.iterate(plan_of(pack.train).epoch(epoch))]
            for loader in (there, here)
        )
        assert all(torch.equal(a, b) for a, b in zip(made, wanted, strict=True))
    shards = [path for path in server.asked if path.endswith(".tar")]
    assert sorted(shards) == sorted(f"/pack/train/{name}" for name in pack.train.shards)
    here.close()
    there.close()


def test_the_cache_keeps_to_its_bound(server, pack, tmp_path):
    limit = 4 * SHARD
    found = open_pack(server.url, limit)
    assert len(pack.train.shards) > 4
    for epoch in range(2):
        for batch in plan_of(found.train, window=limit // 2).epoch(epoch):
            for image in batch.images.tolist():
                assert decode(found.train.read(image)).shape == decode(pack.train.read(image)).shape
                assert kept_bytes(tmp_path / "cache") <= limit
    asked = [path for path in server.asked if path.endswith(".tar")]
    # by windows: hardly more than once an epoch
    assert len(asked) <= 2 * 2 * len(pack.train.shards)


def test_a_bound_that_was_lowered_holds_for_what_is_there(server, pack, tmp_path):
    whole = open_pack(server.url)
    for image in range(len(whole.train)):
        whole.train.read(image)
    assert kept_bytes(tmp_path / "cache") > 4 * SHARD
    open_pack(server.url, 2 * SHARD).train.read(0)
    assert kept_bytes(tmp_path / "cache") <= 2 * SHARD
    with pytest.raises(UserError, match=r"the cache may hold 1,000: raise data\.cache_gb"):
        open_pack(server.url, 1000).train.read(0)


def test_a_cache_that_cannot_be_made_is_told(server, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTLT_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"the cache .* cannot be made \(.*\): set FASTLT_CACHE"):
        open_pack(server.url)


def test_a_shard_larger_than_the_cache_is_refused(server):
    with pytest.raises(UserError, match=r"the cache may hold 1,000: raise data\.cache_gb"):
        open_pack(server.url, 1000).train.read(0)


def test_a_second_process_takes_what_is_there(server):
    open_pack(server.url).train.read(0)
    before = len(server.asked)
    open_pack(server.url).train.read(0)
    assert len(server.asked) == before + len(remote.TABLES)


def test_damage_on_the_way_or_on_the_disk_is_noticed(server, pack, tmp_path, monkeypatch):
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    found = open_pack(server.url)
    path = found.train.fetched(0)
    path.write_bytes(b"cut short")
    assert bytes(open_pack(server.url).train.read(0)) == bytes(pack.train.read(0))
    served = tmp_path / "served/pack/train" / pack.train.shards[1]
    served.write_bytes(served.read_bytes()[:-1] + b"x")
    with pytest.raises(
        UserError, match=r"cannot be read after 3 attempts: .* not those of the manifest"
    ):
        open_pack(server.url).train.fetched(1)
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_a_shard_that_vanishes_ends_the_epoch_with_its_address(server, pack, tmp_path):
    found = open_pack(server.url)
    (tmp_path / "served/pack/train" / pack.train.shards[2]).unlink()
    loader = Loader(found.train, 24, "torch", 0)
    with pytest.raises(
        UserError, match=rf"{pack.train.shards[2]} cannot be read \(FileNotFoundError\)"
    ):
        list(loader.iterate(plan_of(found.train).epoch(0)))


def test_a_server_that_says_nothing_is_given_up(pack, monkeypatch):
    blocked = threading.Event()
    monkeypatch.setattr(remote, "_read_blocks", lambda *_: blocked.wait())
    monkeypatch.setattr(remote, "BLOCK_PATIENCE", 0.05)
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    with pytest.raises(UserError, match="after 3 attempts: nothing came for"):
        open_pack("http://127.0.0.1:9/pack")
    blocked.set()


def test_a_full_disk_is_told(server, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(remote, "_stream", full)
    with pytest.raises(UserError, match=r"the disk with the cache .* is full"):
        open_pack(server.url)


@pytest.mark.parametrize(
    ("address", "said"),
    [("nowhere://x/pack", "nowhere"), ("memory://none/pack", "is the address right")],
)
def test_an_address_that_leads_nowhere(address, said, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLT_CACHE", str(tmp_path))
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    with pytest.raises(UserError, match=said):
        open_pack(address)


def test_what_an_address_is():
    assert all(map(remote.is_remote, ("s3://a/b", "https://x.y/z", "memory://m", "gs://b")))
    assert not any(map(remote.is_remote, ("/a/b", "a/b", "C:/a", "pack", "./s3://")))


def test_ffcv_is_refused(server):
    with pytest.raises(UserError, match=r"needs its pack on this machine"):
        Loader(open_pack(server.url).train, 24, "ffcv", 0)


# --- the order that a small cache needs


def test_windows_hold_every_image_once_and_shuffle(pack):
    orders = [plan_of(pack.train, window=2 * SHARD).order(epoch) for epoch in range(2)]
    assert all(sorted(order.tolist()) == list(range(len(pack.train))) for order in orders)
    assert orders[0].tolist() != orders[1].tolist()
    shards = pack.train.shard[orders[0]]
    first_last = [
        (np.flatnonzero(shards == s)[0], np.flatnonzero(shards == s)[-1]) for s in np.unique(shards)
    ]
    # a shard is done with soon
    assert max(last - first for first, last in first_last) < len(pack.train) // 2
    assert (np.diff(shards) != 0).sum() > len(np.unique(shards))  # and yet mixed with others


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_a_windowed_order(pack, world):
    alone = list(plan_of(pack.train, window=2 * SHARD).epoch(0))
    ranks = [
        list(plan_of(pack.train, window=2 * SHARD, rank=rank, world=world).epoch(0))
        for rank in range(world)
    ]
    for step, whole in enumerate(alone):
        parts = np.concatenate([batches[step].images for batches in ranks])
        assert sorted(parts.tolist()) == sorted(whole.images.tolist())
