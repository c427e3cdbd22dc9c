"""What the studies of `fastlt reproduce` share: options, packs, and schedules of other lengths."""

from pathlib import Path
from typing import NamedTuple

from fastlt.config import load_config
from fastlt.studies.repeated import Runner


class ReproduceOptions(NamedTuple):
    """The options of the command."""

    source: str  # cifar100:DIR
    out: Path
    epochs: int  # 0: as published
    seeds: int
    parallel: int
    settings: list[str]


def packed(task: str, kind: str, options: ReproduceOptions) -> Path:
    """Return the pack of a task, made where it is not there yet."""
    path = options.out / (
        f"pack-{kind}" if kind != "none" or task == "cifar100-siblings" else "pack"
    )
    if not path.is_dir():
        Runner().run(
            "pack", options.source, "--task", task, "--auxiliary", kind, "--out", str(path)
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
