"""`fastlt sweep`: the trials on Ray Tune.

What is known of them lies in DIR alone, so that a killed sweep goes on from there.

DIR/sweep.toml       what was asked for
DIR/trials.jsonl     the points that are known; those of a search are added as they are drawn
DIR/runs/TRIAL/      a RUN of each trial, as `fastlt train` leaves it
DIR/decoded/         small images, decoded once for all trials; may be removed at any time
DIR/results.csv, results.parquet   one row a trial, written anew whenever one ends
"""

import shutil
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from fastlt.errors import UserError
from fastlt.sweep.on_ray import follow, one_of_each, optuna_search, quiet_ray
from fastlt.sweep.results import Row, write_results
from fastlt.sweep.spec import Sweep, axes_but_seeds, read_sweep
from fastlt.sweep.state import (
    SweepState,
    check_folder,
    check_packs,
    check_runs,
    known_points,
    left_out,
)
from fastlt.sweep.trial import check_axes, points, short
from fastlt.utils.files import write_text
from fastlt.utils.lock import alone_in
from fastlt.utils.run_files import METRICS
from fastlt.utils.signals import Stopped
from fastlt.utils.tables import figure_table


def run_sweep(
    file: Path,
    pack: str,
    out: Path,
    more: Sequence[str],
    address: str | None,
    resume: bool,
    console: Console,
) -> list[Row]:
    """Run the trials of a sweep, and return their rows.

    Raises UserError where the sweep is wrong, or DIR holds another one; Stopped where SIGTERM or
    Ctrl-C ended it.
    """
    sweep, out = read_sweep(file), out.resolve()
    state = SweepState(sweep, pack, out, list(more))
    check_axes(sweep, pack, more)
    check_folder(out, resume)
    with alone_in(out, "another sweep"):
        (out / "runs").mkdir(parents=True, exist_ok=True)
        check_packs(state)
        for values in points(sweep) if sweep.search.kind != "optuna" else known_points(state):
            state.add(values)
        check_runs(state)
        write_text(out / "sweep.toml", file.read_text(encoding="utf-8"))
        state.write_down()
        report_plan(state, console)
        try:
            train_all(state, address, console)
        except KeyboardInterrupt as error:
            write_results(out, state.rows())
            raise Stopped(
                f"stopped: call the same command with --resume to go on with {out}"
            ) from error
        rows = state.rows()
        write_results(out, rows)
        if not state.left():
            shutil.rmtree(out / "decoded", ignore_errors=True)
    show(rows, sweep, console)
    if all(row["top1"] is None for row in rows):
        why = next((f": {row['note']}" for row in rows if row["note"]), "")
        raise UserError(f"no trial has a result{why}; {out / 'results.csv'} has the reason of each")
    return rows


def train_all(state: SweepState, address: str | None, console: Console) -> None:
    """Train what is left, then what is still to be drawn."""
    left, to_draw = state.left(), still_to_draw(state)
    if not left and to_draw <= 0:
        return
    with quiet_ray(address, state.sweep) as tune:
        if left:  # of a search that was killed, what it had begun
            follow(state, tune, {"param_space": one_of_each(left, tune)}, len(left), console)
        if to_draw > 0:
            follow(
                state,
                tune,
                {"search_alg": optuna_search(state), "num_samples": to_draw},
                to_draw,
                console,
            )


def still_to_draw(state: SweepState) -> int:
    """Return how many trials Optuna is still to choose."""
    return (
        state.sweep.search.trials - len(state.trials) if state.sweep.search.kind == "optuna" else 0
    )


def report_plan(state: SweepState, console: Console) -> None:
    """Print how many runs there are, and how many of them have finished."""
    total = len({state.run(trial) for trial in state.trials})
    same, to_draw = len(state.trials) - total, still_to_draw(state)
    text = f"{counted(total, 'run')}{f' ({same} more are the same as others)' if same else ''}"
    text += f", {total - len(state.left())} of them finished before"
    if to_draw > 0:
        text = f"{counted(to_draw, 'trial')} to draw" + (f" besides {text}" if total else "")
    console.print(text, highlight=False)
    if others := left_out(state):
        console.print(
            f"[yellow]note:[/] {counted(others, 'finished run')} in "
            f"{escape(str(state.out / 'runs'))} "
            "belong to no point of this sweep: they stay there, and are in no table",
            highlight=False,
            soft_wrap=True,
        )


def counted(number: int, what: str) -> str:
    """Return a number of things in words."""
    return f"{number:,} {what}{'s' if number != 1 else ''}"


def show(rows: Sequence[Row], sweep: Sweep, console: Console) -> None:
    """Print the best points."""
    status = Counter({row["run"]: row["status"] for row in rows}.values())
    console.print(", ".join(f"{times} {name}" for name, times in status.items()), highlight=False)
    measured = [
        row for row in rows if row["status"] == "finished" and row[sweep.search.metric] is not None
    ]
    axes = axes_but_seeds(sweep)
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in measured:
        groups.setdefault(tuple(row[name] for name in axes), []).append(row)
    title = f"the best by {sweep.search.metric}, mean over seeds"
    table = figure_table("point", "runs", *METRICS, title=title)
    ranked = sorted(
        groups.items(),
        key=lambda entry: -statistics.mean(row[sweep.search.metric] for row in entry[1]),
    )
    for point, members in ranked[:10]:
        figures = [over_seeds(members, name) for name in METRICS]
        values = (f"{axis} = {short(value)}" for axis, value in zip(axes, point, strict=True))
        table.add_row(escape(", ".join(values)), str(len(members)), *figures)
    if groups:
        console.print(table)


def over_seeds(rows: Sequence[Row], name: str) -> str:
    """Return mean and standard deviation of a figure in words."""
    known = [row[name] for row in rows if row[name] is not None]
    spread = f" ± {statistics.stdev(known):.1f}" if len(known) > 1 else ""
    return f"{statistics.mean(known):.1f}{spread}" if known else "-"
