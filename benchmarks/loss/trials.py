"""The measurement of the contenders of `fastlt bench-loss` on one size.

They are warmed up, weighed, and timed in turn.
"""

from __future__ import annotations

import gc
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from fastlt_benchmarks.loss.contenders import (
    Contender,
    Inputs,
    Prepared,
    Problem,
    Size,
    Unavailable,
    fault,
    make_problem,
    restore,
)
from fastlt_benchmarks.timing import Ceilings, Pace, Pass, peak_bytes, product_rate, timed_pass

# Of the logits in the products whose rate is the ceiling: so many rows of them that more change no
# rate.
LARGEST_PRODUCT_BYTES = 4 * 2**30

# what is done now, and which share of the size has been done since the last word
Report = Callable[[str, float], None]


@dataclass
class Bench:
    """What stays the same over the sizes."""

    contenders: list[Contender]
    dtype: torch.dtype
    device: torch.device
    pace: Pace
    ceilings: Ceilings
    # contender -> why it is measured at no size
    faults: dict[str, str] = field(default_factory=dict)


@dataclass
class Trial:
    """A contender on one size, and what has been measured of it so far."""

    contender: Contender
    reason: str = ""  # why there are no times
    prepared: Prepared | None = None
    passes: list[Pass] = field(default_factory=list)
    extra_bytes: int | None = None
    loss: float | None = None


def find_faults(bench: Bench, report: Callable[[str], None]) -> None:
    """Hold every contender to the specification; one that fails is not measured."""
    for contender in bench.contenders:
        report(contender.name)
        try:
            wrong = fault(contender, bench.dtype, bench.device)
        except Exception as error:
            bench.faults[contender.name] = one_line(error)
        else:
            bench.faults[contender.name] = f"wrong on a small problem: {wrong}" if wrong else ""


def measure(bench: Bench, size: Size, report: Report) -> tuple[list[Trial], float | None]:
    """Return a trial of every contender of the size's family, and the ceiling.

    The latter is bytes/s for logits, FLOP/s for linear.
    """
    trials = [
        Trial(c, bench.faults.get(c.name, "")) for c in bench.contenders if c.family == size.family
    ]
    release_memory()
    # else the ninth size of one function would run uncompiled, without a word
    torch.compiler.reset()
    try:
        ceiling = bench.ceilings.copy if size.width is None else products_ceiling(bench, size)
        problem = make_problem(size, bench.dtype, bench.device)
    except (MemoryError, RuntimeError) as error:
        for trial in trials:
            trial.reason = trial.reason or f"the inputs: {one_line(error)}"
        report("", 1)
        return trials, None
    # In turn, so that a machine that grows slower grows slower for all. A GPU's clock is steadier,
    # and its memory scarcer.
    for group in [trials] if bench.device.type == "cpu" else [[trial] for trial in trials]:
        measure_in_turn(
            group, problem, bench.pace, partial(_part_of, report, len(group) / len(trials))
        )
    return trials, ceiling


def _part_of(report: Report, part: float, text: str, share: float) -> None:
    report(text, part * share)


def products_ceiling(bench: Bench, size: Size) -> float:
    """Return FLOP/s: the better of a large square and the products in the size's own shapes."""
    rows = max(1, min(size.rows, LARGEST_PRODUCT_BYTES // (size.classes * bench.dtype.itemsize)))
    width = size.width or 1
    features, weight, logits = (
        torch.randn(shape, dtype=bench.dtype, device=bench.device)
        for shape in ((rows, width), (size.classes, width), (rows, size.classes))
    )
    own_shapes = product_rate([(features, weight.T), (logits, weight), (logits.T, features)])
    return max(bench.ceilings.product, own_shapes)


def floor_ms(size: Size, dtype: torch.dtype, ceiling: float) -> float:
    """Return the time of one read and one write of the logits, or three products of N x C x D."""
    work = 2 * dtype.itemsize if size.width is None else 6 * size.width
    return work * size.rows * size.classes / ceiling * 1e3


def measure_in_turn(trials: list[Trial], problem: Problem, pace: Pace, report: Report) -> None:
    """Measure the trials in turn, until the pace is kept."""
    for trial in trials:
        report(trial.contender.name, 0)
        attempt(trial, partial(start, trial, problem))
        report(trial.contender.name, 0.3 / len(trials))
    copies = itertools.cycle(problem.copies)
    for number in itertools.count(1):
        left = [
            trial
            for trial in trials
            if trial.prepared is not None and not pace.is_enough(trial.passes)
        ]
        if not left:
            break
        report(left[0].contender.name if len(trials) == 1 else f"round {number}", 0)
        for trial in left:
            attempt(trial, partial(repeat, trial, next(copies)))
    for trial in trials:
        trial.prepared = None  # free its tables and masks
    report("", 0.7)


def start(trial: Trial, problem: Problem) -> None:
    """Compile and warm up where that is needed, then measure the memory.

    On a CPU that is the warm-up of the others.
    """
    contender, inputs = trial.contender, problem.copies[0]
    prepared = contender.prepare(problem)
    for _ in range(3 if problem.device.type == "cuda" else int(contender.is_compiled)):
        one_pass(contender, prepared, inputs)
    losses: list[torch.Tensor] = []

    def both() -> None:
        loss = prepared.loss(inputs)
        _gradients = torch.autograd.grad(loss, inputs.leaves)
        losses.append(loss.detach())

    peak = peak_bytes(both, problem.device)
    gradients = sum(leaf.nbytes for leaf in inputs.leaves)
    trial.extra_bytes = max(0, peak - gradients) + sum(tensor.nbytes for tensor in prepared.state)
    trial.loss = float(losses[0])
    trial.prepared = prepared
    if contender.overwrites_logits:
        restore(inputs)


def repeat(trial: Trial, inputs: Inputs) -> None:
    """Measure one more pass."""
    assert trial.prepared is not None
    trial.passes.append(one_pass(trial.contender, trial.prepared, inputs))


def one_pass(contender: Contender, prepared: Prepared, inputs: Inputs) -> Pass:
    """Return the measurement of a pass."""
    result = timed_pass(partial(prepared.loss, inputs), inputs.leaves)
    if contender.overwrites_logits:
        restore(inputs)
    return result


def attempt(trial: Trial, work: Callable[[], None]) -> None:
    """Do work for a trial; one that fails keeps its reason and no figures.

    It keeps the memory that it would need, where it says so.
    """
    if trial.reason:
        return
    try:
        work()
    except Exception as error:
        trial.reason = one_line(error)
        trial.extra_bytes = error.needs_bytes if isinstance(error, Unavailable) else None
        trial.prepared, trial.loss = None, None
        trial.passes.clear()
    if trial.reason:
        release_memory()


def release_memory() -> None:
    """Free what a failure may have left in cycles, and what the allocator keeps."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def one_line(error: Exception) -> str:
    """Return an error in one line."""
    if isinstance(error, Unavailable):
        return str(error)
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or re.search(
        r"allocate memory|enough memory", text
    ):
        return "out of memory"
    return f"{type(error).__name__}: {text}"[:120]
