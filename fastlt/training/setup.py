"""From a configuration and a pack to all that a run needs."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from fastlt.classes import ClassSpace
from fastlt.config import Config, DataConfig, with_changes
from fastlt.data.geometry import Geometry, geometry_of
from fastlt.data.loader import Loader
from fastlt.data.plan import Plan, Sampling, spread_budget
from fastlt.data.row_weights import RowWeights, row_weights
from fastlt.errors import UserError
from fastlt.losses import Step, Task
from fastlt.methods import method_type
from fastlt.methods.method import Base, Stage, StageData
from fastlt.models.classifier import Classifier, build_model
from fastlt.models.device import choose_device, on_device
from fastlt.models.export import find_metadata
from fastlt.models.heads import HEADS
from fastlt.models.start import MEANS, is_file, start_from_means
from fastlt.models.weight_files import weights_file
from fastlt.packing.reader import Pack
from fastlt.packing.subset import subset
from fastlt.training.checkpoint import Writer
from fastlt.training.distributed import ALONE, Ranks
from fastlt.training.features import CACHE, FeatureLoader, features_of, views_of
from fastlt.training.loaders import train_loader, val_loader
from fastlt.training.nonfinite import Guard
from fastlt.training.optim import Averaged, build_optimizer, copy_tensors, lr_factor
from fastlt.training.step import MaxNorm, Updater
from fastlt.training.still import NOTHING_STILL, Still, still_part
from fastlt.utils.signals import StopRequest


@dataclass
class TrainState:
    """The part of a checkpoint that is not tensors."""

    epoch: int = 0  # of the stage
    step_in_epoch: int = 0
    step: int = 0  # of all stages
    loss_sum: float = 0.0  # of this epoch so far
    summed: int = 0  # steps in it: those whose loss was finite
    # target images of this epoch so far that the model got right while it trained
    correct: float = 0.0
    counted: float = 0.0
    seconds: float = 0.0  # of training, over all starts
    images: int = 0
    skipped: int = 0  # optimiser steps, of all epochs, whose gradient was not finite
    skipped_before: int = 0  # of them, before this epoch
    skipped_in_row: int = 0
    best: dict[str, Any] = field(default_factory=dict)
    # training images that could not be decoded, and were replaced
    damaged: list[int] = field(default_factory=list)
    no_better: int = 0  # evaluations since the best one
    has_ended: bool = False  # early, for want of a better one
    stage: int = 0
    epochs_before: int = 0  # of earlier stages

    @property
    def epochs_done(self) -> int:
        """The epochs of all stages that are done."""
        return self.epochs_before + self.epoch


@dataclass
class Trainer:
    """The parts of a run, made by `prepare`; a context manager that closes what it holds.

    `config`, `plan`, `train_loader`, `updater`, `guard` and `factor` are of the current stage.
    """

    config: Config
    run_config: Config
    run: Path
    pack: Pack
    space: ClassSpace
    ranks: Ranks
    device: torch.device
    dtype: torch.dtype
    method: Base
    stages: list[Stage]
    val_loader: Loader | FeatureLoader
    ema: Averaged | None
    writer: Writer
    stop: StopRequest
    state: TrainState
    plan: Plan
    train_loader: Loader | FeatureLoader
    updater: Updater
    guard: Guard
    factor: Callable[[float], float]  # from epochs of the stage to the factor on the base rate
    # phase and compiled function: compiled once, not once an epoch
    forward: tuple[Hashable, Callable[..., Step]] | None = None
    row_weights: RowWeights | None = None
    # names of the parameters that are trained at all, in whichever stage
    trainable: frozenset[str] = frozenset()
    still: Still = NOTHING_STILL  # what checkpoints leave out
    val_losses: Tensor | None = None  # of the last evaluation, by temperature
    notes: list[str] = field(default_factory=list)  # how weights and images were made to fit

    @property
    def model(self) -> Classifier:
        """The model that is trained."""
        return self.method.model

    @property
    def parameters(self) -> tuple[int, int]:
        """The number of the model's parameters, and of those of them that are trained."""
        own = {n: p.numel() for n, p in self.method.named_parameters() if n.startswith("model.")}
        return sum(own.values()), sum(size for n, size in own.items() if n in self.trainable)

    @property
    def epochs(self) -> int:
        """The epochs of all stages."""
        return sum(stage_config(self.run_config, stage).train.epochs for stage in self.stages)

    @property
    def is_done(self) -> bool:
        """Return whether all epochs of the last stage are done."""
        last = self.state.stage == len(self.stages) - 1
        ended = self.state.has_ended or self.state.epoch >= self.config.train.epochs
        return last and ended

    @property
    def has_all_steps(self) -> bool:
        """Return whether all steps are done, though the last evaluation may not be."""
        state, plan = self.state, self.plan
        last = state.stage == len(self.stages) - 1
        done = state.epoch * plan.steps_per_epoch + state.step_in_epoch
        whole = self.config.train.epochs * plan.steps_per_epoch
        return last and (state.has_ended or done >= whole)

    def __enter__(self) -> "Trainer":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End worker processes and threads, and let go of the process group."""
        self.forward = None  # DDP holds on to the group
        self.train_loader.close()
        self.val_loader.close()
        self.writer.close()


class StageParts(NamedTuple):
    """The parts of a Trainer that are made anew for each stage."""

    config: Config
    plan: Plan
    train_loader: Loader | FeatureLoader
    updater: Updater
    guard: Guard
    factor: Callable[[float], float]


def prepare(
    config: Config, run: Path, pack: Pack, ranks: Ranks = ALONE, notes: Sequence[str] = ()
) -> Trainer:
    """Return the Trainer of a run, at the start of its first stage. notes: printed with others."""
    said = list(notes)
    device, dtype = choose_device(config, ranks.local)
    pack, space = subset(pack, config.data, config.train.seed)
    counts = build_plan(config, pack, space).class_counts[: space.num_classes]
    method = build_method(config, space, torch.from_numpy(counts), ranks, device, said)
    ema = Averaged(method, config.optim.ema) if config.optim.ema else None
    trainable = frozenset(
        name for name, parameter in method.named_parameters() if parameter.requires_grad
    )
    own = {name.removeprefix("model.") for name in trainable if name.startswith("model.")}
    stages = method.stages()
    parts = stage_parts(
        config, stages, 0, run, pack, space, ranks, device, dtype, method, ema, trainable
    )
    return Trainer(
        **parts._asdict(),
        run_config=config,
        run=run,
        pack=pack,
        space=space,
        ranks=ranks,
        device=device,
        dtype=dtype,
        method=method,
        stages=stages,
        val_loader=(
            FeatureLoader(
                partial(features_of, method.model, pack, config, device, run, split="val")
            )
            if config.data.features == CACHE
            else val_loader(config.data, pack, device)
        ),
        ema=ema,
        writer=Writer(),
        stop=StopRequest(),
        state=TrainState(),
        row_weights=row_weights(config.data, pack, parts.plan),
        trainable=trainable,
        still=still_part(config, method.model, own),
        notes=said,
    )


def build_method(
    config: Config,
    space: ClassSpace,
    counts: Tensor,
    ranks: Ranks,
    device: torch.device,
    notes: list[str] | None = None,
) -> Base:
    """Return the configured method with its model, on the device.

    counts (C,): images per epoch. notes: see `build_model`.
    """
    check_head_weights(config, space)
    kind = method_type(config.method.name)
    if HEADS[config.model.head].is_sharded and not kind.takes_sharded_heads:
        raise UserError(
            f"method.name={config.method.name} does not go with model.head={config.model.head}: "
            "set model.head=linear"
        )
    if (config.data.class_weights or config.data.sample_weights) and not kind.takes_row_weights:
        raise UserError(
            f"method.name={config.method.name} has weights of its own, and does not go with "
            "data.class_weights or data.sample_weights: leave these out"
        )
    if config.data.features == CACHE and kind.forward is not Base.forward:
        raise UserError(
            f"method.name={config.method.name} trains on images, and does not go with "
            "data.features=cache: leave it out"
        )
    torch.manual_seed(config.train.seed)
    model = kind.build(
        config.method,
        build_model(config.model, space.num_classes, config.data.size, space, notes),
    )
    model = on_device(model, config, device)
    if config.model.sync_bn:
        model = synchronised(model, ranks, device)
    check_sizes(model, config, device)
    task = Task(space, counts, config.loss, config.train.epochs, device)
    return kind(config.method, model, task).to(device)


def stage_config(config: Config, stage: Stage) -> Config:
    """Return the configuration of a run with the settings of a stage."""
    return with_changes(config, stage.settings) if stage.settings else config


def stage_parts(
    config: Config,
    stages: list[Stage],
    number: int,
    run: Path,
    pack: Pack,
    space: ClassSpace,
    ranks: Ranks,
    device: torch.device,
    dtype: torch.dtype,
    method: Base,
    ema: Averaged | None,
    trainable: frozenset[str],
) -> StageParts:
    """Return the parts of a stage. Raises UserError where an epoch is less than a batch."""
    stage = stages[number]
    config = stage_config(config, stage)
    kept = [method, *([ema.average] if ema else [])]
    plan = build_plan(config, pack, space, size_at(config.data, 0), ranks)
    if plan.steps_per_epoch == 0:
        raise UserError(
            f"an epoch has {plan.images_per_epoch} images, less than one batch of "
            f"{config.data.batch}: set data.batch lower"
        )
    counts = torch.from_numpy(plan.class_counts[: space.num_classes])
    task = Task(space, counts, config.loss, config.train.epochs, device)
    for entering in kept:
        entering.enter_stage(number, task)
    head = method.model.head
    optimizer = build_optimizer(config.optim, method, config.data.batch, stage.trained, trainable)
    updater = Updater(
        optimizer,
        config.optim.clip,
        dtype == torch.float16,
        list(head.parameters()) if head.is_sharded else [],
        MaxNorm(head.weight, config.optim.max_norm) if config.optim.max_norm < 1 else None,
    )
    listed = run / ("nonfinite.txt" if ranks.is_first else f"nonfinite-rank{ranks.rank}.txt")
    guard = Guard(kept, config.train.max_skipped, listed, pack.train)
    loader: Loader | FeatureLoader
    if stage.features:
        loader = FeatureLoader(partial(features_of, method.model, pack, config, device, run))
    elif config.data.features == CACHE:
        loader = FeatureLoader(partial(views_of, method.model, pack, config, device, dtype, run))
    else:
        loader = train_loader(config.data, pack, device, plan.geometry.size)
    factor = lr_factor(config.schedule, config.train.epochs)
    return StageParts(config, plan, loader, updater, guard, factor)


def enter_stage(trainer: Trainer, number: int) -> None:
    """Make the parts of another stage; the model, its average and the state's counts stay."""
    trainer.train_loader.close()
    trainer.forward = None
    parts = stage_parts(
        trainer.run_config,
        trainer.stages,
        number,
        trainer.run,
        trainer.pack,
        trainer.space,
        trainer.ranks,
        trainer.device,
        trainer.dtype,
        trainer.method,
        trainer.ema,
        trainer.trainable,
    )
    for name, part in parts._asdict().items():
        setattr(trainer, name, part)


