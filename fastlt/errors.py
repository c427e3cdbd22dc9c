"""The errors that speak to the user."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Bad input, reported in one sentence: what is wrong, where, and what to do.

    The command line prints it and exits with 2. The classes below it say of which kind it is, where
    a caller can make use of that.
    """


class ConfigError(UserError):
    """A setting or a recipe that does not exist, or a value that it cannot have."""


class DataError(UserError):
    """An image, a folder of images or a pack that cannot be read."""


class MissingExtra(UserError):
    """A library that is not installed, and comes with an extra of fastlt."""


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Raise MissingExtra, which says how to install the extra, where an import fails in the block.

    name: the extra of fastlt that brings the libraries.
    """
    try:
        yield
    except ImportError as error:
        raise MissingExtra(
            f"this needs the library {error.name}, which is not installed: pip install "
            f"fastlt[{name}]"
        ) from error
