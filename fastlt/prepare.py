"""From a configuration and a pack to all that a run needs."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.optim import Optimizer

from fastlt.classes import ClassSpace
from fastlt.config import Config
from fastlt.data.augment import Geometry
from fastlt.data.loader import Loader, choose_engine
from fastlt.data.packed import Pack
from fastlt.data.plan import Plan, Sampling
from fastlt.errors import UserError
from fastlt.losses import Step, silencing_graph
from fastlt.model import Classifier, build_model
from fastlt.optim import Averaged, averaged, build_optimizer, lr_factor


@dataclass
class Progressed:
    """What a checkpoint must know besides tensors."""

    epoch: int = 0
    step_in_epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0  # of this epoch so far
    correct: float = 0.0  # target images of this epoch so far that the model got right while it trained
    counted: float = 0.0
    seconds: float = 0.0  # of training, over all starts
    images: int = 0
    best: dict[str, Any] = field(default_factory=dict)


@dataclass
class Trainer:
    """All that a run needs, made once by `prepare`."""

    config: Config
    run: Path
    pack: Pack
    space: ClassSpace
    plan: Plan
    device: torch.device
    dtype: torch.dtype
    train_loader: Loader
    val_loader: Loader
    model: Classifier
    ema: Averaged | None
    optimizer: Optimizer
    factor: Callable[[float], float]
    at: Progressed
    forward: dict[bool, Callable[..., Step]] = field(default_factory=dict)  # by `in_drw`: compiled once, not once an epoch


def prepare(config: Config, run: Path, pack: Pack) -> Trainer:
    device, dtype = choose_device(config)
    space = pack.space if config.data.auxiliary else pack.space.targets_only()
    plan = build_plan(config, pack)
    if plan.steps_per_epoch == 0:
        raise UserError(
            f"an epoch has {plan.images_per_epoch} images, less than one batch of {config.data.batch}: set data.batch lower"
        )
    torch.manual_seed(config.train.seed)
    model = on_device(build_model(config.model, space.num_classes, config.data.size), config, device)
    data = config.data
    return Trainer(
        config, run, pack, space, plan, device, dtype,
        Loader(pack.train, data.size, choose_engine(pack, "train", data.engine), data.workers, pack.beton.get("train")),
        Loader(pack.val, data.size, choose_engine(pack, "val", data.engine), data.workers, pack.beton.get("val")),
        model, averaged(config.optim, model), build_optimizer(config.optim, model, data.batch),
        lr_factor(config.schedule, config.train.epochs), Progressed(),
    )  # fmt: skip


def choose_device(config: Config) -> tuple[torch.device, torch.dtype]:
    device = find_device(config.train.device)
    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    bf16 = config.train.precision == "bf16" or (config.train.precision == "auto" and device.type == "cuda")
    return device, torch.bfloat16 if bf16 else torch.float32


def find_device(name: str) -> torch.device:
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"train.device={name}, but torch finds no such device here: set train.device=auto") from error
    return device


def on_device(model: Classifier, config: Config, device: torch.device) -> Classifier:
    """The model on the device, in the memory format of the configuration."""
    model = model.to(device)
    return model.to(memory_format=torch.channels_last) if config.train.channels_last else model  # type: ignore[call-overload]


def build_plan(config: Config, pack: Pack) -> Plan:
    data, space = config.data, pack.space
    geometry = Geometry(data.crop, data.size, data.flip, data.scale, data.ratio, data.padding, data.eval_resize)
    sampling = Sampling(data.target_sampling, data.budget if data.auxiliary else 0)
    return Plan(pack.train, space.num_targets, space.num_classes, geometry, sampling, data.batch, config.train.seed, data.drop_last)


def introduce(trainer: Trainer, console: Console) -> None:
    """What is about to be trained, before the first step: errors in the set-up should be seen here."""
    config, space, plan = trainer.config, trainer.space, trainer.plan
    graph = silencing_graph(config.loss, space)
    groups = ", ".join(f"{len(members)} {name}" for name, members in space.groups().items())
    auxiliary_images = int(plan.class_counts[space.num_targets :].sum())
    parameters = sum(p.numel() for p in trainer.model.parameters()) / 1e6
    optimiser = f"{config.optim.name}, {config.schedule.name} schedule"
    silenced = (
        "nothing" if graph is None else f"{graph.num_pairs:,} pairs ({config.loss.directions}), lambda_s = {config.loss.silence:g}"
    )
    lines = {
        "classes": f"{space.num_targets:,} targets ({groups}) + {space.num_auxiliaries:,} auxiliaries",
        "silenced": silenced,
        "images": f"{plan.images_per_epoch:,} an epoch, of which {auxiliary_images:,} auxiliary; "
        f"{plan.steps_per_epoch:,} steps of {config.data.batch}",
        "model": f"{config.model.name}, {parameters:.2f} M parameters; loss {config.loss.name}; {optimiser}",
        "machine": f"{trainer.device}, {str(trainer.dtype).removeprefix('torch.')}, loader {trainer.train_loader.engine_name}",
    }
    for name, text in lines.items():
        console.print(f"[bold]{name:>9}[/]  {text}", highlight=False, soft_wrap=True)
