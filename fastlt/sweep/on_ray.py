"""Trials on Ray Tune, which chooses them, places them and tries them again."""

import logging
import os
import shutil
import socket
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fastlt.errors import UserError, extra
from fastlt.sweep.results import ENDED, WHY, note_failure, outcome, write_results
from fastlt.sweep.spec import Range, Sweep, Values
from fastlt.sweep.state import SweepState
from fastlt.sweep.trial import Trial
from fastlt.sweep.worker import train_trial
from fastlt.utils.files import write_text
from fastlt.utils.pool import cores
from fastlt.utils.signals import SIGNALS, handled

# Ray's tables of progress, its files of results and its way to stop, which ours stand for; and a
# warning on its future.
QUIET = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
ANSWERS_WITHIN = 10  # seconds


@contextmanager
def quiet_ray(address: str | None, sweep: Sweep) -> Iterator[Any]:
    """Yield ray.tune, with Ray started here or connected to at the address, without its output.

    Raises UserError where there is none, or no machine of it can hold a trial.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    with extra("sweep"):
        import ray
        from ray import tune
    if address:
        check_answers(address)
    here: dict[str, Any] = {} if address else {"num_cpus": cores(), "include_dashboard": False}
    try:
        ray.init(
            address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **here
        )
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        secret = (
            "; where it has a secret, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" if address else ""
        )
        raise UserError(
            f"cannot reach Ray{f' at {address}' if address else ''}: "
            f"{str(error).splitlines()[0]}{secret}"
        ) from error
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what becomes of trials is text by us
    try:
        check_room(ray.nodes(), sweep)
        with interrupted_by_signals():
            yield tune
    finally:
        ray.shutdown()


def check_answers(address: str) -> None:
    """Raise UserError where there is no answer at the address: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if address == "auto" or "://" in address:
        return
    if not host or not port.isdigit():
        raise UserError(
            f"--address {address}: it must be HOST:PORT, or auto for a cluster that this machine "
            "is part of"
        )
    try:
        socket.create_connection((host, int(port)), timeout=ANSWERS_WITHIN).close()
    except OSError as error:
        raise UserError(
            f"no answer from {address} ({error}): `ray start --head --port={port}` there begins "
            "a cluster"
        ) from error


def check_room(nodes: Sequence[dict[str, Any]], sweep: Sweep) -> None:
    """Raise UserError for trials that no machine can hold: they would wait for ever."""
    wanted = {"CPU": sweep.resources.cpus, "GPU": sweep.resources.gpus}
    have = [node["Resources"] for node in nodes if node["Alive"]]
    if not any(all(of.get(name, 0) >= amount for name, amount in wanted.items()) for of in have):
        text = "; ".join(f"{of.get('CPU', 0):g} cores and {of.get('GPU', 0):g} GPUs" for of in have)
        raise UserError(
            f"a trial asks for {wanted['CPU']:g} cores and {wanted['GPU']:g} GPUs, which no "
            f"machine has ({text}): see [resources]"
        )


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Let SIGTERM and Ctrl-C raise KeyboardInterrupt: Ray treats them in other ways."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with handled(interrupt, *SIGNALS):
        yield


