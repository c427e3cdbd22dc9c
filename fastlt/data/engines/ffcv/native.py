"""The way to ffcv and numba, which not every machine has."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch

from fastlt.errors import MissingExtra, UserError


def import_ffcv() -> tuple[ModuleType, ModuleType]:
    """(fastlt.data.engines.ffcv.parts, fastlt.data.engines.ffcv.jit).

    Raises UserError that says how to get FFCV where it is missing.
    """
    try:
        with torch_threads_kept():  # `import ffcv` sets them to 1
            from fastlt.data.engines.ffcv import jit as ffcv_jit
            from fastlt.data.engines.ffcv import parts as ffcv_parts
    except (ImportError, OSError, AttributeError) as error:
        raise MissingExtra(
            f"the ffcv engine cannot be loaded ({error}): `make setup` installs FFCV with its "
            "system libraries "
            "(libturbojpeg, OpenCV core and imgproc), or install those and then `pip install "
            "fastlt[ffcv]`"
        ) from error
    return ffcv_parts, ffcv_jit


def has_ffcv() -> bool:
    """Return whether FFCV can be imported."""
    try:
        import_ffcv()
    except UserError:
        return False
    return True


@contextmanager
def torch_threads_kept() -> Iterator[None]:
    """Restore the number of torch's threads after the block."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
