"""`fastlt sweep`: the trials on Ray Tune. What is known of them lies in DIR alone, so that a killed sweep goes on from there.

DIR/sweep.toml       what was asked for
DIR/trials.jsonl     the points that are known; those of a search are added as they are drawn
DIR/runs/TRIAL/      a RUN of each trial, as `fastlt train` leaves it
DIR/decoded/         small images, decoded once for all trials; may be removed at any time
DIR/results.csv, results.parquet   one row a trial, written anew whenever one ends
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastlt.errors import UserError
from fastlt.files import write_text
from fastlt.lock import alone_in
from fastlt.sweep.board import Board, check_runs, known_points
from fastlt.sweep.on_ray import follow, one_of_each, optuna_search, quiet_ray
from fastlt.sweep.results import Row, write_results
from fastlt.sweep.spec import METRICS, Sweep, read_sweep
from fastlt.sweep.trial import Trial, check_axes, points


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


def tell_plan(board: Board, left: Sequence[Trial], console: Console) -> None:
    total = len({board.run(trial) for trial in board.trials})
    same = len(board.trials) - total
    alike = f" ({same} more are the same as others)" if same else ""
    console.print(f"{total} runs{alike}, {total - len(left)} of them finished before", highlight=False)


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
