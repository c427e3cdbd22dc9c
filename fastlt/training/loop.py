"""The training loop: a recipe and a pack in, a RUN folder out. It reads top to bottom.

Everything random in a step is drawn from generators seeded by (seed, step), and the order is the
plan's, so a run that was killed and started again takes the same steps: on a CPU it ends with the
same bits.
"""

import json
import math
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from fastlt.config import OLD_KEYS, Config, DataConfig, TrainConfig, to_toml, with_changes
from fastlt.data.engines.torch import worker_errors
from fastlt.data.plan import Batch, evaluation_batches
from fastlt.data.prefetch import prefetch_to_device, to_device
from fastlt.data.row_weights import mixed_weights
from fastlt.errors import UserError
from fastlt.evaluation.calibration import (
    STEPS,
    fitted,
    losses_by_temperature,
    shares_of,
    write_calibration,
)
from fastlt.evaluation.evaluate import (
    EVALUATION_BATCH,
    evaluation_geometry,
    predict,
    save_predictions,
)
from fastlt.evaluation.metrics import Predictions, concatenate_predictions, confusions, score
from fastlt.losses import LOSSES, Step
from fastlt.models.adapt import FULL, still_modules
from fastlt.models.classifier import Classifier
from fastlt.models.export import export_safetensors
from fastlt.models.heads import HEADS
from fastlt.models.preprocessing import with_preprocessing
from fastlt.packing.concat import concat_packs
from fastlt.packing.reader import Pack, open_pack
from fastlt.training.compile import build_forward
from fastlt.training.distributed import process_group
from fastlt.training.features import CACHE, FeatureLoader
from fastlt.training.inputs import is_compiled, make_input, seed_generators, step_seed
from fastlt.training.loggers import Loggers, check_loggers
from fastlt.training.messages import (
    epoch_line,
    progress_bar,
    report_damaged,
    report_setup,
    report_skipped,
    report_stage,
    shown,
)
from fastlt.training.optim import set_lr
from fastlt.training.run_folder import check_config, disk_errors, finished, only_run, resume, save
from fastlt.training.setup import (
    Trainer,
    TrainState,
    grow,
    next_stage,
    prepare,
    start_stage,
)
from fastlt.utils.files import write_text
from fastlt.utils.run_files import BEST, METRICS, MODEL, RESULT
from fastlt.utils.signals import Stopped, stop_on_signals

UNKNOWN = -1.0  # the norm of a gradient that is still being accumulated
ASK_EVERY = 10  # steps, of several ranks: whether one of them wants a checkpoint, or to stop
OnEpoch = Callable[[dict[str, Any]], None]
READ_LOSS_EVERY = 20  # steps between looks at the loss: each look waits for the device


def train(
    config: Config,
    run: Path,
    console: Console,
    on_epoch: OnEpoch | None = None,
    silencing_asked: bool = True,
) -> dict[str, Any]:
    """Train into the folder `run`, from where an earlier call stopped; return result.json's values.

    on_epoch is called with each line of metrics.jsonl, once the epoch is saved. silencing_asked:
    whether it is an error that the configuration silences and there are no auxiliaries. Raises
    Stopped if SIGTERM or Ctrl-C ended it early, once it is saved.
    """
    check_loggers(config.train.loggers)
    with process_group(HEADS[config.model.head].is_sharded) as ranks:
        if not ranks.is_first:
            console = Console(quiet=True)
        config, notes = with_preprocessing(config)
        pack = open_packs(config.data)
        if not silencing_asked:
            config = without_silencing(config, pack, console)
        with (
            only_run(run, ranks),
            disk_errors(run),
            worker_errors(),
            stop_on_signals(console) as stop,
        ):
            config = check_config(config, run, pack, console)
            with prepare(config, run, pack, ranks, notes) as trainer:
                trainer.stop = stop
                return run_training(trainer, console, on_epoch)


