"""From a configuration and a pack to all that a run needs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console

from fastlt.classes import ClassSpace
from fastlt.config import Config, DataConfig
from fastlt.data.geometry import Geometry
from fastlt.data.loader import Loader
from fastlt.data.plan import Plan, Sampling, spread_budget
from fastlt.errors import UserError
from fastlt.losses import Step, silencing_graph
from fastlt.models.classifier import Classifier, build_model, weights_file
from fastlt.models.export import find_metadata
from fastlt.packing.reader import Pack
from fastlt.packing.subset import subset
from fastlt.training.checkpoint import Writer
from fastlt.training.distributed import ALONE, Ranks
from fastlt.training.nonfinite import Guard
from fastlt.training.optim import Averaged, averaged, build_optimizer, lr_factor
from fastlt.training.step import MaxNorm, Updater
from fastlt.utils.pool import cores
from fastlt.utils.signals import StopRequest
from fastlt_kernels import ClassParallelLinear

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass
class Progressed:
    """What a checkpoint must know besides tensors."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
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


class Phase(NamedTuple):
    """Of epochs that train the same parameters by the same loss."""

    drw: bool
    frozen: bool  # the backbone


@dataclass
class Trainer:
    """All that a run needs, made once by `prepare`."""

    config: Config
    run: Path
    pack: Pack
    space: ClassSpace
    ranks: Ranks
    plan: Plan
    device: torch.device
    dtype: torch.dtype
    train_loader: Loader
    val_loader: Loader
    model: Classifier
    ema: Averaged | None
    updater: Updater
    guard: Guard
    factor: Callable[[float], float]
    at: Progressed
    writer: Writer
    stop: StopRequest
    forward: tuple[Phase, Callable[..., Step]] | None = None  # compiled once, not once an epoch


def prepare(config: Config, run: Path, pack: Pack, ranks: Ranks = ALONE) -> Trainer:
    device, dtype = choose_device(config, ranks.local)
    pack, space = subset(pack, config.data, config.train.seed)
    data = config.data
    plan = build_plan(config, pack, space, size_at(data, 0), ranks)
    if plan.steps_per_epoch == 0:
        raise UserError(
            f"an epoch has {plan.images_per_epoch} images, less than one batch of "
            f"{config.data.batch}: set data.batch lower"
        )
    check_head_weights(config, space)
    torch.manual_seed(config.train.seed)
    model = on_device(build_model(config.model, space.num_classes, data.size), config, device)
    if config.model.sync_bn:
        model = synchronised(model, ranks, device)
    check_sizes(model, config, device)
    ema = averaged(config.optim, model)
    sharded = list(model.head.parameters()) if isinstance(model.head, ClassParallelLinear) else []
    max_norm = (
        MaxNorm(model.head.weight, config.optim.max_norm) if config.optim.max_norm < 1 else None
    )
    optimizer = build_optimizer(config.optim, model, data.batch)
    updater = Updater(optimizer, config.optim.clip, dtype == torch.float16, sharded, max_norm)
    listed = run / ("nonfinite.txt" if ranks.is_first else f"nonfinite-rank{ranks.rank}.txt")
    guard = Guard(
        [model, *([ema.model] if ema else [])], config.train.max_skipped, listed, pack.train
    )
    return Trainer(
        config,
        run,
        pack,
        space,
        ranks,
        plan,
        device,
        dtype,
        train_loader(data, pack, device, plan.geometry.size),
        val_loader(data, pack, device),
        model,
        ema,
        updater,
        guard,
        lr_factor(config.schedule, config.train.epochs),
        Progressed(),
        Writer(),
        StopRequest(),
    )


def check_head_weights(config: Config, space: ClassSpace) -> None:
    """Rows of a model of ours go to the same classes, and to a head of the same kind."""
    if not config.model.head_weights:
        return
    path = weights_file(config.model.head_weights)
    told = find_metadata(path)
    if told is None:
        return
    if told["classes"] != space.target_names:
        raise UserError(
            f"{path} was trained for other targets than those of {config.data.pack}: begin with a "
            "run of the same ones"
        )
    if (told["model"]["head"] == "cosine") != (config.model.head == "cosine"):
        raise UserError(
            f"{path} has a {told['model']['head']} head, which is no start for "
            f"model.head={config.model.head}"
        )


def check_sizes(model: Classifier, config: Config, device: torch.device) -> None:
    """Some models take images of one size alone: told now, not when images begin to grow."""
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
    """Plan and loader for images of this epoch's size."""
    size = size_at(trainer.config.data, trainer.at.epoch)
    if size != trainer.plan.geometry.size:
        trainer.train_loader.close()
        trainer.plan = build_plan(trainer.config, trainer.pack, trainer.space, size, trainer.ranks)
        trainer.train_loader = train_loader(trainer.config.data, trainer.pack, trainer.device, size)


def train_loader(data: DataConfig, pack: Pack, device: torch.device, size: int) -> Loader:
    return Loader(
        pack.train,
        size,
        data.engine,
        data.workers,
        pack.betons("train"),
        decode=data.decode,
        strict=data.strict,
        device=device,
        prefetch=data.prefetch,
        hw_decoder_load=data.hw_decoder_load,
        shared=shared_by(data),
    )


def val_loader(data: DataConfig, pack: Pack, device: torch.device) -> Loader:
    """Decodes exactly, so that a figure does not depend on the machine; but for the dali engine,
    which cannot.
    """
    decode = "region" if data.engine == "dali" else "exact"
    return Loader(
        pack.val,
        data.size,
        data.engine,
        data.workers,
        pack.betons("val"),
        decode=decode,
        device=device,
        shared=shared_by(data),
    )


