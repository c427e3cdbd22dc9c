"""Work spread over processes, results in order, with bounded memory, and never a hang."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, TypeVar

from fastlt.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")
OrderedMap = Callable[[Callable[[Any], Any], Iterable[Any]], Iterator[Any]]
AHEAD = 3  # items per worker that are handed out or wait to be fetched


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def ordered_map(workers: int) -> Iterator[OrderedMap]:
    """Yield a `map` that runs in `workers` processes; with one it runs here.

    UserError where a process dies.
    """
    if workers == 1:
        yield map
        return
    # Not fork: a fork of a process that has threads (torch, a progress bar) can hang.
    executor = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    try:
        yield lambda function, items: _in_order(executor, AHEAD * workers, function, items)
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _in_order(
    executor: ProcessPoolExecutor,
    window: int,
    function: Callable[[Item], Result],
    items: Iterable[Item],
) -> Iterator[Result]:
    pending: deque[Future[Result]] = deque()
    try:
        for item in items:
            pending.append(executor.submit(function, item))
            if len(pending) >= window:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except (BrokenProcessPool, MemoryError) as error:
        raise UserError(
            "a worker process died or ran out of memory: try again with fewer --workers"
        ) from error


def _start_worker() -> None:
    # Ctrl-C reaches the whole group; the parent alone decides what follows
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A killed parent cannot end its workers, and they would wait for work for ever."""
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)
