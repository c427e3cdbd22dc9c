"""One process at a time: two would overwrite each other's files, or do the same work twice.

The kernel releases a lock however the process ends.
"""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastlt.errors import UserError

LOCK = ".lock"


@contextmanager
def alone_in(folder: Path, who: str) -> Iterator[None]:
    """Raises UserError where another process is there, or the folder cannot be made. who: as in
    "another training".
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise UserError(
            f"cannot write to {folder}: {error.strerror}; choose another --out"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"{who} is at work in {folder}: wait for it, or choose another --out"
            ) from error
        try:
            yield
        finally:
            if [path.name for path in folder.iterdir()] == [LOCK]:  # refused before it began
                shutil.rmtree(folder)


@contextmanager
def in_turn(file: Path) -> Iterator[None]:
    """Waits until no other process is inside; on file systems without locks it does not."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
