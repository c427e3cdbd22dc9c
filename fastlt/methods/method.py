"""What the training loop trains: the interface of a method.

A method is one file beside this one that defines `class Method(Base)`. Its name is the file's, with
hyphens for underscores; its first line of documentation is what `fastlt methods` prints.
"""

import copy
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastlt.config import MethodConfig
from fastlt.errors import UserError
from fastlt.losses import Step, Task, build_loss, mean_of, rows_of
from fastlt.models.classifier import Classifier
from fastlt.models.export import load_exported
from fastlt.models.weight_files import weights_file
from fastlt_kernels import LossOutput

# What a later stage sets of the schedule, so that it begins as a training of its own does.
OWN_SCHEDULE: dict[str, Any] = {
    "schedule.name": "cosine",
    "schedule.warmup_epochs": 0,
    "schedule.head_only_epochs": 0,
    "schedule.head_only_lr": 1.0,
    "schedule.shift_bn": False,
}


@dataclass(frozen=True)
class Stage:
    """A part of a training that has settings of its own.

    Each stage has its own order of images, optimiser and schedule, and is resumed where it was
    stopped; the model goes on from one to the next, as its average where weights are averaged.
    """

    name: str = ""
    """What is printed as the stage begins."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Values by `section.key`, over those of the run; `train.epochs` included."""
    trained: tuple[str, ...] = ("",)
    """Beginnings of the names of the method's parameters that are trained, such as
    `model.head.`; by default all are."""
    features: bool = False
    """Whether the method is given features (N, D) in place of images: of the images as they are
    evaluated, by the backbone as the stage finds it, computed once and kept in the pack's
    folder."""


class Base(nn.Module):
    """A model and how it is trained.

    `self.model` is evaluated, averaged and exported. Whatever else is registered (projections,
    memories) is trained and kept in checkpoints, and never exported. torch's generators are seeded
    anew in each step, so a run that was killed draws the same numbers when it is resumed.

    config: the section [method]; task: the classes, counts, loss, epochs and device.
    """

    Config: ClassVar[type[MethodConfig]] = MethodConfig
    """What the table [method] of a recipe may set."""
    SETTINGS: ClassVar[dict[str, Any]] = {}
    """Values by `section.key` that the method's recipe sets, below the user's own settings."""
    PAPER: ClassVar[str] = ""
    """Authors, year and arXiv number."""
    takes_sharded_heads: ClassVar[bool] = False
    """Whether it goes with model.head=class-parallel."""
    takes_row_weights: ClassVar[bool] = True
    """Whether it goes with data.class_weights and data.sample_weights: not where what it trains by
    is not a mean of losses of labels."""
    row_weight: Tensor | None = None
    """What the rows of the batch count, (N,) float32, with a mean of 1 over the step; None: alike.
    The training sets it before it calls the method; `loss` and `mean` go by it."""

    @staticmethod
    def build(config: Any, model: Classifier) -> Classifier:
        """Return the model with what the method changes of its architecture.

        It is called for training, and wherever an exported model is loaded.
        """
        return model

    def __init__(self, config: Any, model: Classifier, task: Task) -> None:
        super().__init__()
        self.config, self.model, self.task = config, model, task
        self.criterion = build_loss(task, model.head)
        self.stage = 0  # the number of the stage

    def stages(self) -> list[Stage]:
        """Return the stages of the training, in their order."""
        return [Stage()]

    def enter_stage(self, number: int, task: Task) -> None:
        """Take up the task of a stage, its loss included.

        It is called as the stage begins and whenever it is resumed, before tensors are loaded.
        """
        self.stage, self.task = number, task
        self.criterion = build_loss(task, self.model.head)

    def start_stage(self, data: "StageData") -> None:
        """Prepare what a stage needs of the training images; called once, as the stage begins."""

    def begin(self, epoch: int) -> Hashable:
        """Prepare for an epoch of the stage, counted from 0.

        What is compiled is kept as long as this returns the same.
        """
        return self.criterion.begin(epoch)

    def forward(
        self,
        images: Tensor,
        target: Tensor,
        target_b: Tensor | None = None,
        mix: Tensor | None = None,
    ) -> Step:
        """Return loss and hits of images (N, 3, H, W) and labels (N,), by default the configured.

        target_b (N,) and mix () or (N,) are given where images are mixed: the label is `target`
        with weight mix, and `target_b` with 1 - mix.
        """
        return self.criterion.step(self.model, images, target, target_b, mix, self.row_weight)

    def predictor(self) -> Classifier:
        """Return what is evaluated and exported, with training-only parts folded in."""
        return self.model

    def loss(
        self,
        logits: Tensor,
        target: Tensor,
        target_b: Tensor | None = None,
        mix: Tensor | None = None,
    ) -> Tensor:
        """Return the configured loss () of logits (N, C), silencing and prior included.

        The rows are those of the batch, and count what `row_weight` says.
        """
        rows = rows_of(target_b, mix, self.row_weight)
        found = self.criterion.of_logits(logits, target, **rows)
        return found.loss if isinstance(found, LossOutput) else found

    def mean(self, losses: Tensor) -> Tensor:
        """Return the mean () of losses (N,) of the batch's rows, by `row_weight`."""
        return mean_of(losses, self.row_weight)

    def scored(self, loss: Tensor, logits: Tensor, *labels: Tensor | None) -> Step:
        """Return a step by its loss () and the logits (N, C) that the model would predict by."""
        return self.criterion.scored(loss, self.criterion.predicted(logits), *labels)  # type: ignore[arg-type]

    def finished(self, place: str) -> tuple[Classifier, Path]:
        """Return the model of a finished RUN, and its file.

        Raises UserError where it is of other targets.
        """
        path = weights_file(place)
        model, names = load_exported(path)
        if names != self.task.space.target_names:
            raise UserError(f"{path} was trained for other targets: name a run of the same ones")
        return model, path

    def metrics(self) -> dict[str, float]:
        """Return figures of the method for the line of an epoch in metrics.jsonl, by name."""
        return {}

    def extra_state(self) -> dict[str, Tensor]:
        """Return what the method trains or keeps besides the model, for checkpoints."""
        state = self.state_dict()
        return {name: state[name] for name in state if not name.startswith("model.")}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Base":
        """Copy modules and tensors; task, loss and teachers, which nothing changes, are shared."""
        shared = [self.task, self.criterion]
        shared += [value for value in vars(self).values() if isinstance(value, Frozen)]
        memo.update({id(value): value for value in shared})
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        twin.__dict__ = copy.deepcopy(self.__dict__, memo)
        return twin


@dataclass(frozen=True)
class StageData:
    """The training images of a stage, n of them, each once."""

    labels: Tensor
    """The labels (n,) int64."""
    features: Callable[[], Tensor]
    """A function that returns the features (n, D) float32 by the backbone, of the images as they
    are evaluated."""


class Frozen:
    """A trained model that is asked, not trained.

    It is no parameter of the method, in no checkpoint, and always in evaluation mode.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = model.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return what the model makes of images (N, 3, H, W)."""
        return self.model(images)