def next_stage(trainer: Trainer) -> None:
    """Go from the end of a stage to the start of the next."""
    state = trainer.state
    if trainer.ema is not None:
        copy_tensors(trainer.ema.average, trainer.method)
    enter_stage(trainer, state.stage + 1)
    start_stage(trainer)
    state.epochs_before += state.epoch
    state.stage, state.epoch, state.step_in_epoch = state.stage + 1, 0, 0


def start_stage(trainer: Trainer, console: Console | None = None) -> None:
    """Let the method prepare for the stage that begins.

    console: where the progress of features is shown; None: nowhere.
    """
    labels = torch.from_numpy(trainer.plan.labels_of(np.arange(len(trainer.pack.train))))
    used = labels < trainer.space.num_classes  # the others are of auxiliaries that are left out

    def features() -> Tensor:
        found = features_of(
            trainer.model, trainer.pack, trainer.config, trainer.device, trainer.run, console
        )
        return found[used]

    if trainer.state.step == 0 and trainer.config.model.head_weights == MEANS:
        start_from_means(trainer.model.head, features(), labels[used])
    trainer.method.start_stage(StageData(labels[used], features))
    if trainer.ema is not None:
        copy_tensors(trainer.method, trainer.ema.average)


def check_head_weights(config: Config, space: ClassSpace) -> None:
    """Raise UserError where the head would start from rows of other classes or another kind."""
    if not is_file(config.model.head_weights):
        return
    path = weights_file(config.model.head_weights)
    described = find_metadata(path)
    if described is None:
        return
    if described["classes"] != space.target_names:
        raise UserError(
            f"{path} was trained for other targets than those of {config.data.pack}: begin with a "
            "run of the same ones"
        )
    if (described["model"]["head"] == "cosine") != (config.model.head == "cosine"):
        raise UserError(
            f"{path} has a {described['model']['head']} head, which is no start for "
            f"model.head={config.model.head}"
        )


