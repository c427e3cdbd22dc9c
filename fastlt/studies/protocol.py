"""What the studies of `fastlt reproduce` share: options, packs, and schedules of other lengths."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from fastlt.config import load_config
from fastlt.studies.repeated import Control, Runner, train_all


class ReproduceOptions(NamedTuple):
    """The options of the command."""

    source: str  # cifar100:DIR or grocery:DIR
    out: Path
    epochs: int  # 0: as published
    seeds: int
    parallel: int
    settings: list[str]
    first_seed: int = 0
    only: tuple[str, ...] = ()  # patterns of the controls to run; none: all


def packed(task: str, kind: str, options: ReproduceOptions, *more: str) -> Path:
    """Return the pack of a task, made where it is not there yet.

    more: further options of `fastlt pack`, which the folder is named by.
    """
    words = "".join(f"-{word.lstrip('-')}" for word in more)
    path = options.out / (
        f"pack-{kind}{words}" if kind != "none" or task != "cifar100-lt" else "pack"
    )
    if not path.is_dir():
        Runner().run(
            "pack", options.source, "--task", task, "--auxiliary", kind, "--out", str(path), *more
        )
    return path


def shortened(epochs: int, whole: int) -> list[str]:
    """Return the schedule of CIFAR-100-LT in fewer epochs; that of LDAM-DRW follows by itself."""
    if epochs == whole:
        return []
    schedule = load_config("cifar100-lt").schedule
    steps = {
        max(1, round(int(epoch) * epochs / whole)): factor
        for epoch, factor in schedule.steps.items()
    }
    table = ", ".join(f"{epoch} = {factor!r}" for epoch, factor in steps.items())
    warmup = schedule.warmup_epochs * epochs / whole
    return [
        f"train.epochs={epochs}",
        f"schedule.warmup_epochs={warmup:g}",
        f"schedule.steps={{{table}}}",
    ]


def repeated(
    recipe: str,
    controls: Mapping[str, Control],
    options: ReproduceOptions,
    console: Console,
    least: int = 1,
) -> list[dict[str, Any]]:
    """Return the figures of each control's runs with the seeds of the options, `least` at least."""
    seeds = max(least, options.seeds)
    return train_all(
        recipe, controls, options.out, seeds, options.parallel, console, options.first_seed
    )
