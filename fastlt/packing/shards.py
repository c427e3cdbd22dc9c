"""Writing WebDataset shards whose bytes depend on the images alone: no times, owners or machine in
them.
"""

import hashlib
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

BLOCK = 512
NAME_BYTES = 100  # of a USTAR header
# room for the extension, and for a number where keys collide
KEY_BYTES = NAME_BYTES - len(".webp") - len("-1234567890")


class ShardWriter(AbstractContextManager["ShardWriter"]):
    """Writes FOLDER/STEM-000000.tar and so on, each of at most `shard_size` bytes unless one image
    alone is larger.

    stem: by default the folder's name.
    """

    def __init__(self, folder: Path, shard_size: int, stem: str = "") -> None:
        folder.mkdir(exist_ok=bool(stem))
        self.folder, self.stem = folder, stem or folder.name
        self.shard_size = shard_size
        # file name -> size and sha256, as in the manifest
        self.files: dict[str, dict[str, Any]] = {}
        self._file: BinaryIO | None = None

    def add(
        self, key: str, extension: str, data: bytes, label: int | str, sidecar: bytes = b""
    ) -> tuple[int, int]:
        """Add an image and return (shard, offset of the image's bytes in it).

        `sidecar` is JSON that is written as key.json.
        """
        sample = _member(key + extension, data) + _member(key + ".cls", str(label).encode())
        sample += _member(key + ".json", sidecar) if sidecar else b""
        if self._file is None or self._position + len(sample) + 2 * BLOCK > self.shard_size:
            self._close()
            self._open()
        offset = self._position + BLOCK
        self._write(sample)
        return len(self.files), offset

    def _open(self) -> None:
        self._file = (self.folder / f"{self.stem}-{len(self.files):06d}.tar").open("wb")
        self._position = 0
        self._sha256 = hashlib.sha256()

    def _write(self, data: bytes) -> None:
        assert self._file is not None
        self._file.write(data)
        self._sha256.update(data)
        self._position += len(data)

    def _close(self) -> None:
        if self._file is None:
            return
        self._write(bytes(2 * BLOCK))  # the end of a tar file
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self.files[Path(self._file.name).name] = {
            "size": self._position,
            "sha256": self._sha256.hexdigest(),
        }
        self._file = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._close()
        elif self._file is not None:
            with suppress(
                OSError
            ):  # a full disk says so once more when what is buffered is written
                self._file.close()


def _member(name: str, data: bytes) -> bytes:
    header = tarfile.TarInfo(name)
    header.size = len(data)
    return header.tobuf(tarfile.USTAR_FORMAT, "utf-8") + data + bytes(-len(data) % BLOCK)


def member_keys(keys: Iterable[str]) -> list[str]:
    """Unique keys that fit the header and that WebDataset takes: it ends a key at the first dot and
    skips `__name__`.
    """
    taken: set[str] = set()
    times: Counter[str] = Counter()
    result = []
    for key in keys:
        stem = member = clean_key(key)
        while member in taken:
            times[stem] += 1
            member = f"{stem}-{times[stem]}"
        taken.add(member)
        result.append(member)
    return result


def clean_key(key: str) -> str:
    """Return a key as a shard holds it, where no other is the same."""
    parts = [re.sub(r"[^\w-]+", "_", part).strip("_") or "x" for part in key.split("/") if part]
    name = "/".join(parts).encode("utf-8")
    if len(name) > KEY_BYTES:
        half = KEY_BYTES // 2
        name = name[: half - 1] + b"-" + name[len(name) - (KEY_BYTES - half) :]
    return name.decode("utf-8", "ignore") or "x"