def run_training(
    trainer: Trainer, console: Console, on_epoch: OnEpoch | None = None
) -> dict[str, Any]:
    """Resume, train what is left, and write the result, which is returned."""
    if trainer.ranks.is_first:
        write_text(trainer.run / "config.toml", to_toml(trainer.run_config))
    resume(trainer, console)
    if (result := finished(trainer)) is not None:
        console.print(f"{trainer.run} has finished already")
        return result
    report_setup(trainer, console)
    for loader in (trainer.train_loader, trainer.val_loader):
        if isinstance(loader, FeatureLoader) and trainer.config.data.features == CACHE:
            loader.load(console)  # before the bar of the training, for it has one of its own
    if trainer.state.step == 0:
        start_stage(trainer, console)
    with loggers_of(trainer, console) as loggers:
        result = finish(trainer, fit(trainer, console, on_epoch, loggers))
        loggers.finish(result)
    return result


def loggers_of(trainer: Trainer, console: Console) -> Loggers:
    """Return the loggers of a run, which the first rank has."""
    config, names = trainer.run_config, trainer.run_config.train.loggers
    own = names if trainer.ranks.is_first else ()
    return Loggers(own, trainer.run, config, trainer.state.step, console)


def open_packs(data: DataConfig) -> Pack:
    """Return the pack of the configuration, with those that it mixes in."""
    if not data.pack:
        raise UserError("no pack to train on: name one with --data PACK")
    main = open_pack(data.pack, round(data.cache_gb * 1e9))
    return (
        concat_packs(main, {place: open_pack(place) for place in data.mix}, data.mix)
        if data.mix
        else main
    )


def asks_for_silencing(settings: Iterable[str]) -> bool:
    """Return whether settings, as `section.key=value` or names alone, ask for silencing by name."""
    by_name = ("loss.name", "loss.silence", "loss.mask", *OLD_KEYS)
    return any(setting.partition("=")[0].strip() in by_name for setting in settings)


def without_silencing(config: Config, pack: Pack, console: Console) -> Config:
    """Return a configuration whose loss silences nothing where there are no auxiliaries.

    That is said. Otherwise, the configuration as it is.
    """
    has_auxiliaries = pack.space.num_auxiliaries > 0 and config.data.auxiliary is True
    is_silencing = LOSSES[config.loss.name].silences and config.loss.silence < 1
    if has_auxiliaries or not is_silencing or config.loss.mask == "none":
        return config
    console.print(
        "[yellow]note:[/] there are no auxiliary classes to silence: the loss is "
        f"loss.name=balanced-ce with loss.tau={config.loss.tau:g}, in place of {config.loss.name}",
        highlight=False,
        soft_wrap=True,
    )
    return with_changes(config, {"loss.name": "balanced-ce"})


# --- loop


def fit(
    trainer: Trainer,
    console: Console,
    on_epoch: OnEpoch | None = None,
    loggers: Loggers | None = None,
) -> Predictions | None:
    """Train all epochs that are left; return the predictions of the last, None if none was left."""
    state, predictions = trainer.state, None
    epochs = trainer.epochs
    trainer.run.mkdir(parents=True, exist_ok=True)
    with progress_bar(console) as bar:
        task = bar.add_task("", total=total_steps(trainer), completed=state.step, rate=0.0, note="")

        def show(rate: float, note: str) -> None:
            bar.update(task, completed=state.step, rate=rate, note=note)

        while not trainer.is_done:
            if state.epoch >= trainer.config.train.epochs:
                next_stage(trainer)
                report_stage(trainer, bar.console)
            grow(trainer)
            rate = train_epoch(trainer, show)
            show(rate, progress_note(state))
            report_damaged(trainer, bar.console)
            report_skipped(state, bar.console)
            evaluated = is_evaluated(trainer.config, state.epoch)
            predictions = evaluate(trainer) if evaluated else None
            record = record_epoch(trainer, rate, predictions)
            if loggers is not None:
                loggers.scalars(record, state.step)
            if "top1" in record:
                line = epoch_line(record, epochs)
                bar.console.print(line, highlight=False, soft_wrap=True)
            save(trainer)
            if on_epoch is not None:
                on_epoch(record)
            stop_if_asked(trainer)
    trainer.writer.wait()
    if state.has_ended:
        console.print(
            f"ended after {state.epochs_done} epochs: {trainer.config.train.patience} evaluations "
            "in a row were no better than the best before (train.patience)",
            highlight=False,
            soft_wrap=True,
        )
    return predictions


