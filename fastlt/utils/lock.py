"""One process at a time: two would overwrite each other's files, or do the same work twice.

The kernel releases a lock however the process ends.
"""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from fastlt.errors import UserError

LOCK = ".lock"


def take_lock(file: IO[str] | int, wait: bool = False) -> bool:
    """Take the lock on an open file, and return whether it was free.

    It ends when the file is closed. With `wait`, this returns once the file is free. On file
    systems without locks every process gets it.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def is_at_work(folder: Path) -> bool:
    """Return whether another process holds the lock of a folder."""
    try:
        with (folder / LOCK).open() as lock:
            return not take_lock(lock)
    except OSError:
        return False


@contextmanager
def alone_in(folder: Path, who: str) -> Iterator[None]:
    """Hold the folder's lock within the block; `who` is named in the error ("another training").

    Raises UserError where another process holds it, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror}; choose another --out"
        ) from error
    with lock:
        if not take_lock(lock):
            raise UserError(f"{who} is at work in {folder}: wait for it, or choose another --out")
        try:
            yield
        finally:
            if [path.name for path in folder.iterdir()] == [LOCK]:  # refused before it began
                shutil.rmtree(folder)


@contextmanager
def in_turn(file: Path) -> Iterator[None]:
    """Wait until no other process is in the block; on file systems without locks, do not wait."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        take_lock(lock, wait=True)
        yield
