"""The one exception that speaks to the user."""

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Bad input, told in one sentence: what is wrong, where, and what to do.

    The command line prints it and exits with 2.
    """


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Around imports: what is missing comes with an extra of fastlt."""
    try:
        yield
    except ImportError as error:
        raise UserError(
            f"this needs the library {error.name}, which is not installed: pip install "
            f"fastlt[{name}]"
        ) from error
