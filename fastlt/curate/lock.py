"""One step at a time in a curation: two would overwrite each other's shards."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fastlt.errors import UserError


@contextmanager
def only_step(out: Path) -> Iterator[None]:
    """The kernel releases the lock however the process ends. Raises UserError where another one holds it."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another step is at work in {out}: wait for it, or choose another --out") from error
        yield
