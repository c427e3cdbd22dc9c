"""SIGTERM and Ctrl-C: a run ends its step, saves, and can go on. A second one stops it."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from rich.console import Console

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """A run was asked to stop, and is saved; the message says where, and how to go on."""


class StopRequest:
    """Whether a signal has asked the run to stop."""

    requested = False


@contextmanager
def handled(
    handler: Callable[[int, FrameType | None], Any], *numbers: signal.Signals
) -> Iterator[None]:
    """Call `handler` for these signals within the block.

    Within a thread that is not the main one, which alone gets signals, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Raise SystemExit at SIGTERM within the block, so that what was begun is cleaned up."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    with handled(leave, signal.SIGTERM):
        yield


@contextmanager
def stop_on_signals(console: Console) -> Iterator[StopRequest]:
    """Yield what becomes requested at the first SIGTERM or Ctrl-C; the second one ends the run."""
    request = StopRequest()

    def stop(number: int, frame: FrameType | None) -> None:
        if request.requested:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        request.requested = True
        console.print(
            "\nstopping: the step is finished and saved; once more stops at once", highlight=False
        )

    with handled(stop, *SIGNALS):
        yield request
