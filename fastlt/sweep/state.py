"""The state of a sweep: all that the driver knows of the trials lies in DIR."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastlt.config import load_config
from fastlt.errors import UserError
from fastlt.packing.reader import open_pack
from fastlt.sweep.results import Row, outcome, read_row, run_of
from fastlt.sweep.spec import Sweep, Values, values_of
from fastlt.sweep.trial import Trial, absolute, make_trial, trained
from fastlt.utils.files import write_text
from fastlt.utils.lock import LOCK
from fastlt.utils.run_files import RESULT

BEFORE_IT_BEGINS = {LOCK, "runs", "packs.json"}  # what a sweep that was refused may leave


@dataclass
class SweepState:
    """The trials of a sweep, and what has become of them."""

    sweep: Sweep
    pack: str
    out: Path
    more: Sequence[str]
    here: Path = field(default_factory=Path.cwd)  # where files that settings name are looked for
    trials: list[Trial] = field(default_factory=list)
    # key of a run -> the trial that it is named after
    first: dict[str, str] = field(default_factory=dict)
    finished: dict[str, Row] = field(default_factory=dict)  # by the name of the trial

    def trial(self, values: Values) -> Trial:
        """Return the trial of a point."""
        return make_trial(self.sweep, self.pack, values, self.more, self.out / "decoded")

    def add(self, values: Values) -> Trial:
        """Return the trial of a point, and add it to those that are known.

        Those of a search become known as they are begun.
        """
        trial = self.trial(values)
        if all(trial.values != known.values for known in self.trials):
            self.trials.append(trial)
            run_of(self.out, trial, self.first)
        return trial

    def begin(self, suggested: dict[str, Any]) -> Trial:
        """Return the trial that Ray begins; in a search it may be new, and is written down."""
        before = len(self.trials)
        trial = self.add(values_of(self.sweep, suggested))
        if len(self.trials) > before:
            self.write_down()
        return trial

    def write_down(self) -> None:
        """Write the known points to trials.jsonl."""
        write_text(
            self.out / "trials.jsonl",
            "".join(json.dumps(trial.values) + "\n" for trial in self.trials),
        )

    def run(self, trial: Trial) -> Path:
        """Return the RUN folder of a trial."""
        return run_of(self.out, trial, self.first)

    def rows(self) -> list[Row]:
        """Return the rows of all trials."""
        return [self.row(trial) for trial in self.trials]

    def row(self, trial: Trial) -> Row:
        """Return the row of a trial; that of a finished one does not change any more."""
        if (known := self.finished.get(trial.name)) is not None:
            return known
        row = read_row(self.run(trial), trial, self.sweep.resources.cpus, self.sweep.resources.gpus)
        if row["status"] == "finished":
            self.finished[trial.name] = row
        return row

    def left(self) -> list[Trial]:
        """Return one trial of each run that is not over."""
        runs: dict[Path, Trial] = {}
        for trial in self.trials:
            if outcome(self.run(trial))[1] not in ("finished", "stopped early"):
                runs.setdefault(self.run(trial), trial)
        return list(runs.values())


def known_points(state: SweepState) -> Iterator[Values]:
    """Yield the points that a search had tried before it was killed."""
    path = state.out / "trials.jsonl"
    if path.is_file():
        yield from (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())


def check_runs(state: SweepState) -> None:
    """Raise UserError where a run was trained with other settings than the sweep now has."""
    for trial in state.trials:
        kept = state.run(trial) / "config.toml"
        if not kept.is_file():
            continue
        before, now = trained(load_config(str(kept))), trained(trial.config)
        if changed := [key for key in now if before.get(key) != now[key]]:
            what = f"{changed[0]} = {before.get(changed[0])!r}, not {now[changed[0]]!r}"
            raise UserError(
                f"{kept.parent} was trained with other settings ({what}): choose another --out, or "
                "remove it"
            )


def check_folder(out: Path, resume: bool) -> None:
    """Raise UserError where DIR holds another sweep, or something else."""
    if (out / "runs").is_dir() and any((out / "runs").iterdir()):
        if not resume:
            raise UserError(
                f"{out} holds a sweep already: go on with it by --resume, or choose another --out"
            )
    elif (
        out.is_dir()
        and not (out / "sweep.toml").is_file()
        and {path.name for path in out.iterdir()} - BEFORE_IT_BEGINS
    ):
        raise UserError(f"{out} holds other things than a sweep: choose another --out")


def check_packs(state: SweepState) -> None:
    """Raise UserError where a pack is absent, or another one than DIR/packs.json says."""
    axis = next(
        (axis for name, axis in state.sweep.axes.items() if name in ("pack", "data.pack")), None
    )
    places = (
        [state.pack]
        if axis is None
        else [str(place) for place in axis]
        if isinstance(axis, list)
        else []
    )
    now = {place if axis is not None else "": open_pack(absolute(place)).id for place in places}
    file = state.out / "packs.json"
    kept = (
        json.loads(file.read_text(encoding="utf-8"))
        if file.is_file() and any((state.out / "runs").iterdir())
        else {}
    )
    if changed := [place for place, pack in now.items() if kept.get(place, pack) != pack]:
        raise UserError(
            f"{state.out} was trained on another pack than {changed[0] or state.pack}: choose "
            "another --out"
        )
    write_text(file, json.dumps({**kept, **now}, indent=1) + "\n")


def left_out(state: SweepState) -> int:
    """Return how many finished runs in DIR are of no point that the sweep has now."""
    own = {state.run(trial) for trial in state.trials}
    return sum(path.parent not in own for path in (state.out / "runs").glob(f"*/{RESULT}"))
