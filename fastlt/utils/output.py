"""A folder that takes long to write: whole at the end, or not there at all, whatever stops the
writing.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastlt.errors import UserError
from fastlt.utils.files import is_disk_full, whole_folder
from fastlt.utils.lock import take_lock
from fastlt.utils.signals import exit_on_sigterm


@contextmanager
def whole_output(out: Path) -> Iterator[Path]:
    """Yield a hidden folder that becomes `out` if the block ends well.

    An error, Ctrl-C or SIGTERM removes it.

    What an earlier writer that was killed outright left behind is removed first. UserError where
    `out` exists, another process writes it now, or it cannot be written (full disk, no permission).
    """
    with _disk_errors(out), exit_on_sigterm():
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
    """Hold a lock that ends with this process, however it ends.

    It distinguishes the folder of a live writer from that of a dead one.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        if not take_lock(descriptor):
            raise BlockingIOError
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _disk_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except (BlockingIOError, BrokenPipeError):
        raise
    except OSError as error:
        if is_disk_full(error):
            raise UserError(
                f"the disk is full, so {out} was not written: free some space or choose another "
                "--out"
            ) from error
        raise UserError(f"cannot write {out}: {error.strerror or error}") from error
