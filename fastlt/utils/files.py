"""Files that are either whole or not there: write to a temporary name, then rename."""

import errno
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def is_disk_full(error: OSError) -> bool:
    """Return whether the disk, or the user's share of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def sibling(path: Path) -> Path:
    """Return a temporary name in the folder of `path`, so that renaming it to `path` is atomic."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; rename it to `path` if the block ends well, remove it if not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = sibling(path)
    try:
        yield temporary
        flush_to_disk(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path`, which must not exist yet or be empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = sibling(path)
    temporary.mkdir()
    try:
        yield temporary
        if path.is_dir():
            path.rmdir()
        temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file that is whole or not there."""
    with whole_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def flush_to_disk(path: Path) -> None:
    """Wait until what was written to the file is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
