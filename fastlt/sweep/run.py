"""`fastlt sweep`: the trials on Ray Tune. What is known of them lies in DIR alone, so that a killed sweep goes on from there.

DIR/sweep.toml       what was asked for
DIR/trials.jsonl     the points that are known; those of a search are added as they are drawn
DIR/runs/TRIAL/      a RUN of each trial, as `fastlt train` leaves it
DIR/decoded/         small images, decoded once for all trials; may be removed at any time
DIR/results.csv, results.parquet   one row a trial, written anew whenever one ends
"""

import json
import logging
import math
import os
import shutil
import socket
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from fastlt.config import load_config
from fastlt.data.pool import cores
from fastlt.errors import UserError, extra
from fastlt.files import write_text
from fastlt.lock import alone_in
from fastlt.sweep.attempt import Attempt
from fastlt.sweep.results import ENDED, WHY, Row, note_failure, outcome, read_row, run_of, write_results
from fastlt.sweep.spec import METRICS, Range, Sweep, Values, read_sweep
from fastlt.sweep.trial import Trial, check_axes, make_trial, points, trained

# Ray's tables of progress and its files of results, which ours stand for; and a warning on what it will do one day.
QUIET = {"RAY_AIR_NEW_OUTPUT": "0", "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


@dataclass
class Board:
    """What the driver knows of the trials."""

    sweep: Sweep
    pack: str
    out: Path
    more: Sequence[str]
    trials: list[Trial] = field(default_factory=list)
    first: dict[str, str] = field(default_factory=dict)  # key of a run -> the trial that it is named after
    finished: dict[str, Row] = field(default_factory=dict)  # by the name of the trial

    def trial(self, values: Values) -> Trial:
        return make_trial(self.sweep, self.pack, values, self.more, self.out / "decoded")

    def add(self, values: Values) -> Trial:
        """Those of a search become known as they are begun."""
        trial = self.trial(values)
        if all(trial.values != known.values for known in self.trials):
            self.trials.append(trial)
            run_of(self.out, trial, self.first)
        return trial

    def begin(self, suggested: dict[str, Any]) -> Trial:
        """The trial that Ray begins, which of a search is a new one, and is written down."""
        before = len(self.trials)
        trial = self.add(values_of(self.sweep, suggested))
        if len(self.trials) > before:
            self.write_down()
        return trial

    def write_down(self) -> None:
        write_text(self.out / "trials.jsonl", "".join(json.dumps(trial.values) + "\n" for trial in self.trials))

    def run(self, trial: Trial) -> Path:
        return run_of(self.out, trial, self.first)

    def rows(self) -> list[Row]:
        return [self.row(trial) for trial in self.trials]

    def row(self, trial: Trial) -> Row:
        """What has finished does not change any more."""
        if (known := self.finished.get(trial.name)) is not None:
            return known
        row = read_row(self.run(trial), trial, self.sweep.resources.cpus, self.sweep.resources.gpus)
        if row["status"] == "finished":
            self.finished[trial.name] = row
        return row

    def left(self) -> list[Trial]:
        """One of each run that is not over."""
        runs: dict[Path, Trial] = {}
        for trial in self.trials:
            if outcome(self.run(trial))[1] not in ("finished", "stopped early"):
                runs.setdefault(self.run(trial), trial)
        return list(runs.values())


def run_sweep(
    file: Path, pack: str, out: Path, more: Sequence[str], address: str | None, resume: bool, console: Console
) -> list[Row]:
    """Raises UserError where the sweep is wrong, or DIR holds another one."""
    sweep, out = read_sweep(file), out.resolve()
    board = Board(sweep, pack, out, list(more))
    check_axes(sweep, pack, more)
    if (out / "runs").is_dir() and not resume:
        raise UserError(f"{out} holds a sweep already: go on with it by --resume, or choose another --out")
    with alone_in(out, "another sweep"):
        (out / "runs").mkdir(parents=True, exist_ok=True)
        write_text(out / "sweep.toml", file.read_text(encoding="utf-8"))
        for values in points(sweep) if sweep.search.kind != "optuna" else known_points(board):
            board.add(values)
        check_runs(board)
        board.write_down()
        left, more_to_draw = board.left(), sweep.search.trials - len(board.trials) if sweep.search.kind == "optuna" else 0
        tell_plan(board, left, console)
        if left or more_to_draw > 0:
            with quiet_ray(address, sweep) as tune:
                if left:  # of a search that was killed, what it had begun
                    follow(board, tune, {"param_space": one_of_each(left, tune)}, len(left), console)
                if more_to_draw > 0:
                    follow(board, tune, {"search_alg": optuna_search(board), "num_samples": more_to_draw}, more_to_draw, console)
        rows = board.rows()
        write_results(out, rows)
    show(rows, sweep, console)
    if all(row["top1"] is None for row in rows):
        raise UserError(f"no trial has a result: {out / 'results.csv'} says why")
    return rows


def known_points(board: Board) -> Iterator[Values]:
    """Of a search that was killed: what it had tried."""
    path = board.out / "trials.jsonl"
    if path.is_file():
        yield from (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())


def check_runs(board: Board) -> None:
    """What is there already was trained as the sweep now says. Raises UserError where it was not."""
    for trial in board.trials:
        kept = board.run(trial) / "config.toml"
        if not kept.is_file():
            continue
        before, now = trained(load_config(str(kept))), trained(trial.config)
        if changed := [key for key in now if before.get(key) != now[key]]:
            what = f"{changed[0]} = {before.get(changed[0])!r}, not {now[changed[0]]!r}"
            raise UserError(f"{kept.parent} was trained with other settings ({what}): choose another --out, or remove it")


def tell_plan(board: Board, left: Sequence[Trial], console: Console) -> None:
    total = len({board.run(trial) for trial in board.trials})
    same = len(board.trials) - total
    alike = f" ({same} more are the same as others)" if same else ""
    console.print(f"{total} runs{alike}, {total - len(left)} of them finished before", highlight=False)


# --- Ray


@contextmanager
def quiet_ray(address: str | None, sweep: Sweep) -> Iterator[Any]:
    """Ray, started here or joined at the address, and without its own words; yields ray.tune."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    with extra("sweep"):
        import ray
        from ray import tune
    here: dict[str, Any] = {} if address else {"num_cpus": max(cores(), round(sweep.resources.cpus)), "include_dashboard": False}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **here)
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"cannot reach Ray{f' at {address}' if address else ''}: {str(error).splitlines()[0]}") from error
    try:
        yield tune
    finally:
        ray.shutdown()


def follow(board: Board, tune: Any, drawn: dict[str, Any], total: int, console: Console) -> None:
    """Until these trials have ended, with a bar over them and results.csv up to date. drawn: how Ray comes by them."""
    for trial in board.left():
        (board.run(trial) / WHY).unlink(missing_ok=True)  # it gets another chance
    own = board.out / "ray"  # what matters lies in the runs, so it is made anew each time
    shutil.rmtree(own, ignore_errors=True)
    search, resources = board.sweep.search, board.sweep.resources
    columns = (
        TextColumn("trials"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, TextColumn("{task.description}"), console=console, transient=True) as bar:
        watch = make_watch(board, tune, partial(bar.update, bar.add_task("", total=total)), bar.console)
        tuner = tune.Tuner(
            tune.with_resources(partial(train_trial, board), resources_of(board.sweep)),
            param_space=drawn.pop("param_space", {}),
            tune_config=tune.TuneConfig(
                metric=search.metric, mode="max", max_concurrent_trials=resources.parallel or None, reuse_actors=True,
                scheduler=scheduler_of(board), **drawn,
            ),
            run_config=tune.RunConfig(
                name="tune", storage_path=str(own), verbose=0, callbacks=[watch],
                failure_config=tune.FailureConfig(max_failures=resources.retries),
            ),
        )  # fmt: skip
        tuner.fit()
    shutil.rmtree(own, ignore_errors=True)


def one_of_each(trials: Sequence[Trial], tune: Any) -> dict[str, Any]:
    return {"values": tune.grid_search([trial.values for trial in trials])}


def resources_of(sweep: Sweep) -> dict[str, float]:
    return {"cpu": sweep.resources.cpus, **({"gpu": sweep.resources.gpus} if sweep.resources.gpus else {})}


def scheduler_of(board: Board) -> Any:
    """ASHA, where trials that are behind are to end early."""
    search = board.sweep.search
    if not search.stop_early:
        return None
    from ray.tune.schedulers import ASHAScheduler

    some_trial = board.trials[0] if board.trials else board.trial({})
    most = max(some_trial.config.train.epochs, *(trial.config.train.epochs for trial in board.trials), search.grace)
    return ASHAScheduler(time_attr="epoch", max_t=most + 1, grace_period=search.grace)


def optuna_search(board: Board) -> Any:
    """That knows what has ended."""
    with extra("sweep"):
        import optuna
        from ray.tune.search.optuna import OptunaSearch

    of = optuna.distributions
    search = board.sweep.search
    space: dict[str, of.BaseDistribution] = {
        name: of.CategoricalDistribution(range(len(axis)))  # by number, for a value may be a list
        if isinstance(axis, list)
        else of.IntDistribution(round(axis.low), round(axis.high), log=axis.log)
        if axis.whole
        else of.FloatDistribution(axis.low, axis.high, log=axis.log)
        for name, axis in board.sweep.axes.items()
    }
    ended = [(numbered(board.sweep, trial.values), board.row(trial)[search.metric]) for trial in board.trials]
    seen = [(values, figure) for values, figure in ended if figure is not None]
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    told: dict[str, Any] = {"points_to_evaluate": [v for v, _ in seen], "evaluated_rewards": [f for _, f in seen]} if seen else {}
    return OptunaSearch(space, metric=search.metric, mode="max", seed=search.seed + len(seen), **told)


def numbered(sweep: Sweep, values: Values) -> Values:
    """Values of lists as their number."""
    return {name: v if isinstance(sweep.axes[name], Range) else sweep.axes[name].index(v) for name, v in values.items()}  # type: ignore[union-attr]


def values_of(sweep: Sweep, suggested: dict[str, Any]) -> Values:
    if "values" in suggested:
        return suggested["values"]
    return {name: suggested[name] if isinstance(axis, Range) else axis[suggested[name]] for name, axis in sweep.axes.items()}


def train_trial(board: Board, suggested: dict[str, Any]) -> None:
    """In a process of Ray: trains, or goes on, in the trial's own RUN."""
    from ray import tune

    from fastlt.train import train

    trial = board.trial(values_of(board.sweep, suggested))
    run = board.run(trial)
    run.mkdir(parents=True, exist_ok=True)
    attempt = Attempt(run, node_name())

    def tell(record: dict[str, Any]) -> None:
        attempt.note()
        if board.sweep.search.stop_early and "top1" in record:
            tune.report({"epoch": record["epoch"] + 1, **{name: record[name] or 0.0 for name in METRICS}})

    try:
        with (run / "log.txt").open("a", encoding="utf-8") as log:
            result = train(trial.config, run, Console(file=log, width=120, no_color=True), tell)
    except UserError as error:  # the same would come again
        note_failure(run, str(error))
        tune.report({"epoch": 0, **dict.fromkeys(METRICS, 0.0)})
        return
    finally:
        attempt.note()
    tune.report({"epoch": result["epochs"], **{name: result[name] or 0.0 for name in METRICS}})


def node_name() -> str:
    """Of this machine, and of Ray's node on it, of which one machine may have several."""
    from ray import get_runtime_context

    return f"{socket.gethostname()}-{get_runtime_context().get_node_id()[:8]}"


def make_watch(board: Board, tune: Any, update: Any, console: Console) -> Any:
    """A callback of Ray's: results.csv whenever a trial ends."""

    class Watch(tune.Callback):
        def __init__(self, board: Board, update: Any, console: Console) -> None:
            self.board, self.update, self.console = board, update, console

        def __getstate__(self) -> dict[str, Any]:
            return {}  # Ray writes it down for resuming by its own means, and a screen cannot be written down

        def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            self.board.begin(trial.config)

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            run = self.board.run(self.board.begin(trial.config))
            if self.board.sweep.search.stop_early and outcome(run)[1] not in ("finished", "failed"):
                write_text(run / ENDED, "")
            self._count()

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
            run = self.board.run(self.board.begin(trial.config))
            note_failure(run, reason_of(trial))
            told = f"{escape(run.name)} failed: see {escape(str(run / WHY))}"
            self.console.print(f"[yellow]note:[/] {told}", highlight=False, soft_wrap=True)
            self._count()

        def _count(self) -> None:
            rows = self.board.rows()
            write_results(self.board.out, rows)
            best = max((row["top1"] for row in rows if row["top1"] is not None), default=None)
            self.update(advance=1, description="" if best is None else f"best top-1 {best:.1f}")

    return Watch(board, update, console)


def reason_of(trial: Any) -> str:
    """The last line of what Ray says."""
    try:
        error = trial.get_error()
        told = "".join(traceback.format_exception(error)) if error else ""
    except Exception:  # what Ray kept cannot be read back
        told = ""
    lines = [line for line in told.strip().splitlines() if line.strip()]
    return lines[-1] if lines else "its process died"


# --- on screen


def show(rows: Sequence[Row], sweep: Sweep, console: Console) -> None:
    status: dict[str, int] = {}
    for row in rows:
        status[row["status"]] = status.get(row["status"], 0) + 1
    console.print(", ".join(f"{times} {name}" for name, times in status.items()), highlight=False)
    measured = [row for row in rows if row[sweep.search.metric] is not None]
    axes = [name for name in sweep.axes if name != "seed"]
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in measured:
        groups.setdefault(tuple(row[name] for name in axes), []).append(row)
    table = Table(*axes, "runs", *METRICS, title=f"the best by {sweep.search.metric}, mean over seeds", title_justify="left")
    ranked = sorted(groups.items(), key=lambda entry: -mean_of(entry[1], sweep.search.metric))
    for point, members in ranked[:10]:
        figures = ("-" if math.isnan(mean := mean_of(members, name)) else f"{mean:.1f}" for name in METRICS)
        table.add_row(*(escape(str(value)) for value in point), str(len(members)), *figures)
    if groups:
        console.print(table)


def mean_of(rows: Sequence[Row], name: str) -> float:
    known = [row[name] for row in rows if row[name] is not None]
    return sum(known) / len(known) if known else float("nan")
