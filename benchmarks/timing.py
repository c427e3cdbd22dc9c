"""The measurement of work: the clock, the peak of memory, and the ceilings of the device."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# Twice the 32 MiB of last-level cache that the cores of one server die share; the size cannot be
# asked for portably.
CPU_CACHE_BYTES = 64 * 2**20
# About half a millisecond. Launches queue up meanwhile, as behind a model's own work, so that what
# is timed is the device's time and not the interpreter's.
HEAD_START_CYCLES = 1_000_000
MOST_COPIES = 256  # of inputs so small that the cache is where they would be in training as well
CEILING_SECONDS = 0.5  # how long each ceiling is measured; one repetition at least


class Pass(NamedTuple):
    """The times of one forward and one backward, in ms; `both` covers the two."""

    forward: float
    backward: float
    both: float


class Pace(NamedTuple):
    """The repetitions of a pass: `least` times, then until `seconds` are over, at most `most`."""

    least: int
    most: int
    seconds: float

    def is_enough(self, passes: list[Pass]) -> bool:
        """Return whether there are enough passes."""
        spent = sum(p.both for p in passes) / 1e3
        return len(passes) >= self.most or (len(passes) >= self.least and spent >= self.seconds)


class Ceilings(NamedTuple):
    """The best that the device reached in this run."""

    copy: float  # bytes/s, read and written
    product: float  # FLOP/s of a large square matrix product in the dtype of the run


def timed_pass(forward: Callable[[], Tensor], leaves: tuple[Tensor, ...]) -> Pass:
    """Return the times of forward(), a scalar loss, and of its gradients in the leaves."""
    if leaves[0].device.type == "cuda":
        return _cuda_pass(forward, leaves)
    began = time.perf_counter()
    loss = forward()
    middle = time.perf_counter()
    # the name keeps them until the clock has been read
    _gradients = torch.autograd.grad(loss, leaves)
    ended = time.perf_counter()
    return Pass((middle - began) * 1e3, (ended - middle) * 1e3, (ended - began) * 1e3)


def _cuda_pass(forward: Callable[[], Tensor], leaves: tuple[Tensor, ...]) -> Pass:
    began, middle, ended = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    torch.cuda._sleep(HEAD_START_CYCLES)
    began.record()
    loss = forward()
    middle.record()
    _gradients = torch.autograd.grad(loss, leaves)
    ended.record()
    ended.synchronize()
    return Pass(began.elapsed_time(middle), middle.elapsed_time(ended), began.elapsed_time(ended))


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Return the most memory that torch's allocator held during work(), beyond before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with (
        _silent_stderr(),
        torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profiler,
    ):
        work()
    recorded = profiler.profiler
    if recorded is None:
        raise RuntimeError("the profiler recorded nothing")
    events = [
        (e.start_ns(), e.nbytes())
        for e in recorded.kineto_results.events()
        if e.name() == "[memory]"
    ]
    held = torch.tensor(
        [0, *(nbytes for _, nbytes in sorted(events, key=lambda event: event[0]))]
    ).cumsum(0)
    return int(held.max())


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """The profiler of torch 2.13 writes a line when it starts and when it stops, past Python."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def free_bytes(device: torch.device) -> int:
    """Return the memory that can still be taken; very much where the system does not say."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return sys.maxsize
    return next(
        (int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")),
        sys.maxsize,
    )


@contextmanager
def bounded_memory(device: torch.device) -> Iterator[None]:
    """Let an allocation beyond the free memory fail inside, on a CPU under Linux.

    Else the system would end the process.
    """
    mapped = Path("/proc/self/statm")
    if device.type != "cpu" or not mapped.exists():
        yield
        return
    import resource  # not on every system

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    in_use = int(mapped.read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    limits = [
        limit
        for limit in (soft, hard, in_use + free_bytes(device))
        if limit != resource.RLIM_INFINITY
    ]
    resource.setrlimit(resource.RLIMIT_AS, (min(limits), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def copies_beyond_cache(nbytes: int, device: torch.device) -> int:
    """Return how many inputs of nbytes make a round that leaves the cache.

    That is more than twice a GPU's L2, or more than a CPU's cache.
    """
    cache = (
        2 * torch.cuda.get_device_properties(device).L2_cache_size
        if device.type == "cuda"
        else CPU_CACHE_BYTES
    )
    return min(MOST_COPIES, cache // nbytes + 1)


def measure_ceilings(dtype: torch.dtype, device: torch.device, quick: bool) -> Ceilings:
    """Return the rates of a copy of a large tensor, and of a large square matrix product."""
    on_gpu = device.type == "cuda"
    side = 8192 if on_gpu else 1024 if quick else 2048
    # on zeros products run faster
    left, right = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    return Ceilings(copy_rate(2**30 if on_gpu else 2**28, device), product_rate([(left, right)]))


def copy_rate(nbytes: int, device: torch.device) -> float:
    """Return the bytes/s, read and written, of a copy of nbytes."""
    source = torch.ones(nbytes, dtype=torch.uint8, device=device)
    sink = torch.empty_like(source)
    return 2 * nbytes / _best_seconds(lambda: sink.copy_(source), device)


def product_rate(pairs: list[tuple[Tensor, Tensor]]) -> float:
    """Return the FLOP/s of matrix products, one after the other, into existing memory."""
    work = [(left, right, left.new_empty(left.shape[0], right.shape[1])) for left, right in pairs]

    def multiply() -> None:
        for left, right, product in work:
            torch.mm(left, right, out=product)

    flop = sum(2 * left.numel() * right.shape[1] for left, right in pairs)
    return flop / _best_seconds(multiply, pairs[0][0].device)


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the best time of work(), after one call to warm up."""
    work()
    times: list[float] = []
    while not times or (sum(times) < CEILING_SECONDS and len(times) < 100):
        times.append(_once(work, device))
    return min(times)


def _once(work: Callable[[], object], device: torch.device) -> float:
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(HEAD_START_CYCLES)
    first.record()
    work()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3