def total_steps(trainer: Trainer) -> int:
    """Return the steps of all stages; those of stages to come as if their epochs were as long."""
    left = trainer.epochs - trainer.state.epochs_done
    return trainer.state.step - trainer.state.step_in_epoch + left * trainer.plan.steps_per_epoch


def train_epoch(trainer: Trainer, report: Callable[[float, str], None]) -> float:
    """Train one epoch from where the state stands. Returns images/s.

    report is called with images/s so far and a note for the progress bar.
    """
    config, state, plan = trainer.config, trainer.state, trainer.plan
    set_modes(trainer)
    values: list[Tensor] = []
    began = last_saved = time.perf_counter()
    images_before, seconds_before = state.images, state.seconds
    for batch, value in steps(trainer):
        _, is_last = accumulation(
            config.optim.accumulate, state.step_in_epoch - 1, plan.steps_per_epoch
        )
        trainer.guard.begin(state.step - 1, batch.images, is_last)
        values.append(value)
        state.images += len(batch.labels) * trainer.ranks.world
        if state.step % READ_LOSS_EVERY == 0:
            read_steps(values, trainer)
            report(
                (state.images - images_before) / (time.perf_counter() - began),
                progress_note(state),
            )
        is_within = is_last and state.step_in_epoch < plan.steps_per_epoch
        if is_within and asks_for_checkpoint(trainer, last_saved):
            read_steps(values, trainer)
            state.seconds = seconds_before + time.perf_counter() - began
            save(trainer)
            stop_if_asked(trainer)
            last_saved = time.perf_counter()
    read_steps(values, trainer)
    seconds = time.perf_counter() - began
    state.seconds = seconds_before + seconds
    return (state.images - images_before) / max(1e-9, seconds)


def progress_note(state: TrainState) -> str:
    """Return what stands beside the bar."""
    loss = shown(mean_loss(state), 3)
    return f"epoch {state.epochs_done + 1} loss {loss} train {train_top1(state):.1f}"


def steps(
    trainer: Trainer, mark: Callable[[str], None] = lambda part: None
) -> Iterator[tuple[Batch, Tensor]]:
    """Take the steps of an epoch that are left; yield each batch and what `train_step` returned.

    mark is called with the name of each part of a step that is done, `wait` for images included.
    """
    state, forward = trainer.state, forward_of(trainer)
    loaded = trainer.train_loader.iterate(trainer.plan.epoch(state.epoch, state.step_in_epoch))
    for batch, pixels in prefetch_to_device(loaded, trainer.device):
        mark("wait")
        value = train_step(trainer, forward, batch, pixels, mark)
        state.step, state.step_in_epoch = state.step + 1, state.step_in_epoch + 1
        yield batch, value


def asks_for_checkpoint(trainer: Trainer, last_saved: float) -> bool:
    """Amid an epoch.

    Several ranks do not agree on the time, nor on when they heard that they are to stop: they ask
    each other, but not in every step.
    """
    wanted = trainer.stop.requested or is_due(trainer.config.train, trainer.state.step, last_saved)
    if trainer.ranks.world == 1:
        return wanted
    by_steps = is_due(trainer.config.train, trainer.state.step, math.inf)
    if not by_steps and trainer.state.step % ASK_EVERY:
        return False
    trainer.stop.requested = trainer.ranks.any(trainer.stop.requested, trainer.device)
    return trainer.ranks.any(wanted, trainer.device)


def is_due(config: TrainConfig, step: int, last_saved: float) -> bool:
    """Return whether a checkpoint is due by steps or by minutes."""
    by_steps = config.checkpoint_steps > 0 and step % config.checkpoint_steps == 0
    return by_steps or time.perf_counter() - last_saved > 60 * config.checkpoint_minutes


def stop_if_asked(trainer: Trainer) -> None:
    """Raise Stopped where that was asked for, once the checkpoint before is on the disk."""
    state = trainer.state
    trainer.stop.requested = trainer.ranks.any(trainer.stop.requested, trainer.device)
    if trainer.stop.requested and state.epoch < trainer.config.train.epochs:
        trainer.writer.wait()
        raise Stopped(
            f"stopped at epoch {state.epochs_done + 1}, step {state.step_in_epoch}: the same "
            "command goes on from there"
        )