def shared_by(data: DataConfig) -> Path | None:
    return Path(data.shared) if data.shared else None


def choose_device(config: Config, local: int = 0) -> tuple[torch.device, torch.dtype]:
    """local: of several processes on this machine, each of which takes a GPU of its own."""
    device = find_device(config.train.device)
    if device.type == "cuda" and device.index is None:
        device = find_device(f"cuda:{local}")
        torch.cuda.set_device(device)
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high" if config.train.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = config.train.tf32
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    return device, PRECISIONS[
        config.train.precision if config.train.precision != "auto" else best_precision(device)
    ]


def best_precision(device: torch.device) -> str:
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def find_device(name: str) -> torch.device:
    try:
        device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
        )
        torch.zeros((), device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"train.device={name}, but torch finds no such device here: set train.device=auto"
        ) from error
    return device


def synchronised(model: Classifier, ranks: Ranks, device: torch.device) -> Classifier:
    if ranks.world > 1 and device.type != "cuda":
        raise UserError("model.sync_bn needs GPUs: set it to false")
    return torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)


def on_device(model: Classifier, config: Config, device: torch.device) -> Classifier:
    """The model on the device, in the memory format of the configuration."""
    model = model.to(device)
    return model.to(memory_format=torch.channels_last) if config.train.channels_last else model  # type: ignore[call-overload]


def build_plan(
    config: Config, pack: Pack, space: ClassSpace, size: int | None = None, ranks: Ranks = ALONE
) -> Plan:
    """The training order, for images of `size` pixels a side: by default those of the last epoch.
    space: of what is trained, the first of the pack's classes.
    """
    data, unused = config.data, pack.space.num_auxiliaries - space.num_auxiliaries
    geometry = Geometry(
        data.crop,
        size or data.size,
        data.flip,
        data.scale,
        data.ratio,
        data.padding,
        data.eval_resize,
    )
    sampling = Sampling(
        data.target_sampling, (*budgets_of(data, space), *[0] * unused), data.repeats
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
    """Half of the cache, where it cannot hold all shards: the other half is for those that come
    next.
    """
    remote = pack.train.remote
    if remote is None or sum(entry["size"] for entry in remote.files.values()) <= remote.limit:
        return 0
    return max(1, remote.limit // 2)


def budgets_of(data: DataConfig, space: ClassSpace) -> tuple[int, ...]:
    """Images of each auxiliary class in an epoch."""
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
    return tuple(data.budgets.get(name, data.budget) for name in space.auxiliary_names)


def size_at(data: DataConfig, epoch: int) -> int:
    """Pixels a side: growing from start_size to size over the ramp, in steps of 32 (of 4 where
    images are smaller than 96).
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


def introduce(trainer: Trainer, console: Console) -> None:
    """Print what is about to be trained, before the first step: set-up errors show here."""
    config, space, plan = trainer.config, trainer.space, trainer.plan
    graph = silencing_graph(config.loss, space)
    groups = ", ".join(f"{len(members)} {name}" for name, members in space.groups().items())
    auxiliary_images = int(plan.class_counts[space.num_targets :].sum())
    parameters = sum(p.numel() for p in trainer.model.parameters()) / 1e6
    optimiser = f"{config.optim.name}, {config.schedule.name} schedule"
    silenced = (
        "nothing"
        if graph is None
        else f"{graph.num_pairs:,} pairs ({config.loss.directions}), lambda_s = "
        f"{config.loss.silence:g}"
    )
    several = f"{trainer.ranks.world} processes on " if trainer.ranks.world > 1 else ""
    lines = {
        "classes": f"{space.num_targets:,} targets ({groups}) + {space.num_auxiliaries:,} "
        "auxiliaries",
        "silenced": silenced,
        "images": f"{plan.images_per_epoch:,} an epoch, of which {auxiliary_images:,} auxiliary; "
        f"{plan.steps_per_epoch:,} steps of {config.data.batch}",
        "model": f"{config.model.name}, {parameters:.2f} M parameters; loss {config.loss.name}; "
        f"{optimiser}",
        "machine": f"{several}{trainer.device.type}, {str(trainer.dtype).removeprefix('torch.')}, "
        f"loader {trainer.train_loader.engine_name}, {trainer.train_loader.decode} decode",
    }
    for name, text in lines.items():
        console.print(f"[bold]{name:>9}[/]  {text}", highlight=False, soft_wrap=True)
    for note in notes(config):
        console.print(f"[yellow]note:[/] {note}", highlight=False, soft_wrap=True)


def notes(config: Config) -> Iterator[str]:
    """What is no error, but worth a word."""
    if late := config.never_comes():
        yield f"not reached in {config.train.epochs} epochs: {', '.join(late)}"
    starts_somewhere = config.model.pretrained or config.model.weights
    if config.schedule.head_only_epochs >= config.train.epochs and not starts_somewhere:
        yield (
            "the backbone stays as random as it starts: "
            f"schedule.head_only_epochs={config.schedule.head_only_epochs}"
        )
    if config.model.scale_alone and not config.model.head_weights:
        yield (
            "the rows of the head stay as random as they start: model.scale_alone without "
            "model.head_weights"
        )
    if config.data.workers > cores():
        yield (
            f"data.workers={config.data.workers}, but there are {cores()} cores: fewer may be "
            "faster"
        )
