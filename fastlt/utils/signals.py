"""SIGTERM and Ctrl-C: a run ends its step, saves, and can go on. A second one stops it."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from rich.console import Console

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """A run was asked to stop, and is saved; the message says where, and how to go on."""


class StopRequest:
    """`made` from the first signal on."""

    made = False


@contextmanager
def stop_on_signals(console: Console) -> Iterator[StopRequest]:
    """Within a thread that is not the main one, which alone gets signals, nothing changes."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def stop(number: int, frame: FrameType | None) -> None:
        if request.made:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        request.made = True
        console.print(
            "\nstopping: the step is finished and saved; once more stops at once", highlight=False
        )

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