def check_sizes(model: Classifier, config: Config, device: torch.device) -> None:
    """Raise UserError where a model does not take small images, before images begin to grow."""
    if not config.data.start_size:
        return
    side = config.data.start_size
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, side, side, device=device))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{config.model.name} does not take images of {side} pixels ({reason}): set "
            "data.start_size=0"
        ) from error


def grow(trainer: Trainer) -> None:
    """Replace plan and loader where images of this epoch are of another size."""
    size = size_at(trainer.config.data, trainer.state.epoch)
    if trainer.stages[trainer.state.stage].features:
        return
    if size != trainer.plan.geometry.size:
        trainer.train_loader.close()
        trainer.plan = build_plan(trainer.config, trainer.pack, trainer.space, size, trainer.ranks)
        trainer.train_loader = train_loader(trainer.config.data, trainer.pack, trainer.device, size)


def synchronised(model: Classifier, ranks: Ranks, device: torch.device) -> Classifier:
    """Return the model with batch norm over the images of all ranks."""
    if ranks.world > 1 and device.type != "cuda":
        raise UserError("model.sync_bn needs GPUs: set it to false")
    return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)


def build_plan(
    config: Config, pack: Pack, space: ClassSpace, size: int | None = None, ranks: Ranks = ALONE
) -> Plan:
    """The training order, for images of `size` pixels a side: by default those of the last epoch.
    space: of what is trained, the first of the pack's classes.
    """
    data, drawn = config.data, pack.drawn or space
    unused = pack.space.num_auxiliaries - drawn.num_auxiliaries
    geometry = geometry_of(data, size)
    if data.features == CACHE:
        geometry = Geometry("view", data.size, views=data.feature_views)
    sampling = Sampling(
        data.target_sampling,
        (*budgets_of(data, drawn), *[0] * unused),
        data.repeats,
        data.views,
        tuple(drawn.anchors().items()) if pack.drawn else (),
    )
    return Plan(
        pack.train,
        pack.space.num_targets,
        pack.space.num_classes,
        geometry,
        sampling,
        data.batch,
        config.train.seed,
        data.drop_last,
        ranks.rank,
        ranks.world,
        window_of(data, pack),
    )


