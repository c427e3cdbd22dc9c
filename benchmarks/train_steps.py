"""The two steps that `fastlt bench-train` compares, endlessly repeated.

One is the trainer's, taken apart by marks, the other a bare one.
"""

import itertools
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastlt.training.inputs import make_input
from fastlt.training.loop import steps
from fastlt.training.setup import Trainer


class Marks:
    """Marks that end a part of a step, passed when the device has done it.

    Where a GPU is still at work when images arrive, it passes the mark of that and the one before
    at once: then it has not waited.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.passed: list[tuple[str, Any]] = []

    def __call__(self, part: str) -> None:
        """Mark the end of a part."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.passed.append((part, event))
        else:
            self.passed.append((part, time.perf_counter()))

    def seconds(self) -> dict[str, float]:
        """Return the seconds by part, since the last call.

        What came before the first mark is not counted, for others were measured then.
        """
        passed, self.passed = self.passed, []
        total: Counter[str] = Counter()
        for (_, before), (part, after) in itertools.pairwise(passed):
            total[part] += (
                before.elapsed_time(after) / 1000 if self.device.type == "cuda" else after - before
            )
        return dict(total)


def loop_steps(trainer: Trainer, marks: Marks) -> Iterator[int]:
    """Run the trainer's own loop: loader, augmentation, loss, backward, step.

    Yields the images of each step.
    """
    while True:
        trainer.state.step_in_epoch = 0
        for batch, _ in steps(trainer, marks):
            yield len(batch.labels)
        trainer.state.epoch += 1


def bare_steps(trainer: Trainer, compiled: bool) -> Iterator[int]:
    """Run forward, cross entropy, backward and step on one batch that lies on the device."""
    images, target = resident_batch(trainer)
    forward = (
        torch.compile(bare_loss, mode=trainer.config.train.compile_mode) if compiled else bare_loss
    )
    while True:
        with torch.autocast(
            trainer.device.type, trainer.dtype, enabled=trainer.dtype != torch.float32
        ):
            loss = forward(trainer.model, images, target)
        loss.backward()
        trainer.updater.optimizer.step()
        trainer.updater.optimizer.zero_grad()
        yield len(target)


def resident_batch(trainer: Trainer) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images and targets on the device."""
    config, device = trainer.config, trainer.device
    batch = next(trainer.plan.epoch(0))
    pixels = torch.randint(
        0, 256, (len(batch.labels), config.data.size, config.data.size, 3), dtype=torch.uint8
    )
    labels = torch.from_numpy(batch.labels) % trainer.space.num_classes
    images, target, _, _ = make_input(
        config, pixels, labels, torch.Generator().manual_seed(0), device
    )
    return images, target


def bare_loss(model: torch.nn.Module, images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return cross entropy over all classes."""
    return torch.nn.functional.cross_entropy(model(images), target)


def flops_per_image(trainer: Trainer) -> float:
    """Return the FLOP of products and convolutions in forward and backward.

    Multiply-adds count two.
    """
    images, target = resident_batch(trainer)
    with FlopCounterMode(display=False) as counter:
        bare_loss(trainer.model, images, target).backward()
    trainer.updater.optimizer.zero_grad()
    return counter.get_total_flops() / len(target)
