"""The training loop: a recipe and a pack in, a RUN folder out. It reads top to bottom.

Everything random in a step is drawn from generators seeded by (seed, step), and the order is the
plan's, so a run that was killed and started again takes the same steps: on a CPU it ends with the
same bits.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from fastlt.config import Config, DataConfig, TrainConfig, to_toml
from fastlt.data.augment import compiled_finish, scale_and_shift
from fastlt.data.augment import finish as finish_batch
from fastlt.data.engines.torch import dead_workers_in_words
from fastlt.data.jitter import colour_jitter
from fastlt.data.mixup import draw
from fastlt.data.plan import Batch, evaluation_batches
from fastlt.data.prefetch import prefetch_to_device, to_device
from fastlt.data.randaugment import randaugment
from fastlt.errors import UserError
from fastlt.evaluation.evaluate import (
    EVALUATION_BATCH,
    evaluation_geometry,
    predict,
    save_predictions,
)
from fastlt.evaluation.metrics import Predictions, confusions, joined_predictions, score
from fastlt.losses import Step, build_criterion, in_drw
from fastlt.models.classifier import Classifier, whole_targets
from fastlt.models.export import export_safetensors
from fastlt.packing.concat import concat_packs
from fastlt.packing.reader import Pack, open_pack
from fastlt.training.compile import build_forward
from fastlt.training.distributed import joined
from fastlt.training.optim import set_lr
from fastlt.training.run_folder import check_config, disk_errors, finished, only_run, resume, save
from fastlt.training.setup import Phase, Progressed, Trainer, grow, introduce, prepare
from fastlt.utils.files import write_text
from fastlt.utils.signals import Stopped, stop_on_signals

DAMAGED_SHOWN = 5  # images that are named at the end of an epoch
UNKNOWN = -1.0  # the norm of a gradient that is still being accumulated
ASK_EVERY = 10  # steps, of several ranks: whether one of them wants a checkpoint, or to stop
OnEpoch = Callable[[dict[str, Any]], None]
READ_LOSS_EVERY = 20  # steps between looks at the loss: each look waits for the device


def train(
    config: Config, run: Path, console: Console, on_epoch: OnEpoch | None = None
) -> dict[str, Any]:
    """`fastlt train`: goes on where an earlier call in the same RUN stopped.

    Returns what result.json holds.

    on_epoch is told what metrics.jsonl is told, once the epoch is saved. Raises Stopped where
    SIGTERM or Ctrl-C ended it early, once it is saved.
    """
    with joined(config.model.head == "class-parallel") as ranks:
        if not ranks.is_first:
            console = Console(quiet=True)
        pack = open_packs(config.data)
        with (
            only_run(run, ranks),
            disk_errors(run),
            dead_workers_in_words(),
            stop_on_signals(console) as stop,
        ):
            check_config(config, run)
            trainer = prepare(config, run, pack, ranks)
            trainer.stop = stop
            try:
                return carry_out(trainer, console, on_epoch)
            finally:
                trainer.forward = None  # before the process group, to which it holds on
                trainer.train_loader.close()
                trainer.val_loader.close()
                trainer.writer.close()


def carry_out(
    trainer: Trainer, console: Console, on_epoch: OnEpoch | None = None
) -> dict[str, Any]:
    config, run = trainer.config, trainer.run
    if trainer.ranks.is_first:
        write_text(run / "config.toml", to_toml(config))
    resume(trainer, console)
    if (result := finished(trainer)) is not None:
        console.print(f"{run} has finished already")
        return result
    introduce(trainer, console)
    return finish(trainer, fit(trainer, console, on_epoch))


def open_packs(data: DataConfig) -> Pack:
    """The pack of the configuration, with those that it mixes in."""
    if not data.pack:
        raise UserError("no pack to train on: name one with --data PACK")
    main = open_pack(data.pack, round(data.cache_gb * 1e9))
    return (
        concat_packs(main, {place: open_pack(place) for place in data.mix}, data.mix)
        if data.mix
        else main
    )


# --- loop


def fit(trainer: Trainer, console: Console, on_epoch: OnEpoch | None = None) -> Predictions | None:
    """Train all epochs that are left; return the predictions of the last, None if none was left."""
    config, at = trainer.config, trainer.at
    predictions = None
    events = (
        SummaryWriter(str(trainer.run), purge_step=at.step + 1) if trainer.ranks.is_first else None
    )
    with events or nullcontext(), progress_bar(console) as bar:
        task = bar.add_task(
            "",
            total=config.train.epochs * trainer.plan.steps_per_epoch,
            completed=at.step,
            rate=0.0,
            note="",
        )
        while at.epoch < config.train.epochs:
            grow(trainer)
            rate = train_epoch(
                trainer,
                lambda done, note: bar.update(
                    task, completed=trainer.at.step, rate=done, note=note
                ),
            )
            tell_damaged(trainer, bar.console)
            tell_skipped(trainer.at, bar.console)
            predictions = evaluate(trainer) if is_evaluated(config, at.epoch) else None
            record = record_epoch(trainer, rate, predictions)
            for name, value in record.items():
                if events is not None and isinstance(value, float):
                    events.add_scalar(name, value, at.step)
            if "top1" in record:
                bar.console.print(
                    epoch_line(record, config.train.epochs), highlight=False, soft_wrap=True
                )
            save(trainer)
            if on_epoch is not None:
                on_epoch(record)
            stop_if_asked(trainer)
    trainer.writer.wait()
    return predictions


def train_epoch(trainer: Trainer, report: Callable[[float, str], None]) -> float:
    """One epoch from where `trainer.at` stands. Returns images/s."""
    config, at, plan = trainer.config, trainer.at, trainer.plan
    set_modes(trainer)
    forward = forward_of(trainer, at.epoch)
    steps: list[Tensor] = []
    began = last_saved = time.perf_counter()
    images_before, seconds_before = at.images, at.seconds
    loaded = trainer.train_loader.iterate(plan.epoch(at.epoch, at.step_in_epoch))
    for batch, pixels in prefetch_to_device(loaded, trainer.device):
        _, is_last = accumulation(config.optim.accumulate, at.step_in_epoch, plan.steps_per_epoch)
        trainer.guard.begin(at.step, batch.images, is_last)
        steps.append(train_step(trainer, forward, batch, pixels))
        at.step, at.step_in_epoch = at.step + 1, at.step_in_epoch + 1
        at.images += len(batch.labels) * trainer.ranks.world
        if at.step % READ_LOSS_EVERY == 0:
            read_steps(steps, trainer)
            report(
                (at.images - images_before) / (time.perf_counter() - began),
                f"epoch {at.epoch + 1} loss {shown(mean_loss(at), 3)} train {train_top1(at):.1f}",
            )
        if (
            is_last
            and at.step_in_epoch < plan.steps_per_epoch
            and asks_for_checkpoint(trainer, last_saved)
        ):
            read_steps(steps, trainer)
            at.seconds = seconds_before + time.perf_counter() - began
            save(trainer)
            stop_if_asked(trainer)
            last_saved = time.perf_counter()
    read_steps(steps, trainer)
    seconds = time.perf_counter() - began
    at.seconds = seconds_before + seconds
    return (at.images - images_before) / max(1e-9, seconds)


def asks_for_checkpoint(trainer: Trainer, last_saved: float) -> bool:
    """Amid an epoch.

    Several ranks do not agree on the time, nor on when they heard that they are to stop: they ask
    each other, but not in every step.
    """
    wanted = trainer.stop.made or is_due(trainer.config.train, trainer.at.step, last_saved)
    if trainer.ranks.world == 1:
        return wanted
    by_steps = is_due(trainer.config.train, trainer.at.step, math.inf)
    if not by_steps and trainer.at.step % ASK_EVERY:
        return False
    trainer.stop.made = trainer.ranks.any(trainer.stop.made, trainer.device)
    return trainer.ranks.any(wanted, trainer.device)


def is_due(config: TrainConfig, step: int, last_saved: float) -> bool:
    by_steps = config.checkpoint_steps > 0 and step % config.checkpoint_steps == 0
    return by_steps or time.perf_counter() - last_saved > 60 * config.checkpoint_minutes


def stop_if_asked(trainer: Trainer) -> None:
    """Right after a checkpoint. Raises Stopped once it is on the disk."""
    at = trainer.at
    trainer.stop.made = trainer.ranks.any(trainer.stop.made, trainer.device)
    if trainer.stop.made and at.epoch < trainer.config.train.epochs:
        trainer.writer.wait()
        raise Stopped(
            f"stopped at epoch {at.epoch + 1}, step {at.step_in_epoch}: the same command goes on "
            "from there"
        )


def tell_damaged(trainer: Trainer, console: Console) -> None:
    """Names the images that were found to be damaged since the last time."""
    damaged = {
        image: reason
        for part in trainer.ranks.all(trainer.train_loader.damaged)
        for image, reason in part.items()
    }
    found = {image: reason for image, reason in damaged.items() if image not in trainer.at.damaged}
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
    trainer.at.damaged = sorted({*trainer.at.damaged, *found})


def tell_skipped(at: Progressed, console: Console) -> None:
    """Of the epoch."""
    if skipped := at.skipped - at.skipped_before:
        console.print(
            f"[yellow]note:[/] {skipped:,} steps of epoch {at.epoch + 1} were skipped: their "
            "gradient was not finite",
            highlight=False,
            soft_wrap=True,
        )


def set_modes(trainer: Trainer) -> None:
    """In the head-only epochs the backbone stands still, its batch-norm statistics too, unless they
    are to follow.
    """
    schedule = trainer.config.schedule
    trainer.model.train()
    if schedule.head_only_epochs:
        frozen = trainer.at.epoch < schedule.head_only_epochs
        trainer.model.backbone.requires_grad_(not frozen).train(not frozen or schedule.shift_bn)


def train_step(
    trainer: Trainer,
    forward: Callable[..., Step],
    batch: Batch,
    pixels: Tensor,
    mark: Callable[[str], None] = lambda part: None,
) -> Tensor:
    """One batch: its `Step` and the norm of the gradient as one tensor (4,), still on the device.
    mark is told of parts done.
    """
    config, at, device = trainer.config, trainer.at, trainer.device
    generator = torch.Generator().manual_seed(
        step_seed(config.train.seed, at.step, 0, trainer.ranks.rank)
    )
    # dropout and the like
    torch.manual_seed(step_seed(config.train.seed, at.step, 1, trainer.ranks.rank))
    factor = trainer.factor(at.epoch + at.step_in_epoch / trainer.plan.steps_per_epoch)
    set_lr(trainer.updater.optimizer, factor)
    images, target, target_b, mix = make_input(
        config, pixels, torch.from_numpy(batch.labels), generator, device, trainer.dtype
    )
    mark("input")
    group, is_last = accumulation(
        config.optim.accumulate, at.step_in_epoch, trainer.plan.steps_per_epoch
    )
    with nullcontext() if is_last else unsynchronised(forward):
        with torch.autocast(device.type, trainer.dtype, enabled=trainer.dtype != torch.float32):
            loss, correct, counted = forward(images, target, target_b, mix)
        mark("forward")
        (loss * trainer.updater.scale / group).backward()
    mark("backward")
    norm = trainer.updater.step() if is_last else torch.full_like(loss, UNKNOWN)
    if is_last and trainer.ema is not None:
        trainer.ema.update(trainer.model, at.step // config.optim.accumulate)
    mark("optimiser")
    return torch.stack([loss.detach(), correct, counted, norm])


def unsynchronised(forward: Callable[..., Step]) -> AbstractContextManager[Any]:
    """Ranks keep their gradients to themselves, to add more to them."""
    return getattr(forward, "no_sync", nullcontext)()


def accumulation(accumulate: int, step: int, steps: int) -> tuple[int, bool]:
    """How many batches the group of this step has (the last of an epoch may have fewer), and
    whether the step ends it.
    """
    start = step // accumulate * accumulate
    group = min(accumulate, steps - start)
    return group, step + 1 == start + group


def make_input(
    config: Config,
    pixels: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """uint8 pixels (N, H, W, 3) to augmented, normalised images (N, 3, H, W) and labels on the
    device.

    dtype: that of autocast, to which the first layer would turn them anyway.
    """
    augment, data = config.augment, config.data
    # not for the short batch that may end an epoch
    compiled = is_compiled(config, device) and data.batch % len(pixels) == 0
    target, pixels = to_device(labels, device), to_device(pixels, device)
    if augment.randaugment or any(augment.jitter):
        planes = colour_jitter(pixels.permute(0, 3, 1, 2), augment.jitter, generator, compiled)
        pixels = randaugment(
            planes, augment.randaugment, augment.randaugment_ops, generator
        ).permute(0, 2, 3, 1)
    count, height, width, _ = pixels.shape
    draws = draw(augment, count, height, width, generator, device)
    scales = scale_and_shift(tuple(data.mean), tuple(data.std), device)
    finish = compiled_finish() if compiled else finish_batch
    images = finish(pixels, *scales, draws, config.train.channels_last, dtype)
    return (
        (images, target, None, None)
        if draws.mix is None
        else (images, target, target.flip(0), draws.mix[0])
    )


def step_seed(seed: int, step: int, stream: int, rank: int = 0) -> int:
    return int(
        np.random.SeedSequence([seed, step, stream, *([rank] if rank else [])]).generate_state(
            1, np.uint64
        )[0]
        >> 1
    )


def forward_of(trainer: Trainer, epoch: int) -> Callable[..., Step]:
    """`forward(images, target, target_b, mix)` to loss and hits: model and loss as one graph where
    that is compiled.
    """
    config = trainer.config
    phase = Phase(in_drw(config.loss, epoch), epoch < config.schedule.head_only_epochs)
    if trainer.forward is None or trainer.forward[0] != phase:
        counts = torch.from_numpy(trainer.plan.class_counts[: trainer.space.num_classes])
        criterion = build_criterion(
            config.loss, trainer.space, counts, trainer.model, phase.drw, trainer.device
        )
        trainer.forward = None  # first: what it has hung on the parameters goes with it
        mode = config.train.compile_mode if is_compiled(config, trainer.device) else None
        trainer.forward = (
            phase,
            build_forward(
                trainer.model,
                criterion,
                trainer.ranks,
                mode,
                trainer.plan.batch // trainer.ranks.world,
            ),
        )
    return trainer.forward[1]


def is_compiled(config: Config, device: torch.device) -> bool:
    return config.train.compile == "on" or (
        config.train.compile == "auto" and device.type == "cuda"
    )


def read_steps(steps: list[Tensor], trainer: Trainer) -> None:
    """Adds the steps since the last look to the epoch's sums; waits for the device.

    UserError where training has diverged.
    """
    if not steps:
        return
    at, world = trainer.at, trainer.ranks.world
    # hits add up over ranks, losses and norms are averaged
    means = torch.tensor([1 / world, 1.0, 1.0, 1 / world])
    rows = (trainer.ranks.total(torch.stack(steps)).cpu() * means).tolist()
    steps.clear()
    for loss, correct, counted, _ in rows:
        if math.isfinite(loss):
            at.loss_sum, at.summed = at.loss_sum + loss, at.summed + 1
            at.correct, at.counted = at.correct + correct, at.counted + counted
    is_finite = [math.isfinite(norm) for *_, norm in rows if not norm < 0]
    skipped, at.skipped_in_row = trainer.guard.look(
        is_finite, at.skipped_in_row, f"epoch {at.epoch + 1}, step {at.step_in_epoch}"
    )
    at.skipped += skipped


def mean_loss(at: Progressed) -> float | None:
    """None where no step was finite."""
    return at.loss_sum / at.summed if at.summed else None


def train_top1(at: Progressed) -> float:
    """Percent of this epoch's target images that the model, as it was at their step, got right
    among the targets.
    """
    return 100 * at.correct / max(1e-9, at.counted)


# --- after an epoch


def is_evaluated(config: Config, epoch: int) -> bool:
    return (epoch + 1) % config.train.eval_every == 0 or epoch + 1 == config.train.epochs


def record_epoch(trainer: Trainer, rate: float, predictions: Predictions | None) -> dict[str, Any]:
    """Scores the predictions, writes the line of metrics.jsonl, and moves on to the next epoch."""
    at = trainer.at
    record: dict[str, Any] = {
        "epoch": at.epoch,
        "step": at.step,
        "loss": mean_loss(at),
        "train_top1": train_top1(at),
        "lr": trainer.updater.optimizer.param_groups[-1]["lr"],
        "images_per_second": rate,
        "seconds": at.seconds,
        "skipped_steps": at.skipped,
        "damaged_images": len(at.damaged),
    }
    if predictions is not None:
        figures = score(predictions, trainer.space)
        record |= {name: figures[name] for name in ("top1", "many", "medium", "few")}
        if figures["top1"] > at.best.get("top1", -1.0):
            at.best = {
                "epoch": at.epoch + 1,
                **{name: figures[name] for name in ("top1", "many", "medium", "few")},
            }
    if trainer.ranks.is_first:
        with (trainer.run / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    at.epoch, at.step_in_epoch, at.skipped_before = at.epoch + 1, 0, at.skipped
    at.loss_sum, at.summed, at.correct, at.counted = 0.0, 0, 0.0, 0.0
    return record


def evaluated_model(trainer: Trainer) -> Classifier:
    """All ranks have to ask together."""
    return whole_targets(
        trainer.model if trainer.ema is None else trainer.ema.model, trainer.space.num_targets
    )


def evaluate(trainer: Trainer) -> Predictions:
    """Each rank evaluates its part; all have all predictions afterwards."""
    ranks, data, val = trainer.ranks, trainer.config.data, trainer.pack.val
    batches = evaluation_batches(
        val, evaluation_geometry(data), EVALUATION_BATCH, ranks.rank, ranks.world
    )
    if ranks.world == 1:
        batches = until_asked_to_stop(trainer, batches)
    model = evaluated_model(trainer)
    return joined_predictions(
        ranks.all(
            predict(
                model,
                trainer.val_loader,
                batches,
                data,
                trainer.space,
                trainer.device,
                trainer.dtype,
            )
        )
    )


def until_asked_to_stop(trainer: Trainer, batches: Iterator[Batch]) -> Iterator[Batch]:
    """A run that goes on evaluates once more."""
    for batch in batches:
        if trainer.stop.made:
            save(trainer)
            stop_if_asked(trainer)
        yield batch


def finish(trainer: Trainer, predictions: Predictions | None) -> dict[str, Any]:
    """The last epoch's model and figures, the best epoch named beside."""
    predictions = predictions or evaluate(trainer)
    model = evaluated_model(trainer)
    result = score(predictions, trainer.space)
    result |= {
        "best": trainer.at.best,
        "epochs": trainer.config.train.epochs,
        "confusion": confusions(predictions),
        "seconds": trainer.at.seconds,
        "images": trainer.at.images,
        "images_per_second": trainer.at.images / max(1e-9, trainer.at.seconds),
        "damaged_images": len(trainer.at.damaged),
        "skipped_steps": trainer.at.skipped,
    }
    if trainer.ranks.is_first:
        export_safetensors(
            model, trainer.config, trainer.space.target_names, trainer.run / "model.safetensors"
        )
        trainer.space.save(trainer.run / "classes.json")
        save_predictions(predictions, trainer.run / "val_predictions.npz")
        write_text(trainer.run / "result.json", json.dumps(result, indent=1) + "\n")
    return result


# --- on screen


def progress_bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.fields[note]:<36}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[rate]:>7,.0f} images/s"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def epoch_line(record: dict[str, Any], epochs: int) -> str:
    groups = "  ".join(f"{name} {shown(record[name])}" for name in ("many", "medium", "few"))
    return (
        f"epoch {record['epoch'] + 1:>3}/{epochs}  loss {shown(record['loss'], 3):>6}  top-1 "
        f"{record['top1']:5.1f}  ({groups})"
        f"  {record['images_per_second']:,.0f} images/s"
    )


def shown(value: float | None, digits: int = 1) -> str:
    return "   -" if value is None else f"{value:4.{digits}f}"