def set_modes(trainer: Trainer) -> None:
    """Put the parts that are trained into training mode, the others into evaluation mode.

    In the head-only epochs the backbone stands still, its batch-norm statistics too, unless they
    are to follow.
    """
    schedule, trained = trainer.config.schedule, trainer.stages[trainer.state.stage].trained
    is_frozen = trainer.state.epoch < schedule.head_only_epochs
    trainer.method.train()
    adapt = trainer.config.model.adapt
    if adapt != FULL:
        parameters = trainer.method.named_parameters()
        own = {id(parameter) for name, parameter in parameters if name in trainer.trainable}
        for module in still_modules(trainer.model.backbone, own, adapt):
            module.eval()
    if schedule.head_only_epochs:
        for name, parameter in trainer.model.backbone.named_parameters(prefix="model.backbone"):
            parameter.requires_grad_(name in trainer.trainable and not is_frozen)
        if is_frozen:
            trainer.model.backbone.train(schedule.shift_bn)
    if len(trainer.stages) == 1 and trained == ("",):
        return
    for name, module in trainer.method.named_modules():
        is_within = not name or any(f"{name}.".startswith(prefix) for prefix in trained)
        is_around = any(prefix.startswith(f"{name}.") for prefix in trained)
        if not is_within and not is_around:
            module.training = False
    for name, parameter in trainer.method.named_parameters():
        is_still = is_frozen and name.startswith("model.backbone.")
        is_trained = name in trainer.trainable and name.startswith(trained)
        parameter.requires_grad_(is_trained and not is_still)


