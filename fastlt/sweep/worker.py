"""The work of a process of Ray: training a trial, or going on with it, in its own RUN."""

import ctypes
import os
import socket
from contextlib import suppress
from typing import Any

from rich.console import Console

from fastlt.errors import UserError
from fastlt.sweep.attempt import Attempt
from fastlt.sweep.results import note_failure
from fastlt.sweep.spec import values_of
from fastlt.sweep.state import SweepState
from fastlt.utils.run_files import METRICS


def train_trial(state: SweepState, suggested: dict[str, Any]) -> None:
    """Train a trial of the sweep, or go on with it. Called in a process of Ray."""
    from ray import tune

    from fastlt.training.loop import train

    with suppress(OSError):  # another machine has no such folder
        os.chdir(state.here)
    trial = state.trial(values_of(state.sweep, suggested))
    run = state.run(trial)
    run.mkdir(parents=True, exist_ok=True)
    attempt = Attempt(run, node_name())

    def report(record: dict[str, Any]) -> None:
        attempt.note()
        # that comes with the result, and is not to be ended early
        is_last = record["epoch"] + 1 == trial.config.train.epochs
        if state.sweep.search.stop_early and "top1" in record and not is_last:
            tune.report(
                {"epoch": record["epoch"] + 1, **{name: record[name] or 0.0 for name in METRICS}}
            )

    try:
        with (run / "log.txt").open("a", encoding="utf-8") as log:
            result = train(trial.config, run, Console(file=log, width=120, no_color=True), report)
    except UserError as error:  # the same would come again
        note_failure(run, str(error))
        tune.report({"epoch": 0, **dict.fromkeys(METRICS, 0.0)})
        return
    finally:
        attempt.note()
        give_memory_back()
    tune.report({"epoch": result["epochs"], **{name: result[name] or 0.0 for name in METRICS}})


def give_memory_back() -> None:
    """Give freed memory back to the system.

    glibc keeps what a trial has freed in a heap of its thread that the next one does not use: it
    would add up.
    """
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def node_name() -> str:
    """Return the name of this machine and of Ray's node on it, of which it may have several."""
    from ray import get_runtime_context

    return f"{socket.gethostname()}-{get_runtime_context().get_node_id()[:8]}"
