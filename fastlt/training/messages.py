"""What a training prints."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fastlt.config import Config, never_reached
from fastlt.losses import silencing_graph
from fastlt.training.setup import Trainer, TrainState
from fastlt.utils.pool import cores
from fastlt.utils.progress import Bar

DAMAGED_SHOWN = 5  # images that are named at the end of an epoch


def report_setup(trainer: Trainer, console: Console) -> None:
    """Print what is about to be trained, before the first step: set-up errors show here."""
    config, space, plan = trainer.config, trainer.space, trainer.plan
    graph = silencing_graph(config.loss, space)
    members = space.groups(config.data.grouping)
    groups = ", ".join(f"{len(targets)} {name}" for name, targets in members.items())
    auxiliary_images = int(plan.drawn_counts[space.num_targets :].sum())
    total, trained = trainer.parameters
    share = f", {trained / 1e6:.2f} M ({trained / total:.2%}) trained" if trained < total else ""
    optimiser = f"{config.optim.name}, {config.schedule.name} schedule"
    silenced = "nothing"
    if graph is not None:
        blocks = " and whole blocks of classes" if graph.silences_blocks else ""
        silenced = f"{graph.num_pairs:,} pairs{blocks} ({config.loss.mask}), lambda_s = "
        silenced += f"{config.loss.silence:g}"
    drawn, merged = trainer.pack.drawn or space, ", merged" if trainer.pack.drawn else ""
    several = f"{trainer.ranks.world} processes on " if trainer.ranks.world > 1 else ""
    lines = {
        "classes": f"{space.num_targets:,} targets ({groups}) + {drawn.num_auxiliaries:,} "
        f"auxiliaries{merged}",
        "silenced": silenced,
        "images": f"{plan.images_per_epoch:,} an epoch, of which {auxiliary_images:,} auxiliary; "
        f"{plan.steps_per_epoch:,} steps of {config.data.batch}",
        "model": f"{config.model.name}, {total / 1e6:.2f} M parameters{share}; "
        f"loss {config.loss.name}; {optimiser}",
        "machine": f"{several}{trainer.device.type}, {str(trainer.dtype).removeprefix('torch.')}, "
        f"loader {trainer.train_loader.engine_name}, {trainer.train_loader.decode} decode",
    }
    if trainer.row_weights is not None:
        of_image = trainer.row_weights.of_image
        lines["weights"] = (
            f"{of_image.min():g} to {of_image.max():g} by class and image; "
            f"{int((of_image == 0).sum()):,} training images weigh 0"
        )
    for name, text in lines.items():
        console.print(f"[bold]{name:>9}[/]  {text}", highlight=False, soft_wrap=True)
    for note in [*trainer.notes, *notes(config)]:
        console.print(f"[yellow]note:[/] {note}", highlight=False, soft_wrap=True)


def report_stage(trainer: Trainer, console: Console) -> None:
    """Print which stage begins."""
    stage = trainer.stages[trainer.state.stage]
    console.print(
        f"stage {trainer.state.stage + 1} of {len(trainer.stages)}: {stage.name}, "
        f"{trainer.config.train.epochs} epochs",
        highlight=False,
        soft_wrap=True,
    )


def notes(config: Config) -> Iterator[str]:
    """Yield what is no error, but worth a note."""
    numbers: Any = config.model
    if late := never_reached(config):
        yield f"not reached in {config.train.epochs} epochs: {', '.join(late)}"
    starts_somewhere = config.model.pretrained or config.model.weights
    if config.schedule.head_only_epochs >= config.train.epochs and not starts_somewhere:
        yield (
            "the backbone stays as random as it starts: "
            f"schedule.head_only_epochs={config.schedule.head_only_epochs}"
        )
    if numbers.scale_alone and not config.model.head_weights:
        yield (
            "the rows of the head stay as random as they start: model.scale_alone without "
            "model.head_weights"
        )
    if config.data.workers > cores():
        yield (
            f"data.workers={config.data.workers}, but there are {cores()} cores: fewer may be "
            "faster"
        )


def report_damaged(trainer: Trainer, console: Console) -> None:
    """Print the images that were found to be damaged since the last report."""
    damaged = {
        image: reason
        for part in trainer.ranks.all(trainer.train_loader.damaged)
        for image, reason in part.items()
    }
    found = {
        image: reason for image, reason in damaged.items() if image not in trainer.state.damaged
    }
    for reason in list(found.values())[:DAMAGED_SHOWN]:
        console.print(
            f"[yellow]note:[/] {escape(reason)}; another image of its class was taken",
            highlight=False,
            soft_wrap=True,
        )
    if len(found) > DAMAGED_SHOWN:
        console.print(
            f"[yellow]note:[/] and {len(found) - DAMAGED_SHOWN} more; `fastlt pack --verify` reads "
            "the whole pack"
        )
    trainer.state.damaged = sorted({*trainer.state.damaged, *found})


def report_skipped(state: TrainState, console: Console) -> None:
    """Print how many steps of the epoch were skipped."""
    if skipped := state.skipped - state.skipped_before:
        console.print(
            f"[yellow]note:[/] {skipped:,} steps of epoch {state.epochs_done + 1} were skipped: "
            "their gradient was not finite",
            highlight=False,
            soft_wrap=True,
        )


def progress_bar(console: Console) -> Bar:
    """Return the bar of a training, with images/s and the time that is left."""
    return Bar(
        TextColumn("{task.fields[note]:<36}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[rate]:>7,.0f} images/s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        speed_estimate_period=600,  # evaluations stand between steps
    )


def epoch_line(record: dict[str, Any], epochs: int) -> str:
    """Return the line that is printed after an epoch that was evaluated."""
    groups = "  ".join(f"{name} {shown(record[name])}" for name in ("many", "medium", "few"))
    return (
        f"epoch {record['epoch'] + 1:>3}/{epochs}  loss {shown(record['loss'], 3):>6}  top-1 "
        f"{record['top1']:5.1f}  ({groups})"
        f"  {record['images_per_second']:,.0f} images/s"
    )


def shown(value: float | None, digits: int = 1) -> str:
    """Return a figure for the screen; a dash where there is none."""
    return "   -" if value is None else f"{value:4.{digits}f}"
