"""The command line: importing this package registers every command with `app`."""

from fastlt.cli import (
    benchmarks,
    curation,
    doctor,
    fit,
    granularity,
    models,
    packing,
    predict,
    probe,
    settings,
    training,
)
from fastlt.cli.app import app

__all__ = [
    "app",
    "benchmarks",
    "curation",
    "doctor",
    "fit",
    "granularity",
    "models",
    "packing",
    "predict",
    "probe",
    "settings",
    "training",
]
