"""The measurement of the contenders of `fastlt bench-data`: an epoch each in turn.

It is timed on the clock and in CPU time.
"""

from __future__ import annotations

import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from fastlt.errors import UserError
from fastlt_benchmarks.loaders.images import Images
from fastlt_benchmarks.loss.contenders import Unavailable
from fastlt_benchmarks.loss.trials import one_line

PATIENCE = 120  # seconds without a batch: far more than any takes, but not for ever
GRACE = 5  # seconds for what is to stop

Result = TypeVar("Result")
Beat = Callable[[int], None]  # so many more images are done
# who is measured now, and how many images it has loaded in this epoch
Report = Callable[[str, int], None]


@dataclass(frozen=True)
class Task:
    """The images, and what is to be made of them."""

    images: Images
    size: int  # pixels a side
    batch: int
    workers: int
    device: torch.device  # where DALI decodes and hands over; the others do both on the CPU


@dataclass(frozen=True)
class Source:
    """A loader that is ready.

    epoch: by its number, batches (n, size, size, 3) uint8, or how many images a limit has decoded.
    """

    epoch: Callable[[int], Iterator[Tensor] | Iterator[int]]
    close: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Contender:
    """A loader that takes part."""

    name: str
    what: str
    kind: str  # peer, ours or limit
    form: str  # of the images that it takes, as in data_images
    start: Callable[[Task], Source]  # raises where it cannot run here
    forks: bool = False  # DataLoader's workers, which have a time limit of their own


class Epoch(NamedTuple):
    """The measurement of an epoch."""

    seconds: float
    rate: float  # images/s
    cpu_seconds: float | None  # None where the system does not say


@dataclass
class Trial:
    """A contender, and what has been measured of it so far."""

    contender: Contender
    reason: str = ""  # why there are no figures
    source: Source | None = None
    first: Epoch | None = None  # with what it takes to start
    later: list[Epoch] = field(default_factory=list)

    @property
    def last(self) -> Epoch | None:
        """The last epoch, None before the first."""
        return self.later[-1] if self.later else self.first


def run_rounds(trials: list[Trial], task: Task, rounds: int, report: Report) -> None:
    """Measure a first epoch of each, then `rounds` more.

    They go in turn, so that a machine that grows slower grows slower for all.
    """
    try:
        for number in range(rounds + 1):
            for trial in trials:
                attempt(trial, task, number, partial(report, trial.contender.name))
    finally:
        for trial in trials:
            close(trial)


def attempt(trial: Trial, task: Task, number: int, report: Beat) -> None:
    """Measure an epoch; a contender that fails keeps the reason, and no figures."""
    if trial.reason:
        return
    report(0)
    try:
        work = partial(run_epoch, trial, task, number)
        # A fork of any thread but the main one is not what numba's and others' libraries expect.
        epoch = work(report) if trial.contender.forks else bounded(work, report)
    except Exception as error:
        close(trial)
        trial.reason = str(error) if isinstance(error, UserError) else one_line(error)
        trial.first = None
        trial.later.clear()
        return
    if number:
        trial.later.append(epoch)
    else:
        trial.first = epoch


def run_epoch(trial: Trial, task: Task, number: int, beat: Beat) -> Epoch:
    """Return the measurement of an epoch; start the contender where it has not been."""
    cpu, began, done = cpu_seconds(), time.perf_counter(), 0
    if trial.source is None:
        trial.source = trial.contender.start(task)
    for batch in trial.source.epoch(number):
        done += batch if isinstance(batch, int) else checked(batch, task)
        beat(done)
    if task.device.type == "cuda":
        torch.cuda.synchronize(task.device)
    seconds, spent = time.perf_counter() - began, cpu_seconds()
    if done != len(task.images.split):
        raise Unavailable(f"it gave {done:,} of {len(task.images.split):,} images")
    return Epoch(seconds, done / seconds, None if cpu is None or spent is None else spent - cpu)


def checked(batch: Tensor, task: Task) -> int:
    """Return the number of images of a batch. Raises where it has another shape."""
    if batch.shape[1:] != (task.size, task.size, 3) or batch.dtype != torch.uint8:
        raise Unavailable(f"it gave {tuple(batch.shape)} {batch.dtype}")
    return len(batch)


def close(trial: Trial) -> None:
    """Close the loader of a trial."""
    source, trial.source = trial.source, None
    if source is not None:
        with suppress(Exception):  # it is of no use any more, and the others are to go on
            bounded(lambda beat: source.close(), lambda done: None)


def bounded(work: Callable[[Beat], Result], report: Beat, patience: float = PATIENCE) -> Result:
    """Return work(beat), done in a thread of its own.

    Raises Unavailable where it gives no sign of life for `patience` seconds, as FFCV's may.
    """
    outcome: list[Result] = []
    failure: list[BaseException] = []
    heard, ended = time.monotonic(), threading.Event()

    def beat(done: int) -> None:
        nonlocal heard
        heard = time.monotonic()
        if ended.is_set():
            raise InterruptedError
        report(done)

    def run() -> None:
        try:
            outcome.append(work(beat))
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while thread.is_alive():
            thread.join(0.5)
            if time.monotonic() - heard > patience:
                raise Unavailable(f"it gave nothing for {patience:g} s, and was given up")
    except BaseException:
        ended.set()  # Ctrl-C as well: the epoch stops at its next batch, and its files can go
        thread.join(GRACE)
        raise
    if failure:
        raise failure[0]
    return outcome[0]


def cpu_seconds() -> float | None:
    """Return the CPU time of this process and all below it, also of those that have ended.

    None on a system without /proc.
    """
    if not Path("/proc/self/stat").exists():
        return None
    ticks: dict[int, int] = {}
    children: dict[int, list[int]] = defaultdict(list)
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with suppress(OSError):  # it has ended meanwhile
                fields = (
                    (folder / "stat")
                    .read_text(encoding="utf-8", errors="replace")
                    .rpartition(")")[2]
                    .split()
                )
                children[int(fields[1])].append(int(folder.name))
                # utime, stime, and both of the children waited for
                ticks[int(folder.name)] = sum(map(int, fields[11:15]))
    family = [os.getpid()]
    for process in family:
        family += children[process]
    return sum(ticks[process] for process in family) / os.sysconf("SC_CLK_TCK")
