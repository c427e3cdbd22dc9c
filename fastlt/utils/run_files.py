"""What a RUN folder holds, and the names of its figures."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from fastlt.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

if TYPE_CHECKING:  # `fastlt --help` comes here, and needs no numpy
    import numpy as np

RESULT, EPOCHS, CONFIG = "result.json", "metrics.jsonl", "config.toml"
MODEL, BEST = "model.safetensors", "best.safetensors"  # of the last epoch, and of the best one
FIT = "fit.json"  # what `fastlt fit` chose, beside whose pack and baseline a run begins
OTHERS = (".log", ".out", ".err", ".txt")  # what may stand in a folder before a run is begun there
Metric = Literal["top1", "many", "medium", "few"]
METRICS: tuple[str, ...] = get_args(Metric)
COLUMNS = {  # title in tables -> key of result.json
    "top-1": "top1",
    "many": "many",
    "medium": "medium",
    "few": "few",
    "balanced": "balanced_accuracy",
    "harmonic": "harmonic_mean",
    "ECE": "ece",
}
FIGURES = tuple(COLUMNS.values())


@dataclass(frozen=True)
class RunFiles:
    """The contents of a finished run; an absent file is an empty value."""

    path: Path
    config: dict[str, Any]  # section -> key -> value
    result: dict[str, Any]
    epochs: list[dict[str, Any]]
    predictions: dict[str, np.ndarray]  # label, predicted, confidence, image: (n,) each


def shortest_names(places: Sequence[Path]) -> list[str]:
    """Return as few of the last folders of each path as tell the paths apart."""
    parts = [Path(place).resolve().parts for place in places]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return names


def checkpoints(run: Path) -> list[Path]:
    """Return the whole checkpoints of a run, oldest first."""
    return sorted(path for path in (run / "checkpoints").glob("step-*") if path.is_dir())


def newest_checkpoint(run: Path) -> Path:
    """Return the newest checkpoint of a run. Raise UserError where it has none."""
    saved = checkpoints(run)
    if not saved:
        raise UserError(f"{run} has no checkpoint: it must keep the last one of its training")
    return saved[-1]


def result_of(run: Path) -> dict[str, Any] | None:
    """Return the result of a run, or None where it has not finished or cannot be read."""
    try:
        found = json.loads((run / RESULT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and "top1" in found else None


def read_result(run: Path) -> dict[str, Any]:
    """Return the result of a run. Raise UserError where it has not finished, or is damaged."""
    if not run.is_dir():
        raise UserError(f"there is no run at {run}: train one with `fastlt train`")
    file = run / RESULT
    if not file.is_file():
        raise UserError(_why_unfinished(run))
    result = _json(file, file.read_text(encoding="utf-8", errors="replace"))
    if not isinstance(result, dict) or result.get("top1") is None:
        raise UserError(f"{file} names no top1: it is not the result of a run")
    return result


def check_has_model(run: Path) -> None:
    """Raise UserError where a folder is no run, or one whose training has not ended."""
    if not run.is_dir():
        raise UserError(f"there is no run at {run}: train one with `fastlt train`")
    if not (run / MODEL).is_file():
        raise UserError(_why_unfinished(run))


def _why_unfinished(run: Path) -> str:
    """Return why a folder holds no result, and what to do about it."""
    from fastlt.utils.lock import is_at_work  # not at the top: there is none on Windows

    if not (run / CONFIG).is_file():
        return (
            f"{run} is not a run, it has no config.toml: name the folder that `fastlt train --out` "
            "wrote"
        )
    file = run / EPOCHS
    done = file.read_bytes().count(b"\n") if file.is_file() else 0
    if is_at_work(run):
        return f"{run} still trains, {done} epochs are done: wait for its end"
    return (
        f"the training of {run} has stopped after {done} epochs: go on with `fastlt train "
        f"{run / CONFIG} --data PACK --out {run}`"
    )


def check_out(run: Path) -> None:
    """Raise UserError where a folder to train into holds something else than a run."""
    if not run.exists() or any((run / name).exists() for name in (CONFIG, FIT, "checkpoints")):
        return
    if not run.is_dir():
        raise UserError(f"{run} is a file: name a folder for the run with --out")
    if (run / "manifest.json").is_file():
        raise UserError(f"{run} is a pack: name another folder for the run with --out")
    others = (path for path in run.iterdir() if path.suffix not in OTHERS)
    if found := sorted(path.name for path in others if not path.name.startswith(".")):
        raise UserError(
            f"{run} is no run, it holds {found[0]}: name a new folder, or that of a run, with --out"
        )


def read_run_files(run: Path) -> RunFiles:
    """Return what a finished run holds. Raise UserError where a file of it is damaged."""
    result = read_result(run)
    return RunFiles(run, _config(run), result, read_epochs(run), _predictions(run))


def read_epochs(run: Path) -> list[dict[str, Any]]:
    """Return the record of each epoch so far. Raise UserError where one is damaged."""
    file = run / EPOCHS
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    return [_json(file, line) for line in lines if line.strip()]


def _json(path: Path, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}): train again") from error


def _config(run: Path) -> dict[str, Any]:
    file = run / CONFIG
    try:
        return tomllib.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not valid TOML: {error}") from error


def _predictions(run: Path) -> dict[str, np.ndarray]:
    file = run / "val_predictions.npz"
    if not file.is_file():
        return {}
    import numpy as np

    try:
        with np.load(file) as arrays:
            return {name: arrays[name] for name in ("label", "predicted", "confidence", "image")}
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"{file} is damaged ({error}): train again") from error
