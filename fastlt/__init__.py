"""fastlt: long-tailed image classification with auxiliary classes and neighbour silencing.

The Python API: `pack`, `train`, `load` and `evaluate`, as the commands of these names. Nothing is
imported before it is used, so that `import fastlt` takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastlt import _moved

if TYPE_CHECKING:
    from fastlt.api import evaluate, load, pack, train
    from fastlt.errors import ConfigError, DataError, MissingExtra, UserError
    from fastlt.evaluation.predict import Model, Prediction

    __version__: str

__all__ = [
    "ConfigError",
    "DataError",
    "MissingExtra",
    "Model",
    "Prediction",
    "UserError",
    "__version__",
    "evaluate",
    "load",
    "pack",
    "train",
]
PLACES = {  # name -> the module that it is imported from; all others are in fastlt.api
    "ConfigError": "fastlt.errors",
    "DataError": "fastlt.errors",
    "MissingExtra": "fastlt.errors",
    "Model": "fastlt.evaluation.predict",
    "Prediction": "fastlt.evaluation.predict",
    "UserError": "fastlt.errors",
}
_moved.install()


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("fastlt")
    if name not in __all__:
        raise AttributeError(f"module 'fastlt' has no attribute '{name}'")
    return getattr(import_module(PLACES.get(name, "fastlt.api")), name)


def __dir__() -> list[str]:
    return __all__
