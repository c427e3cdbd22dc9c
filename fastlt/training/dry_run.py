"""`fastlt train --dry-run`: what a run would take, from a few of its own steps. Nothing is written.

Memory is counted, not guessed: parameters and the optimiser's state as they are, and what the
forward pass of an image keeps for the backward pass. Speed is measured on batches that the loader
feeds, as large as a few seconds and the memory allow.
"""

import itertools
import math
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from torch import Tensor

from fastlt.config import Config
from fastlt.errors import UserError
from fastlt.models.backbones import cifar_backbone
from fastlt.models.heads import HEADS
from fastlt.models.preprocessing import with_preprocessing
from fastlt.training.distributed import process_group
from fastlt.training.features import CACHE, FeatureLoader, still
from fastlt.training.inputs import make_input
from fastlt.training.loop import (
    forward_of,
    open_packs,
    set_modes,
    steps,
    without_silencing,
)
from fastlt.training.messages import report_setup
from fastlt.training.setup import Trainer, grow, prepare

PROBED = 2  # images of the first look; batch norm needs as many
STEP_SECONDS = 2.0  # the batch that is measured takes about as long
WARM_UP, STEPS, SECONDS = 2, 10, 10.0  # steps, and as many more as fit in the seconds
OF_MEMORY = 0.5  # that the batch which is measured may take


class Memory(NamedTuple):
    """The bytes of one process."""

    weights: int
    gradients: int
    optimiser: int
    averaged: int
    per_image: int  # kept of its forward pass for the backward pass

    @property
    def resident(self) -> int:
        """The bytes that are held whatever the batch."""
        return self.weights + self.gradients + self.optimiser + self.averaged

    def at(self, images: int) -> int:
        """Return the bytes of a step of so many images."""
        return self.resident + images * self.per_image


class Speed(NamedTuple):
    """The speed of the loop, as it was measured."""

    images_per_second: float
    batch: int
    steps: int


def dry_run(config: Config, processes: int, console: Console, silencing_asked: bool = True) -> None:
    """Print what a run would take.

    processes: those that would share the batch, each on a GPU as fast as this machine's; the run
    itself is of one. silencing_asked: as for `fastlt.training.loop.train`.
    """
    config, notes = with_preprocessing(config)
    if config.data.batch % processes:
        raise UserError(
            f"data.batch={config.data.batch} cannot be shared equally by {processes} processes: "
            "choose a multiple"
        )
    pack = open_packs(config.data)
    if not silencing_asked:
        config = without_silencing(config, pack, console)
    with (
        process_group(HEADS[config.model.head].is_sharded),
        console.status("measuring a few steps"),
        prepare(config, Path(os.devnull), pack, notes=notes) as trainer,
    ):
        if trainer.stages[0].features:
            raise UserError(
                "a dry run measures images, but the training begins with features: leave out "
                f"--dry-run, or the RUN that method.name={config.method.name} begins with"
            )
        report_setup(trainer, console)
        if config.data.features == CACHE:
            with_random_features(trainer, console)
        plan = trainer.plan
        whole = trainer.epochs, plan.steps_per_epoch, plan.images_per_epoch
        memory, speed = measure(trainer, config.data.batch // processes)
    for name, text in estimate(config, processes, whole, memory, speed, trainer.device).items():
        console.print(f"[bold]{name:>9}[/]  {text}", highlight=False, soft_wrap=True)


def with_random_features(trainer: Trainer, console: Console) -> None:
    """Give a trainer that is to train on features random ones, and print how long its own take."""
    data, pack = trainer.config.data, trainer.pack
    width = int(trainer.model.backbone.num_features)  # type: ignore[arg-type]
    shape = (data.feature_views, len(pack.train), width)
    trainer.train_loader = FeatureLoader(
        lambda console: torch.randn(1, 1, width, dtype=torch.bfloat16).expand(shape)
    )
    images = data.feature_views * len(pack.train) + len(pack.val)
    pixels = torch.zeros(PROBED, 3, data.size, data.size, device=trainer.device)
    seconds = math.inf
    with torch.inference_mode(), still(trainer.model.backbone):
        for _ in range(3):
            began = time.perf_counter()
            trainer.model.backbone(pixels)
            wait_for(trainer.device)
            seconds = min(seconds, time.perf_counter() - began)
    minutes = images * seconds / PROBED / 60
    console.print(
        f"[bold] features[/]  of {images:,} images and views are computed first, unless they are "
        f"there: {minutes:,.1f} minutes at most",
        highlight=False,
        soft_wrap=True,
    )


def measure(trainer: Trainer, batch: int) -> tuple[Memory, Speed]:
    """Return the memory and speed in the last epoch, when images are largest and all is trained."""
    trainer.state.epoch = trainer.config.train.epochs - 1
    grow(trainer)
    set_modes(trainer)
    per_image, seconds = probe(trainer, min(PROBED, batch))
    memory = memory_of(trainer, per_image)
    affordable = (OF_MEMORY * memory_bytes(trainer.device) - memory.resident) / max(1, per_image)
    measured = max(min(PROBED, batch), min(batch, int(STEP_SECONDS / seconds), int(affordable)))
    return memory, timed(trainer, measured)


def probe(trainer: Trainer, images: int) -> tuple[int, float]:
    """Return the bytes that the forward pass of an image keeps, and the seconds of a step of it.

    They are measured on random images.
    """
    size, views = trainer.plan.geometry.size, trainer.config.data.views
    if trainer.config.data.features == CACHE:
        pixels = torch.randn(images * views, int(trainer.model.backbone.num_features))  # type: ignore[arg-type]
    else:
        pixels = torch.randint(0, 256, (images * views, size, size, 3), dtype=torch.uint8)
    labels = (torch.arange(images) % trainer.space.num_classes).repeat(views)
    made = make_input(
        trainer.config,
        pixels,
        labels,
        torch.Generator().manual_seed(0),
        trainer.device,
        trainer.dtype,
    )
    forward = forward_of(trainer)
    kept: dict[int, int] = {}
    known = {
        tensor.untyped_storage().data_ptr()
        for tensor in [*trainer.model.parameters(), *trainer.model.buffers()]
    }

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    seconds = math.inf
    for _ in range(3):  # the first one allocates, and compiles where that is on
        began = time.perf_counter()
        with (
            torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor),
            torch.autocast(
                trainer.device.type, trainer.dtype, enabled=trainer.dtype != torch.float32
            ),
        ):
            kept.clear()
            loss = forward(*made).loss
        loss.backward()
        wait_for(trainer.device)
        seconds = min(seconds, time.perf_counter() - began)
    trainer.updater.optimizer.zero_grad()
    return sum(kept.values()) // images, seconds / images


