"""One process at a time in a folder: two would overwrite each other's files."""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastlt.errors import UserError

LOCK = ".lock"


@contextmanager
def alone_in(folder: Path, who: str) -> Iterator[None]:
    """The kernel releases the lock however the process ends. who: the other one, as in "another training".

    Raises UserError where another process holds it, or the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another --out") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"{who} is at work in {folder}: wait for it, or choose another --out") from error
        try:
            yield
        finally:
            if [path.name for path in folder.iterdir()] == [LOCK]:  # refused before it began
                shutil.rmtree(folder)
