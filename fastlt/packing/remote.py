"""Packs that lie elsewhere (https://, s3://, whatever fsspec reads): shards come when they are
asked for, and stay on the local disk up to a bound, the least recently used going first. Processes
share what is there. Every wait has an end.
"""

import hashlib
import os
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastlt.errors import MissingExtra, UserError
from fastlt.utils.files import is_disk_full, whole_file
from fastlt.utils.lock import take_lock

TABLES = ("manifest.json", "classes.json", "index.npz")
ATTEMPTS = 3
BLOCK = 4 * 2**20  # bytes
BLOCK_PATIENCE = 60  # seconds for a block: then the connection counts as dead
LOCK_PATIENCE = 3600  # seconds for another process that fetches the same shard
BATCHES_AHEAD = 64  # of the plan, whose shards are fetched meanwhile


def is_remote(place: str) -> bool:
    """Return whether `place` is an address, such as s3://bucket/pack."""
    return re.match(r"[a-z][a-z0-9+.-]+://", place) is not None


def cache_root() -> Path:
    """The folder FASTLT_CACHE, else the user's cache folder."""
    return Path(os.environ.get("FASTLT_CACHE") or Path.home() / ".cache" / "fastlt")


@dataclass(frozen=True)
class Remote:
    """Where a pack lies, and where its parts are kept."""

    url: str
    folder: Path  # local
    limit: int  # bytes of shards that are kept
    # the manifest's: size and sha256 by name, such as train/train-000000.tar
    files: dict[str, dict[str, Any]]
    _checked: list[bool] = field(default_factory=list, repr=False, compare=False)

    def fetch(self, name: str) -> Path:
        """The local file. Raises UserError where it cannot be had."""
        path, entry = self.folder / name, self.files[name]
        with _locked(self.folder / "locks" / name.replace("/", "-")):
            is_there = path.is_file() and path.stat().st_size == entry["size"]
            if not is_there or not self._checked:
                # the bound may have been lowered since the last run
                self._make_room(entry["size"], path)
                self._checked.append(True)
            if not is_there:
                download(f"{self.url}/{name}", path, entry)
            os.utime(path)
        return path

    def _make_room(self, size: int, wanted: Path) -> None:
        if size > self.limit:
            raise UserError(
                f"{wanted.name} has {size:,} bytes, the cache may hold {self.limit:,}: raise "
                "data.cache_gb"
            )
        with _locked(self.folder / "locks" / "room"):
            kept = sorted((p for p in self.folder.glob("*/*.tar") if p != wanted), key=_last_used)
            over = sum(_size(path) for path in kept) + size - self.limit
            for path in kept:
                if over <= 0:
                    return
                over -= _size(path)
                path.unlink(missing_ok=True)  # who has mapped it keeps it until then


def fetch_tables(url: str) -> Path:
    """The local folder of the pack's tables, fetched anew: the pack may have changed."""
    folder = cache_root() / hashlib.sha256(url.encode()).hexdigest()[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the cache {folder} cannot be made ({error.strerror}): set FASTLT_CACHE to a folder "
            "that can"
        ) from error
    for name in TABLES:
        download(f"{url}/{name}", folder / name, None)
    return folder


def download(url: str, path: Path, entry: dict[str, Any] | None) -> None:
    """Fetch `url` into the file `path`; `entry` has the size and sha256 that it must have.

    Tried several times. Raises UserError.
    """
    reason: Any = None
    for attempt in range(ATTEMPTS):
        try:
            with whole_file(path) as temporary:
                _stream(url, temporary, entry)
            return
        except (FileNotFoundError, PermissionError) as error:
            raise UserError(
                f"{url} cannot be read ({type(error).__name__}): is the address right, and may you "
                "read it?"
            ) from error
        except ImportError as error:
            raise MissingExtra(
                f"{url} needs a package that is not installed ({error}): pip install fastlt[remote]"
            ) from error
        except OSError as error:
            if is_disk_full(error):
                raise UserError(
                    f"the disk with the cache {path.parent} is full: free some space, or set "
                    "FASTLT_CACHE"
                ) from error
            reason = error
        except Exception as error:  # every file system of fsspec has its own
            reason = error
        time.sleep(attempt)
    raise UserError(
        f"{url} cannot be read after {ATTEMPTS} attempts: {str(reason) or type(reason).__name__}"
    )


def _stream(url: str, path: Path, entry: dict[str, Any] | None) -> None:
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for block in _blocks(url):
            file.write(block)
            digest.update(block)
            size += len(block)
    if entry and (size, digest.hexdigest()) != (entry["size"], entry["sha256"]):
        raise OSError(
            f"{size:,} bytes came that are not those of the manifest, which has {entry['size']:,}"
        )


def _blocks(url: str) -> Iterator[bytes]:
    """In a thread of its own, for not every file system gives up by itself."""
    blocks: queue.Queue[Any] = queue.Queue(maxsize=2)
    stop = threading.Event()
    threading.Thread(target=_read_blocks, args=(url, blocks, stop), daemon=True).start()
    try:
        while True:
            try:
                block = blocks.get(timeout=BLOCK_PATIENCE)
            except queue.Empty as error:
                raise TimeoutError(f"nothing came for {BLOCK_PATIENCE} s") from error
            if isinstance(block, BaseException):
                raise block
            if not block:
                return
            yield block
    finally:
        stop.set()


def _read_blocks(url: str, blocks: "queue.Queue[Any]", stop: threading.Event) -> None:
    def put(block: Any) -> None:
        while not stop.is_set():
            try:
                return blocks.put(block, timeout=1)
            except queue.Full:
                continue

    try:
        import fsspec

        with fsspec.open(
            url, "rb", block_size=0 if url.startswith("http") else None
        ).open() as file:
            while (block := file.read(BLOCK)) and not stop.is_set():
                put(block)
            put(b"")
    except BaseException as error:
        put(error)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + LOCK_PATIENCE
    with path.open("w") as file:
        while True:
            if take_lock(file):
                break
            if time.monotonic() > until:
                raise UserError(
                    f"another process has held {path} for {LOCK_PATIENCE} s: end it, or remove "
                    "the file"
                )
            time.sleep(0.05)
        yield


def _last_used(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # another process was faster
        return 0.0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


class Fetcher:
    """Reads the plan some batches ahead, and has their shards fetched meanwhile."""

    def __init__(self, split: Any) -> None:
        self._split = split
        self._wanted: queue.Queue[Any] = queue.Queue()
        self._asked: deque[int] = deque(maxlen=8)  # shards that are fetched already, or will be
        threading.Thread(target=self._work, daemon=True).start()

    def ahead(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same batches."""
        waiting: deque[Any] = deque()
        try:
            for batch in batches:
                self._ask(batch)
                waiting.append(batch)
                if len(waiting) > BATCHES_AHEAD:
                    yield waiting.popleft()
            yield from waiting
        finally:
            self._wanted.put(None)

    def _ask(self, batch: Any) -> None:
        for shard in dict.fromkeys(self._split.shard[batch.images].tolist()):
            if shard not in self._asked:
                self._asked.append(shard)
                self._wanted.put(shard)

    def _work(self) -> None:
        while (shard := self._wanted.get()) is not None:
            try:
                self._split.fetched(shard)
            except UserError:
                return  # the engine meets the same error, and reports it