def memory_of(trainer: Trainer, per_image: int) -> Memory:
    """Return the bytes that a training holds."""
    parameters = list(trainer.model.parameters())
    states = [
        state for group in trainer.updater.optimizer.state.values() for state in group.values()
    ]
    averaged = list(trainer.ema.average.parameters()) if trainer.ema is not None else []
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    return Memory(
        size_of(parameters), size_of(trained), size_of(states), size_of(averaged), per_image
    )


def size_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def memory_bytes(device: torch.device) -> int:
    """Return the bytes of memory of a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def timed(trainer: Trainer, batch: int) -> Speed:
    """The trainer's own steps, on batches of this size that the loader feeds."""
    # compiled for such batches
    trainer.plan, trainer.forward = (
        replace(trainer.plan, batch=batch, drop_last=True),
        None,
    )
    steps = own_steps(trainer)
    for _ in itertools.islice(steps, WARM_UP):
        pass
    wait_for(trainer.device)
    began, done = time.perf_counter(), 0
    while done < STEPS or time.perf_counter() - began < SECONDS / 2:
        next(steps)
        done += 1
        if time.perf_counter() - began > SECONDS:
            break
    wait_for(trainer.device)
    return Speed(done * batch / (time.perf_counter() - began), batch, done)


def own_steps(trainer: Trainer) -> Iterator[None]:
    """Take the trainer's own steps, epoch after epoch."""
    while True:
        trainer.state.step_in_epoch = 0
        for _ in steps(trainer):
            yield


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what was queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def estimate(
    config: Config,
    processes: int,
    whole: tuple[int, int, int],
    memory: Memory,
    speed: Speed,
    device: torch.device,
) -> dict[str, str]:
    """Return what is printed, by what it is about.

    whole: epochs of all stages, batches of an epoch, and its images.
    """
    epochs, per_epoch, images = whole
    # what is dropped at the end of an epoch takes no time
    images = min(images, per_epoch * config.data.batch)
    share = config.data.batch // processes
    need, have = memory.at(share), memory_bytes(device)
    hours = epochs * images / (speed.images_per_second * processes) / 3600
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimiser": memory.optimiser,
        "average": memory.averaged,
    }
    listed = ", ".join(f"{name} {in_words(part)}" for name, part in parts.items() if part)
    advice = "lower data.batch" + (
        "" if cifar_backbone(config.model) else " or set model.checkpoint_activations=true"
    )
    batches = (
        f" ({per_epoch:,} batches, {config.optim.accumulate} to a step)"
        if config.optim.accumulate > 1
        else ""
    )
    updates = -(-per_epoch // config.optim.accumulate)
    each = f"each of {processes} processes" if processes > 1 else "one process"
    return {
        "memory": f"{in_words(need)} of {each}: {listed}, and {share:,} images of "
        f"{in_words(memory.per_image)}; "
        f"this machine's {device.type} has {in_words(have)}"
        + (f": TOO LITTLE, {advice}" if need > have else ""),
        "steps": f"{updates:,} an epoch{batches}, {epochs * updates:,} in {epochs:,} epochs",
        "speed": f"{speed.images_per_second:,.1f} images/s, measured over {speed.steps} steps of "
        f"{speed.batch} loaded images",
        "time": (f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes")
        + " of training"
        + (f", if {processes} processes are {processes} times as fast" if processes > 1 else ""),
    }


def in_words(size: float) -> str:
    """Return a size in MB or GB."""
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"
