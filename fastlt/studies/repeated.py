"""The user's own command, `fastlt train`, over several controls and seeds."""

import os
import statistics
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from fastlt.config import load_config
from fastlt.errors import UserError
from fastlt.methods import method_settings
from fastlt.utils.pool import cores
from fastlt.utils.results_file import of_no_machine
from fastlt.utils.run_files import EPOCHS, FIGURES, METRICS, result_of
from fastlt.utils.signals import exit_on_sigterm

LOOK_EVERY = 1.0  # seconds


@dataclass(frozen=True)
class Control:
    """A training that is compared with others."""

    pack: Path
    settings: list[str]  # section.key=value
    method: str | None = None  # of `fastlt train --method`


def train_all(
    recipe: str,
    controls: Mapping[str, Control],
    out: Path,
    seeds: int,
    parallel: int,
    console: Console,
    first_seed: int = 0,
) -> list[dict[str, Any]]:
    """Return the figures of each control's runs, a row a run; `parallel` at a time share the cores.

    seeds: how many, from first_seed on.

    A run that is in `out` is read, one that stopped goes on. Where one fails no other is begun,
    those under way are saved, and UserError is raised.
    """
    drawn = range(first_seed, first_seed + seeds)
    jobs = [(name, seed) for seed in drawn for name in controls]
    threads = str(max(1, cores() // parallel))
    places = {(name, seed): out / folder_name(name, seed) for name, seed in jobs}

    runner = Runner(threads)

    def run(job: tuple[str, int]) -> dict[str, Any]:
        name, seed = job
        with runner.stopping_all_if_it_fails():
            return {
                "control": name,
                "seed": seed,
                **_train(recipe, controls[name], places[job], seed, runner),
            }

    with exit_on_sigterm(), ThreadPoolExecutor(parallel) as pool:
        waiting = [pool.submit(run, job) for job in jobs]
        total = seeds * sum(epochs_of(recipe, control) for control in controls.values())
        try:
            watch(waiting, list(places.values()), total, console)
        except BaseException as error:
            # which a terminal sends to the trainings too
            runner.stop(terminate=not isinstance(error, KeyboardInterrupt))
            pool.shutdown(cancel_futures=True)
            if runner.failure is not None and isinstance(error, UserError):
                raise runner.failure from None
            raise
        return [job.result() for job in waiting]


class Runner:
    """Commands of fastlt in processes that end before this one does."""

    def __init__(self, threads: str = "0") -> None:
        self.environment = {
            **os.environ,
            **({"OMP_NUM_THREADS": threads} if threads != "0" else {}),
        }
        self._running: set[subprocess.Popen[str]] = set()
        self._stopped = False
        self.failure: BaseException | None = None  # the first, for which the others were ended
        self._lock = threading.Lock()

    def run(self, *arguments: str) -> None:
        """Run a command. Raises UserError where it fails, or where no more are to be begun."""
        with self._lock:
            if self._stopped:
                raise UserError("another run has failed")
            command = [sys.executable, "-m", "fastlt", *arguments]
            process = subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env=self.environment,
            )
            self._running.add(process)
        _, said = process.communicate()
        with self._lock:
            self._running.discard(process)
        if process.returncode:
            raise UserError(
                f"`fastlt {' '.join(arguments)}` ended with code {process.returncode}: "
                f"{said.strip()[-500:]}"
            )

    def stop(self, terminate: bool, because: BaseException | None = None) -> None:
        """Begin no more commands. terminate: those under way save and end."""
        with self._lock:
            self.failure = self.failure or because
            if terminate and not self._stopped:
                for process in self._running:
                    process.terminate()
            self._stopped = True

    @contextmanager
    def stopping_all_if_it_fails(self) -> Iterator[None]:
        """Stop all where the block fails, before the thread is free for the next one."""
        try:
            yield
        except BaseException as error:
            self.stop(terminate=True, because=error)
            raise


def epochs_of(recipe: str, control: Control) -> int:
    """Return the epochs of a control's runs."""
    return load_config(recipe, control.settings, method_settings(control.method, None)).train.epochs


def watch(
    waiting: list[Future[dict[str, Any]]], runs: list[Path], total: int, console: Console
) -> None:
    """Show a bar over the epochs of all runs until they have ended.

    Where one fails its error is raised.
    """
    columns: list[str | ProgressColumn] = [
        "training",
        BarColumn(),
        MofNCompleteColumn(),
        "epochs",
        TimeElapsedColumn(),
        "left",
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=console, transient=True, speed_estimate_period=600) as bar:
        task = bar.add_task("", total=total)
        unfinished = set(waiting)
        while unfinished:
            ended, unfinished = wait(unfinished, timeout=LOOK_EVERY, return_when=FIRST_EXCEPTION)
            for job in ended:
                job.result()
            bar.update(task, completed=sum(epochs_done(run) for run in runs))


def epochs_done(run: Path) -> int:
    """Return how many epochs a run has done."""
    path = run / EPOCHS
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def folder_name(control: str, seed: int) -> str:
    """Return the name of a run's folder."""
    return (
        "".join(c if c.isalnum() or c == "." else "-" for c in control)
        .strip("-")
        .replace("--", "-")
        + f"-seed{seed}"
    )


def _train(recipe: str, control: Control, run: Path, seed: int, runner: Runner) -> dict[str, Any]:
    method = ["--method", control.method] if control.method else []
    options = [
        "--data",
        str(control.pack),
        "--out",
        str(run),
        *method,
        f"train.seed={seed}",
        *control.settings,
    ]
    runner.run("train", recipe, *options)
    result = result_of(run)
    if result is None:
        raise UserError(
            f"the run in {run} was stopped before its end: the same command goes on from there"
        )
    figures = {name: result[name] for name in FIGURES}
    figures |= {
        "epochs": result["epochs"],
        "images": result["images"],
        "best_top1": result["best"]["top1"],
    }
    return {
        **figures,
        "seconds": round(result["seconds"], 1),
        "settings": " ".join(map(of_no_machine, [*method, *control.settings])),
    }


def table(rows: list[dict[str, Any]], of: str = "the last epoch") -> Table:
    """Return accuracies by control, mean and standard deviation over seeds. of: what has them."""
    result = Table(
        "",
        "all",
        *METRICS[1:],
        title=f"accuracy of {of} in percent, mean ± standard deviation over seeds",
    )
    for name in dict.fromkeys(row["control"] for row in rows):
        runs = [row for row in rows if row["control"] == name]
        result.add_row(name, *(spread([row[group] for row in runs]) for group in METRICS))
    return result


def spread(values: list[float | None]) -> str:
    """Return mean and standard deviation in words."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = f"{statistics.mean(known):.1f}"
    return f"{mean} ± {statistics.stdev(known):.1f}" if len(known) > 1 else mean