def window_of(data: DataConfig, pack: Pack) -> int:
    """Return the bytes of shards that an epoch goes through together; 0: all.

    It is half of the cache, where that cannot hold all shards: the other half is for the next.
    """
    remote = pack.train.remote
    if remote is None or sum(entry["size"] for entry in remote.files.values()) <= remote.limit:
        return 0
    return max(1, remote.limit // 2)


def budgets_of(data: DataConfig, space: ClassSpace) -> tuple[int, ...]:
    """Return the images of each auxiliary class in an epoch."""
    stored = np.array(space.train_counts)
    if data.auxiliary_ratio:
        return spread_budget(
            round(data.auxiliary_ratio * stored[: space.num_targets].sum()),
            stored[space.num_targets :],
        )
    if unknown := [name for name in data.budgets if name not in space.auxiliary_names]:
        raise UserError(
            f"data.budgets names '{unknown[0]}', but the pack has no such auxiliary class"
        )
    by_anchor = budgets_by_anchor(data, space) if data.budget_by == "anchor" else {}
    return tuple(
        data.budgets.get(name, by_anchor.get(number, data.budget))
        for number, name in enumerate(space.auxiliary_names, space.num_targets)
    )


def budgets_by_anchor(data: DataConfig, space: ClassSpace) -> dict[int, int]:
    """Return the budget of each auxiliary whose rarest target is medium: as many as that has.

    It is the release's rule (arXiv 2410.15980); all others have `data.budget`.
    """
    medium = data.grouping.anchored(space.train_counts[: space.num_targets])
    anchors = space.anchors().items()
    return {
        auxiliary: space.train_counts[target] for auxiliary, target in anchors if target in medium
    }


def size_at(data: DataConfig, epoch: int) -> int:
    """Return the pixels a side in an epoch, growing from start_size to size over the ramp.

    The steps are of 32, or of 4 where images are smaller than 96.
    """
    if not data.start_size:
        return data.size
    first, last = data.ramp
    share = min(1.0, max(0.0, (epoch - first) / (last - first)))
    step = 32 if data.start_size >= 96 else 4
    size = data.start_size + share * (data.size - data.start_size)
    return (
        data.size if share == 1 else min(data.size, max(data.start_size, round(size / step) * step))
    )
