"""The command line: importing this package registers every command with `app`."""

from fastlt.cli import (
    benchmarks,
    curation,
    doctor,
    granularity,
    models,
    packing,
    settings,
    training,
)
from fastlt.cli.app import app

__all__ = [
    "app",
    "benchmarks",
    "curation",
    "doctor",
    "granularity",
    "models",
    "packing",
    "settings",
    "training",
]
