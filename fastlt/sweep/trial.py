"""A trial: one point of a sweep, its configuration, and the RUN folder it is trained in.

What two points differ in may not matter: without auxiliary classes nothing is silenced, however
strongly. Such points are one run.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastlt.config import MAY_CHANGE, OLD_KEYS, Config, flat, load_config
from fastlt.errors import UserError
from fastlt.losses import LOSSES
from fastlt.methods import method_settings
from fastlt.packing.remote import is_remote
from fastlt.sweep.spec import SHORT, Axis, Sweep, Values, choose, settings_of

LONGEST_NAME = 100  # characters of a folder
# What no run without auxiliary classes depends on.
OF_AUXILIARIES = (
    "loss.silence",
    "loss.mask",
    "loss.few_shot_images",
    *OLD_KEYS,
    "data.auxiliary",
    "data.neighbours",
    "data.auxiliary_share",
    "data.similarity",
    "data.band",
    "data.pairs",
    "data.budget",
    "data.budgets",
    "data.auxiliary_ratio",
)


@dataclass(frozen=True)
class Trial:
    """A point of the sweep, with its configuration."""

    values: Values  # axis -> value
    settings: tuple[str, ...]  # section.key=value
    config: Config

    @property
    def name(self) -> str:
        """The name of its folder."""
        return name_of(self.values)

    @property
    def seed(self) -> int:
        """The seed of its training."""
        return self.config.train.seed

    @property
    def key(self) -> str:
        """A digest that is the same for trials that are one run."""
        text = {**trained(self.config), "data.pack": self.config.data.pack}
        return hashlib.sha256(json.dumps(text, sort_keys=True, default=str).encode()).hexdigest()


def make_trial(
    sweep: Sweep, pack: str, values: Values, more: Sequence[str] = (), shared: Path | None = None
) -> Trial:
    """Return the trial of a point. Raises UserError that names the setting.

    more: settings of the command line, on top of the sweep's. shared: a folder for what all trials
    decode.
    """
    own = settings_of(values)
    if isinstance(own.get("data.pack"), str):
        own["data.pack"] = absolute(own["data.pack"])
    given = [as_setting(key, value) for key, value in sweep.settings.items()]
    given += [*more, *(as_setting(key, value) for key, value in own.items())]
    # the last of each key
    settings = tuple({setting.partition("=")[0]: setting for setting in given}.values())
    place = [] if "data.pack" in own else [as_setting("data.pack", pack)]
    how = [
        f"train.threads={max(1, round(sweep.resources.cpus))}",
        *([as_setting("data.shared", str(shared))] if shared else []),
    ]
    method = method_settings(sweep.method or None, None)
    config = load_config(sweep.recipe, [*place, *how, *settings], method)
    if has_no_auxiliaries(config) and LOSSES[config.loss.name].silences:
        # there is nothing to be silenced, and a run that is to silence nothing is refused
        settings = (
            *(s for s in settings if not s.startswith("loss.silence=")),
            "loss.silence=1",
        )
        config = load_config(sweep.recipe, [*place, *how, *settings], method)
    return Trial(values, settings, config)


def absolute(place: str) -> str:
    """Return the place of a pack, wherever a process that opens it was started."""
    return place if is_remote(place) else str(Path(place).resolve())


def trained(config: Config) -> dict[str, Any]:
    """Return all settings that a training depends on, but for the place of the pack."""
    left_out = {*MAY_CHANGE, *(OF_AUXILIARIES if has_no_auxiliaries(config) else ())}
    return {key: value for key, value in flat(config).items() if key not in left_out}


def has_no_auxiliaries(config: Config) -> bool:
    """Return whether a training has no auxiliary classes."""
    return not config.data.auxiliary or config.data.neighbours == 0


def as_setting(key: str, value: Any) -> str:
    """Return key and value as `key=value`, the value in TOML."""
    return f"{key}={toml_of(value)}"


def toml_of(value: Any) -> str:
    """Return a value in TOML."""
    if isinstance(value, dict):
        return (
            "{"
            + ", ".join(
                f"{json.dumps(str(key))} = {toml_of(entry)}" for key, entry in value.items()
            )
            + "}"
        )
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml_of, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def points(sweep: Sweep) -> list[Values]:
    """Return all points of a grid; of a random search, as many different ones as it is to have."""
    if sweep.search.kind == "grid":
        lists = [axis for axis in sweep.axes.values() if isinstance(axis, list)]
        return [dict(zip(sweep.axes, values, strict=True)) for values in itertools.product(*lists)]
    rng = np.random.default_rng(sweep.search.seed)
    found: dict[str, Values] = {}
    for _ in range(100 * sweep.search.trials):
        values = {name: choose(rng, axis) for name, axis in sweep.axes.items()}
        found.setdefault(json.dumps(values, sort_keys=True), values)
        if len(found) == sweep.search.trials:
            break
    return list(found.values())


def name_of(values: Values) -> str:
    """Return the folder's name: what the trial is.

    It has a hash where that is too long or not everything.
    """
    text = ",".join(f"{axis.rpartition('.')[2]}={short(value)}" for axis, value in values.items())
    name = re.sub(r"[^A-Za-z0-9=,.+-]+", "-", text).strip("-.")
    is_whole = name == text and all(short(value) == str(value) for value in values.values())
    if len(name) <= LONGEST_NAME and is_whole:
        return name
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
    return f"{name[: LONGEST_NAME - 9]}-{digest[:8]}"


def short(value: Any) -> str:
    """Return a value in few characters."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return "..".join(map(short, value))
    return Path(value).name if isinstance(value, str) else str(value)


def check_axes(sweep: Sweep, pack: str, more: Sequence[str]) -> None:
    """Raise UserError for a wrong value of any axis, before anything is trained."""
    for name in sweep.axes:
        if name not in SHORT and "." not in name and name != "control":
            known = ", ".join([*SHORT, "control"])
            raise UserError(
                f"there is no axis '{name}': it is one of {known}, or any key of the configuration "
                "such as optim.lr"
            )
        check_axis(sweep, pack, name, more)
    keys = [
        (key, name)
        for name, axis in sweep.axes.items()
        for key in settings_of({name: first_of(axis)})
    ]
    for key, name in keys:
        if others := [other for also, other in keys if also == key and other != name]:
            raise UserError(
                f"the axes {name} and {others[0]} both set {key}: leave one of them out"
            )
    for name, value in sweep.baseline.items():
        axis = sweep.axes[name]
        if isinstance(axis, list) and value not in axis:
            raise UserError(
                f"the baseline has {name} = {value!r}, which is none of the axis' values"
            )


def check_axis(sweep: Sweep, pack: str, name: str, more: Sequence[str]) -> None:
    """Raise UserError for a wrong value of an axis."""
    axis = sweep.axes[name]
    for value in axis if isinstance(axis, list) else [first_of(axis)]:
        try:
            make_trial(sweep, pack, {name: value}, more)
        except UserError as error:
            whole = (
                "; a range of whole numbers has `whole = true`"
                if not isinstance(axis, list) and "integer" in str(error)
                else ""
            )
            raise UserError(f"{error}{whole}") from error


def first_of(axis: Axis) -> Any:
    """Return some value of an axis."""
    return axis[0] if isinstance(axis, list) else axis.draw(np.random.default_rng(0))