def train_step(
    trainer: Trainer,
    forward: Callable[..., Step],
    batch: Batch,
    pixels: Tensor,
    mark: Callable[[str], None] = lambda part: None,
) -> Tensor:
    """Train on one batch; return its `Step` and the norm of the gradient as one tensor (4,).

    It is still on the device. mark is called with the name of each part that is done.
    """
    config, state, device = trainer.config, trainer.state, trainer.device
    generator = torch.Generator().manual_seed(
        step_seed(config.train.seed, state.step, 0, trainer.ranks.rank)
    )
    # dropout and the like
    seed_generators(step_seed(config.train.seed, state.step, 1, trainer.ranks.rank), device)
    factor = trainer.factor(state.epoch + state.step_in_epoch / trainer.plan.steps_per_epoch)
    set_lr(trainer.updater.optimizer, factor)
    labels = torch.from_numpy(batch.labels)
    inputs = make_input(config, pixels, labels, generator, device, trainer.dtype)
    trainer.method.row_weight = rows_weight(trainer, batch, inputs[3])
    mark("input")
    group, is_last = accumulation(
        config.optim.accumulate, state.step_in_epoch, trainer.plan.steps_per_epoch
    )
    with nullcontext() if is_last else unsynchronised(forward):
        with torch.autocast(device.type, trainer.dtype, enabled=trainer.dtype != torch.float32):
            loss, correct, counted = forward(*inputs)
        mark("forward")
        (loss * trainer.updater.scale / group).backward()
    mark("backward")
    norm = trainer.updater.step() if is_last else torch.full_like(loss, UNKNOWN)
    if is_last and trainer.ema is not None:
        trainer.ema.update(trainer.method, state.step // config.optim.accumulate)
    mark("optimiser")
    return torch.stack([loss.detach(), correct, counted, norm])


def rows_weight(trainer: Trainer, batch: Batch, mix: Tensor | None) -> Tensor | None:
    """Return what the rows of a batch count, (n,) on the device; None where there are no weights.

    mix: of the images with those of the mirrored places.
    """
    if trainer.row_weights is None:
        return None
    state = trainer.state
    weights = trainer.row_weights.of_rows(
        batch.images,
        trainer.plan,
        state.epoch,
        state.step_in_epoch,
        trainer.config.optim.accumulate,
    )
    return mixed_weights(to_device(weights, trainer.device), mix)


def unsynchronised(forward: Callable[..., Step]) -> AbstractContextManager[Any]:
    """Return a context in which ranks keep their gradients to themselves, to add more to them."""
    return getattr(forward, "no_sync", nullcontext)()


def accumulation(accumulate: int, step: int, steps: int) -> tuple[int, bool]:
    """Return how many batches the group of this step has, and whether the step ends it.

    The last group of an epoch may have fewer.
    """
    start = step // accumulate * accumulate
    group = min(accumulate, steps - start)
    return group, step + 1 == start + group


def forward_of(trainer: Trainer) -> Callable[..., Step]:
    """Return `forward(images, target, target_b, mix)`, the method as it trains in this epoch.

    It gives loss and hits; model and loss are one graph where that is compiled.
    """
    config, epoch = trainer.config, trainer.state.epoch
    phase = trainer.method.begin(epoch), epoch < config.schedule.head_only_epochs
    trainer.guard.keep()  # what the method has set stays, should the first steps not be finite
    if trainer.forward is None or trainer.forward[0] != phase:
        trainer.forward = None  # first: what it has hung on the parameters goes with it
        mode = config.train.compile_mode if is_compiled(config, trainer.device) else None
        batch = trainer.plan.batch * config.data.views // trainer.ranks.world
        trainer.forward = phase, build_forward(trainer.method, trainer.ranks, mode, batch)
    return trainer.forward[1]


def read_steps(steps: list[Tensor], trainer: Trainer) -> None:
    """Add the steps since the last look to the epoch's sums; waits for the device.

    UserError where training has diverged.
    """
    if not steps:
        return
    state, world = trainer.state, trainer.ranks.world
    # hits add up over ranks, losses and norms are averaged
    means = torch.tensor([1 / world, 1.0, 1.0, 1 / world])
    rows = (trainer.ranks.total(torch.stack(steps)).cpu() * means).tolist()
    steps.clear()
    for loss, correct, counted, _ in rows:
        if math.isfinite(loss):
            state.loss_sum, state.summed = state.loss_sum + loss, state.summed + 1
            state.correct, state.counted = state.correct + correct, state.counted + counted
    is_finite = [math.isfinite(norm) for *_, norm in rows if not norm < 0]
    skipped, state.skipped_in_row = trainer.guard.look(
        is_finite,
        state.skipped_in_row,
        f"epoch {state.epochs_done + 1}, step {state.step_in_epoch}",
    )
    state.skipped += skipped


def mean_loss(state: TrainState) -> float | None:
    """Return the mean loss of this epoch so far; None where no step was finite."""
    return state.loss_sum / state.summed if state.summed else None


def train_top1(state: TrainState) -> float:
    """Return the percentage of this epoch's target images that the model got right.

    It is the model as it was at each step, and among the targets.
    """
    return 100 * state.correct / max(1e-9, state.counted)


# --- after an epoch


def is_evaluated(config: Config, epoch: int) -> bool:
    """Return whether the model is evaluated after an epoch."""
    return (epoch + 1) % config.train.eval_every == 0 or epoch + 1 == config.train.epochs


def record_epoch(trainer: Trainer, rate: float, predictions: Predictions | None) -> dict[str, Any]:
    """Score the predictions, write the line of metrics.jsonl, and move on to the next epoch."""
    state = trainer.state
    record: dict[str, Any] = {
        "epoch": state.epochs_done,
        "step": state.step,
        "loss": mean_loss(state),
        "train_top1": train_top1(state),
        "lr": trainer.updater.optimizer.param_groups[-1]["lr"],
        "images_per_second": rate,
        "seconds": state.seconds,
        "skipped_steps": state.skipped,
        "damaged_images": len(state.damaged),
    }
    record |= trainer.method.metrics()
    if predictions is not None:
        figures = score(predictions, trainer.space, trainer.config.data.grouping)
        record |= {name: figures[name] for name in METRICS}
        note_best(trainer, figures)
    if trainer.ranks.is_first:
        with (trainer.run / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    state.epoch, state.step_in_epoch, state.skipped_before = state.epoch + 1, 0, state.skipped
    state.loss_sum, state.summed, state.correct, state.counted = 0.0, 0, 0.0, 0.0
    return record


def note_best(trainer: Trainer, figures: dict[str, Any]) -> None:
    """Note whether an evaluation is the best so far, and end the training if none was for long."""
    state, config = trainer.state, trainer.config.train
    kept = dict.fromkeys((*METRICS, config.monitor))
    is_better = figures[config.monitor] > state.best.get(config.monitor, -1.0)
    if is_better:
        state.best = {"epoch": state.epoch + 1, **{name: figures[name] for name in kept}}
    state.no_better = 0 if is_better else state.no_better + 1
    is_last_stage = state.stage == len(trainer.stages) - 1
    state.has_ended = is_last_stage and 0 < config.patience <= state.no_better
    if is_better and config.keep_best:
        export(trainer, BEST)


def export(trainer: Trainer, name: str) -> None:
    """Write the model as it is to a file of the RUN; all ranks call it together."""
    model = evaluated_model(trainer)
    if trainer.ranks.is_first:
        names, prior = trainer.space.target_names, prior_of(trainer)
        scale = trainer.pack.scale
        export_safetensors(model, trainer.config, names, trainer.run / name, prior, scale)


def evaluated_model(trainer: Trainer) -> Classifier:
    """Return what is evaluated and exported; all ranks call it together."""
    method = trainer.method if trainer.ema is None else trainer.ema.average
    model = method.predictor()
    return model.predicting(trainer.space.num_targets) if model.head.is_sharded else model


def evaluate(trainer: Trainer) -> Predictions:
    """Return the predictions on val; each rank evaluates its part, and all get all."""
    ranks, data, val = trainer.ranks, trainer.config.data, trainer.pack.val
    batches = evaluation_batches(
        val, evaluation_geometry(data), EVALUATION_BATCH, ranks.rank, ranks.world
    )
    if ranks.world == 1:
        batches = until_asked_to_stop(trainer, batches)
    model, losses = evaluated_model(trainer), torch.zeros(STEPS, dtype=torch.float64)
    found = predict(
        model,
        trainer.val_loader,
        batches,
        data,
        trainer.space,
        trainer.device,
        trainer.dtype,
        on_logits=lambda *batch: losses.add_(losses_by_temperature(*batch)),
    )
    parts = ranks.all((found, losses))
    trainer.val_losses = torch.stack([part for _, part in parts]).sum(dim=0)
    return concatenate_predictions([part for part, _ in parts])


def until_asked_to_stop(trainer: Trainer, batches: Iterator[Batch]) -> Iterator[Batch]:
    """A run that goes on evaluates once more."""
    for batch in batches:
        if trainer.stop.requested:
            save(trainer)
            stop_if_asked(trainer)
        yield batch


def prior_of(trainer: Trainer) -> list[float]:
    """Return the shares of the targets that the model answers to, (T,), by its last stage."""
    counts, loss = trainer.plan.class_counts[: trainer.space.num_targets], trainer.config.loss
    return shares_of(counts, LOSSES[loss.name].prior_left(loss))


def finish(trainer: Trainer, predictions: Predictions | None) -> dict[str, Any]:
    """The last epoch's model and figures, the best epoch named beside."""
    predictions = predictions or evaluate(trainer)
    export(trainer, MODEL)
    result = score(predictions, trainer.space, trainer.config.data.grouping)
    parameters, trained = trainer.parameters
    result |= {
        "best": trainer.state.best,
        "epochs": trainer.state.epoch if trainer.state.has_ended else trainer.config.train.epochs,
        "confusion": confusions(predictions),
        "seconds": trainer.state.seconds,
        "images": trainer.state.images,
        "images_per_second": trainer.state.images / max(1e-9, trainer.state.seconds),
        "damaged_images": len(trainer.state.damaged),
        "skipped_steps": trainer.state.skipped,
        "peak_memory": peak_memory(trainer.device),
        "parameters": parameters,
        "trained_parameters": trained,
    }
    if trainer.ranks.is_first:
        assert trainer.val_losses is not None  # of the evaluation above
        write_calibration(trainer.run, fitted([trainer.val_losses], len(predictions.label)))
        trainer.space.save(trainer.run / "classes.json")
        save_predictions(predictions, trainer.run / "val_predictions.npz")
        write_text(trainer.run / RESULT, json.dumps(result, indent=1) + "\n")
    return result


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that this process has held so far: of a GPU's memory, or of its own."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
