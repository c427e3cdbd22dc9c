"""Methods: what the training loop trains. Each is a file here, or a preset: a few settings.

`method.name` names a file, `--method` a file or a preset.
"""

from collections.abc import Callable, Mapping
from functools import cache
from importlib import import_module, resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastlt.config import MethodConfig, did_you_mean
from fastlt.errors import ConfigError
from fastlt.methods.presets import PRESETS, SECOND_STAGE, Settings, preset_settings

if TYPE_CHECKING:
    from fastlt.models.classifier import Classifier

NOT_METHODS = ("__init__", "method", "presets")


class Listed(NamedTuple):
    """A method as `fastlt methods` prints it."""

    name: str
    kind: str  # method, preset, or second stage
    line: str
    paper: str


def method_names() -> list[str]:
    """Return the names of the methods that are files."""
    files = (Path(file.name) for file in resources.files("fastlt.methods").iterdir())
    stems = sorted(file.stem for file in files if file.suffix == ".py")
    return [stem.replace("_", "-") for stem in stems if stem not in NOT_METHODS]


@cache
def method_type(name: str) -> Any:
    """Return the class of a method. Raises ConfigError that names the nearest one."""
    if name not in method_names():
        names = method_names()
        raise ConfigError(
            f"there is no method '{name}'{did_you_mean(name, names)}: method.name is one of "
            f"{', '.join(names)}"
        )
    return import_module(f"fastlt.methods.{name.replace('-', '_')}").Method


@cache
def section(method: str = "plain") -> type[MethodConfig]:
    """Return the class of the section [method] for a method."""
    return method_type(method).Config


def method_settings(method: str | None, start: str | None) -> Callable[[int, int | None], Settings]:
    """Return what `--method` and `--start` set, below the user's own settings.

    The function that is returned takes the epochs of the recipe, and those that the user asks for
    or None. method: a file or a preset; start: the finished RUN that the model begins with.
    """
    if method is not None and method not in PRESETS:
        names = [*method_names(), *PRESETS]
        if method not in names:
            raise ConfigError(
                f"there is no method '{method}'{did_you_mean(method, names)}; methods: "
                f"{', '.join(names)}"
            )
        begin: Settings = {"method.name": method}
        if start:
            begin["model.weights"] = start
        # its file is imported, and torch with it, only when the settings are asked for
        return lambda epochs, longer: {**begin, **settings_of(method)}
    return preset_settings(method, start)


def settings_of(name: str) -> Mapping[str, Any]:
    """Return what a method sets in other sections, by `section.key`, below the user's own."""
    return method_type(name).SETTINGS


def built(config: Mapping[str, Any], model: "Classifier") -> "Classifier":
    """Return a model with what a method changes of its architecture; config: its [method]."""
    kind = method_type(config["name"])
    return kind.build(kind.Config.model_validate(dict(config)), model)


def listed_methods() -> list[Listed]:
    """Return all methods and presets, with a line and the paper of each."""
    found = []
    for name in method_names():
        kind = method_type(name)
        module = import_module(kind.__module__)
        found.append(Listed(name, "method", first_line(module.__doc__), kind.PAPER))
    for name, preset in PRESETS.items():
        kind = "second stage" if name in SECOND_STAGE else "preset"
        found.append(Listed(name, kind, preset.line, preset.paper))
    return found


def first_line(doc: str | None) -> str:
    """Return the first line of a docstring."""
    return (doc or "").strip().partition("\n")[0]
