"""A folder that takes long to write: whole at the end, or not there at all, whatever stops the
writing.
"""

import errno
import fcntl
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from fastlt.errors import UserError
from fastlt.utils.files import whole_folder


@contextmanager
def whole_output(out: Path) -> Iterator[Path]:
    """Yields a hidden folder that becomes `out` if the block ends well; an error, Ctrl-C or SIGTERM
    removes it.

    What an earlier writer that was killed outright left behind is removed first. UserError where
    `out` exists, another process writes it now, or it cannot be written (full disk, no permission).
    """
    with _disk_errors(out), _terminable():
        place = out.resolve()
        if place.exists() and not (place.is_dir() and not any(place.iterdir())):
            raise UserError(f"{out} exists already: remove it or choose another --out")
        nearest = next(parent for parent in place.parents if parent.exists())
        if not nearest.is_dir():
            raise UserError(f"cannot write {out}: {nearest} is not a folder")
        _remove_stale(place, out)
        with whole_folder(place) as folder, _claimed(folder):
            yield folder


def _remove_stale(place: Path, out: Path) -> None:
    if not place.parent.is_dir():
        return
    # as files.sibling makes them
    name = re.compile(rf"\.{re.escape(place.name)}\.[0-9a-f]{{8}}\.partial")
    for folder in place.parent.iterdir():
        if name.fullmatch(folder.name) and folder.is_dir():
            try:
                with _claimed(folder):
                    shutil.rmtree(folder)
            except BlockingIOError as error:
                raise UserError(
                    f"another process is writing {out} now: wait for it or choose another --out"
                ) from error


@contextmanager
def _claimed(folder: Path) -> Iterator[None]:
    """A lock that ends with this process, however it ends: that tells a live writer's folder from a
    dead one's.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM raises SystemExit instead of ending the process on the spot, so that what is half
    written is removed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _exit(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except (BlockingIOError, BrokenPipeError):
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"the disk is full, so {out} was not written: free some space or choose another "
                "--out"
            ) from error
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
