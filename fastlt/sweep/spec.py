"""SWEEP.toml: the settings of all trials, their axes, and how they are chosen and placed."""

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, ValidationError, model_validator

from fastlt.config import (
    Config,
    Count,
    Positive,
    Section,
    did_you_mean,
    field_of,
    is_section,
)
from fastlt.errors import UserError
from fastlt.utils.run_files import Metric

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# What one asks for, and the key of the configuration that it is.
SHORT = {
    "neighbours": "data.neighbours",
    "images": "data.budget",
    "share": "data.auxiliary_share",
    "ratio": "data.auxiliary_ratio",
    "band": "data.band",
    "silence": "loss.silence",
    "mask": "loss.mask",
    "directions": "loss.directions",
    "pack": "data.pack",
    "seed": "train.seed",
}
CONTROLS: dict[str, dict[str, Any]] = {
    "neighbours": {"data.auxiliary": True, "data.pairs": "given"},
    "random": {"data.auxiliary": True, "data.pairs": "random"},
    "none": {"data.auxiliary": False},
}
Values = dict[str, Any]  # axis -> value


class Range(Section):
    """An axis that is searched rather than gone through."""

    low: float
    """The lowest value."""
    high: float
    """The highest value."""
    log: bool = False
    """Draw evenly on a logarithmic scale."""
    whole: bool = False
    """Draw numbers without a fraction."""

    @model_validator(mode="after")
    def _ascends(self) -> "Range":
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(
                f"low = {self.low:g} must be less than high = {self.high:g}, and above 0 where log "
                "is true"
            )
        return self

    def draw(self, rng: np.random.Generator) -> float | int:
        """Return a random value of the range."""
        if self.whole:
            return int(rng.integers(round(self.low), round(self.high) + 1))
        if self.log:
            return float(np.exp(rng.uniform(np.log(self.low), np.log(self.high))))
        return float(rng.uniform(self.low, self.high))


Axis = list[Any] | Range


class Search(Section):
    """The way in which trials are chosen."""

    kind: Literal["grid", "random", "optuna"] = "grid"
    """grid: all values; random: drawn; optuna: chosen by what earlier trials gave."""
    trials: Count = 0
    """Trials of random and optuna."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of what is drawn."""
    metric: Metric = "top1"
    """The figure that is to be high."""
    stop_early: bool = False
    """ASHA: end trials that are behind others at the same epoch."""
    grace: Annotated[int, Field(ge=1)] = 1
    """Epochs before which no trial is ended early."""


class Resources(Section):
    """The resources of a trial."""

    cpus: Positive = 1.0
    """Cores of a trial; torch has as many threads."""
    gpus: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """GPUs of a trial; 0.25: four trials share one."""
    parallel: Count = 0
    """Trials at a time, at most; 0: as many as there is room for."""
    retries: Count = 2
    """Repetitions of a trial whose process dies, or that fails for no reason of its own."""


class Sweep(Section):
    """A sweep as SWEEP.toml describes it."""

    recipe: str
    """The recipe of every trial, a name or the path of a .toml file."""
    method: str = ""
    """A method, as `fastlt train --method` takes it."""
    settings: dict[str, Any] = Field(default={})
    """Settings of every trial, by section.key."""
    axes: dict[str, Axis] = Field(min_length=1)
    """Axes, each with its values or, where they are searched, a range."""
    baseline: Values = Field(default={})
    """Values of axes: the trials that others are compared with."""
    search: Search = Search()
    """The way in which trials are chosen."""
    resources: Resources = Resources()
    """The resources of a trial."""

    @model_validator(mode="after")
    def _fits_together(self) -> "Sweep":
        ranges = [name for name, axis in self.axes.items() if isinstance(axis, Range)]
        if self.search.kind == "grid" and ranges:
            raise ValueError(
                f"the axis {ranges[0]} is a range: list its values, or set search.kind to random "
                "or optuna"
            )
        if self.search.kind != "grid" and not self.search.trials:
            raise ValueError(
                f"search.kind = {self.search.kind} needs search.trials, how many there are to be"
            )
        if empty := [name for name, axis in self.axes.items() if axis == []]:
            raise ValueError(f"the axis {empty[0]} has no values")
        if unknown := [name for name in self.baseline if name not in self.axes]:
            raise ValueError(
                f"the baseline names '{unknown[0]}'{did_you_mean(unknown[0], list(self.axes))}, "
                "which is no axis"
            )
        return self


def read_sweep(file: Path) -> Sweep:
    """Return the sweep of a file. Raises UserError that says where it is wrong."""
    try:
        tree = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the sweep {file}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{file} is not valid TOML: {error}") from error
    for part in ("settings", "axes", "baseline"):
        if isinstance(tree.get(part), dict):
            tree[part] = dotted(tree[part])
    try:
        return Sweep.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{file}: {in_words(error)}") from error


def in_words(error: ValidationError) -> str:
    """Return the first thing that is wrong, in words.

    An axis is a list or a range, of which pydantic names both.
    """
    first = next((e for e in error.errors() if e["type"] != "list_type"), error.errors()[0])
    place = ".".join(
        str(part) for part in first["loc"] if re.fullmatch(r"[\w.]+", str(part)) and part != "Range"
    )
    if first["type"] in ("model_type", "dict_type", "list_type") and place.startswith("axes."):
        return (
            f"{place}: an axis is a list of values, or a range such as {{low = 0.01, high = 1, "
            f"log = true}}"
        )
    return f"{place}{': ' if place else ''}{first['msg'].removeprefix('Value error, ')}"


def dotted(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table with sections within it, and those within these, as `section.key`."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        field = field_of(Config, *key.split("."))
        if isinstance(value, dict) and field is not None and is_section(field.annotation):
            flat |= dotted({f"{key}.{name}": entry for name, entry in value.items()})
        else:
            flat[key] = value
    return flat


def settings_of(values: Values) -> dict[str, Any]:
    """Return the values of axes as settings. Raises UserError for an unknown control."""
    settings: dict[str, Any] = {}
    for axis, value in values.items():
        if axis == "control":
            if value not in CONTROLS:
                raise UserError(
                    f"the axis control has '{value}': it may be one of {', '.join(CONTROLS)}"
                )
            settings |= CONTROLS[value]
        else:
            settings[SHORT.get(axis, axis)] = value
    return settings


def axes_but_seeds(sweep: Sweep) -> list[str]:
    """Return the axes that points differ in; seeds are repetitions of a point."""
    return [name for name in sweep.axes if SHORT.get(name, name) != SHORT["seed"]]


def choose(rng: np.random.Generator, axis: Axis) -> Any:
    """Return a random value of an axis."""
    return axis.draw(rng) if isinstance(axis, Range) else axis[int(rng.integers(len(axis)))]


def values_of(sweep: Sweep, suggested: dict[str, Any]) -> Values:
    """Return the values that Ray suggests; where it suggests a place in a list, the value there."""
    if "values" in suggested:
        return suggested["values"]
    return {
        name: suggested[name] if isinstance(axis, Range) else axis[suggested[name]]
        for name, axis in sweep.axes.items()
    }