def follow(
    state: SweepState, tune: Any, drawn: dict[str, Any], total: int, console: Console
) -> None:
    """Run trials until they have ended, with a bar, and with results.csv up to date.

    drawn: arguments of the tuner that say which trials there are.
    """
    for trial in state.left():
        (state.run(trial) / WHY).unlink(missing_ok=True)  # it gets another chance
    own = state.out / "ray"  # what matters lies in the runs, so it is made anew each time
    shutil.rmtree(own, ignore_errors=True)
    search, resources = state.sweep.search, state.sweep.resources
    columns = (
        TextColumn("trials"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns, TextColumn("{task.description}"), console=console, transient=True
    ) as bar:
        watch = make_watch(
            state, tune, partial(bar.update, bar.add_task("", total=total)), bar.console
        )
        tuner = tune.Tuner(
            tune.with_resources(partial(train_trial, state), resources_of(state.sweep)),
            param_space=drawn.pop("param_space", {}),
            tune_config=tune.TuneConfig(
                metric=search.metric,
                mode="max",
                max_concurrent_trials=resources.parallel or None,
                reuse_actors=True,
                scheduler=scheduler_of(state),
                **drawn,
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(own),
                verbose=0,
                callbacks=[watch],
                failure_config=tune.FailureConfig(max_failures=resources.retries),
            ),
        )
        tuner.fit()
    shutil.rmtree(own, ignore_errors=True)


def one_of_each(trials: Sequence[Trial], tune: Any) -> dict[str, Any]:
    """Return Ray's space of given trials."""
    return {"values": tune.grid_search([trial.values for trial in trials])}


def resources_of(sweep: Sweep) -> dict[str, float]:
    """Return what a trial takes, as Ray names it."""
    return {
        "cpu": sweep.resources.cpus,
        **({"gpu": sweep.resources.gpus} if sweep.resources.gpus else {}),
    }


def scheduler_of(state: SweepState) -> Any:
    """Return ASHA where trials that are behind are to end early, else None."""
    search = state.sweep.search
    if not search.stop_early:
        return None
    from ray.tune.schedulers import ASHAScheduler

    some_trial = state.trials[0] if state.trials else state.trial({})
    most = max(
        some_trial.config.train.epochs,
        *(trial.config.train.epochs for trial in state.trials),
        search.grace,
    )
    return ASHAScheduler(time_attr="epoch", max_t=most + 1, grace_period=search.grace)


def optuna_search(state: SweepState) -> Any:
    """Return Optuna's search, which knows the trials that have ended."""
    with extra("sweep"):
        import optuna
        from ray.tune.search.optuna import OptunaSearch

    of = optuna.distributions
    search = state.sweep.search
    space: dict[str, of.BaseDistribution] = {
        name: of.CategoricalDistribution(range(len(axis)))  # by number, for a value may be a list
        if isinstance(axis, list)
        else of.IntDistribution(round(axis.low), round(axis.high), log=axis.log)
        if axis.whole
        else of.FloatDistribution(axis.low, axis.high, log=axis.log)
        for name, axis in state.sweep.axes.items()
    }
    ended = [
        (numbered(state.sweep, trial.values), state.row(trial)[search.metric])
        for trial in state.trials
    ]
    seen = [(values, figure) for values, figure in ended if figure is not None]
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    text: dict[str, Any] = (
        {"points_to_evaluate": [v for v, _ in seen], "evaluated_rewards": [f for _, f in seen]}
        if seen
        else {}
    )
    return OptunaSearch(
        space, metric=search.metric, mode="max", seed=search.seed + len(seen), **text
    )


def numbered(sweep: Sweep, values: Values) -> Values:
    """Return the values of axes, those of lists as their number."""
    return {name: place_of(sweep.axes[name], value) for name, value in values.items()}


def place_of(axis: list[Any] | Range, value: Any) -> Any:
    """Return the place of a value in a list of values; the value itself of a range."""
    return value if isinstance(axis, Range) else axis.index(value)


def make_watch(state: SweepState, tune: Any, update: Any, console: Console) -> Any:
    """Return a callback of Ray's that writes results.csv whenever a trial ends."""

    class Watch(tune.Callback):
        def __init__(self, state: SweepState, update: Any, console: Console) -> None:
            self.state, self.update, self.console = state, update, console

        def __getstate__(self) -> dict[str, Any]:
            # Ray writes it down for resuming by its own means, and a screen cannot be written down
            return {}

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            self.state.begin(trial.config)

        def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            name = escape(self.state.run(self.state.begin(trial.config)).name)
            self._report(f"the process of {name} died: it goes on from its checkpoint")

        def on_trial_complete(
            self, iteration: int, trials: list[Any], trial: Any, **_: Any
        ) -> None:
            run = self.state.run(self.state.begin(trial.config))
            if self.state.sweep.search.stop_early and outcome(run)[1] not in ("finished", "failed"):
                write_text(run / ENDED, "")
            if outcome(run)[1] == "failed":
                self._report(f"{escape(run.name)} failed: {escape(outcome(run)[2])}")
            self._count()

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            run = self.state.run(self.state.begin(trial.config))
            note_failure(run, reason_of(trial))
            self._report(f"{escape(run.name)} failed: {escape(outcome(run)[2])}")
            self._count()

        def _report(self, text: str) -> None:
            self.console.print(f"[yellow]note:[/] {text}", highlight=False, soft_wrap=True)

        def _count(self) -> None:
            rows = self.state.rows()
            write_results(self.state.out, rows)
            best = max((row["top1"] for row in rows if row["top1"] is not None), default=None)
            self.update(advance=1, description="" if best is None else f"best top-1 {best:.1f}")

    return Watch(state, update, console)


def reason_of(trial: Any) -> str:
    """Return the last line of what Ray says about a failure."""
    try:
        error = trial.get_error()
        text = "".join(traceback.format_exception(error)) if error else ""
    except Exception:  # what Ray kept cannot be read back
        text = ""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1] if lines else "its process died"
