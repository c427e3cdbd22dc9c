"""The engines of this folder, and the choice among them."""

from collections.abc import Iterator
from importlib import import_module
from pkgutil import iter_modules

from fastlt.config import Config, did_you_mean
from fastlt.data import engines
from fastlt.data.engines.interface import DECODES, Engine, Options
from fastlt.errors import UserError
from fastlt.packing.reader import Split

NOT_ENGINES = ("choice", "interface")


def find_engines() -> tuple[type[Engine], ...]:
    """Return the engines in the order in which `auto` tries them.

    Every class of the modules of this folder that says its `order` is one: to add an engine is to
    add a file.
    """
    found: dict[type[Engine], None] = {}
    for module in iter_modules(engines.__path__):
        if module.name not in NOT_ENGINES:
            names = vars(import_module(f"{engines.__name__}.{module.name}"))
            found |= dict.fromkeys(one for one in names.values() if hasattr(one, "obstacle"))
    return tuple(sorted(found, key=lambda engine: engine.order))


ENGINES = find_engines()
NAMES = ("auto", *dict.fromkeys(engine.name for engine in ENGINES))


def misfits(config: Config) -> Iterator[tuple[bool, str]]:
    """Yield whether data.engine names an engine, and what to do if it does not."""
    name = config.data.engine
    yield (
        name not in NAMES,
        f"there is no engine '{name}'{did_you_mean(name, NAMES)}: data.engine is one of "
        f"{', '.join(NAMES)}",
    )


def choose(split: Split, options: Options, name: str = "auto") -> type[Engine]:
    """Return the engine of that name, or with `auto` the first that suits the split.

    Raises UserError with the engine's obstacle where it cannot be used; where several share a name,
    with that of the last.
    """
    if name not in NAMES:
        raise UserError(f"there is no engine '{name}': data.engine is one of {', '.join(NAMES)}")
    if options.decode not in DECODES:
        raise UserError(
            f"there is no decode '{options.decode}': data.decode is one of {', '.join(DECODES)}"
        )
    obstacle = None
    for engine in ENGINES:
        if engine.suits(split, options) if name == "auto" else engine.name == name:
            obstacle = engine.obstacle(split, options)
            if obstacle is None:
                return engine
    raise UserError(obstacle or "no engine can load these images")
