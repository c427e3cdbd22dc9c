"""The results of the trials, read from their folders: a row for each point.

They go to DIR/results.csv and results.parquet.
"""

import csv
import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from fastlt.errors import UserError
from fastlt.sweep.attempt import read_attempts
from fastlt.sweep.trial import Trial
from fastlt.utils.files import whole_file, write_text
from fastlt.utils.run_files import FIGURES, read_epochs, result_of

Row = dict[str, Any]
WHY = "failed.txt"  # in the RUN of a trial that failed
ENDED = "ended.txt"  # in that of one that was ended early


def run_of(out: Path, trial: Trial, first: dict[str, str]) -> Path:
    """Return the RUN folder of a trial; of those that are one run, that of the first."""
    return out / "runs" / first.setdefault(trial.key, trial.name)


def read_row(run: Path, trial: Trial, cpus: float, gpus: float) -> Row:
    """Return the row of a trial."""
    result, status, note = outcome(run)
    row: Row = {**{name: plain(value) for name, value in trial.values.items()}, "seed": trial.seed}
    row |= {"run": run.name, "status": status, "note": note}
    row |= {name: result.get(name) for name in (*FIGURES, "epochs", "images")}
    held = read_attempts(run)
    row["seconds"] = seconds = held.get("seconds")
    row["gpu_hours"], row["cpu_hours"] = (
        None if seconds is None else round(seconds / 3600 * of, 4) for of in (gpus, cpus)
    )
    row |= {name: held.get(name) for name in ("attempts", "node", "commit")}
    return {**row, "settings": json.dumps(list(trial.settings)), "fastlt": version("fastlt")}


def outcome(run: Path) -> tuple[dict[str, Any], str, str]:
    """Return figures, status and reason of a run.

    The status is finished, stopped early, failed, begun or waiting.
    """
    if (result := result_of(run)) is not None:
        return result, "finished", ""
    if (run / WHY).is_file():
        return last_record(run), "failed", read_text(run / WHY)
    if (run / ENDED).is_file():
        return last_record(run), "stopped early", "others were ahead at the same epoch"
    return {}, "begun" if (run / "config.toml").is_file() else "waiting", ""


def last_record(run: Path) -> dict[str, Any]:
    """Return the record of the last epoch that was evaluated; empty where there is none."""
    try:
        records = read_epochs(run)
    except (OSError, UserError):
        return {}
    evaluated = [record for record in records if "top1" in record]
    return {**evaluated[-1], "epochs": evaluated[-1]["epoch"] + 1} if evaluated else {}


def plain(value: Any) -> Any:
    """Return a value as one cell of a table."""
    return json.dumps(value) if isinstance(value, (list, tuple, dict)) else value


def write_results(out: Path, rows: Sequence[Row]) -> None:
    """Write the rows to both files, each replaced as a whole."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with (
        whole_file(out / "results.csv") as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        table = csv.DictWriter(file, columns)
        table.writeheader()
        table.writerows(rows)
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return
    text = {name for name in columns if any(isinstance(row.get(name), str) for row in rows)}
    values = {
        name: [as_text(row.get(name)) if name in text else row.get(name) for row in rows]
        for name in columns
    }
    with whole_file(out / "results.parquet") as temporary:
        pyarrow.parquet.write_table(pyarrow.table(values), temporary)


def as_text(value: Any) -> str | None:
    """Return a value as text, None as it is."""
    return None if value is None else str(value)


def read_text(path: Path) -> str:
    """Return the text of a file, empty where there is none."""
    return path.read_text(encoding="utf-8").strip() if path.is_file() else ""


def note_failure(run: Path, why: str) -> None:
    """Write why a trial failed to its RUN folder."""
    run.mkdir(parents=True, exist_ok=True)
    write_text(run / WHY, why.strip() + "\n")
