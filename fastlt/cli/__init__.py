"""The command line: importing this package registers every command with `app`."""

from fastlt.cli import benchmarks, curation, granularity, models, packing, training
from fastlt.cli.app import app

__all__ = ["app", "benchmarks", "curation", "granularity", "models", "packing", "training"]
