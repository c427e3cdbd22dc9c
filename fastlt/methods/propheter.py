"""A teacher with noise of each class on its feature maps teaches a new network those maps."""

import copy
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlt.classes import ClassSpace
from fastlt.config import MethodConfig, NotNegative, Several
from fastlt.errors import UserError
from fastlt.losses import Step, Task
from fastlt.methods.method import Base, Stage, StageData
from fastlt.models.backbones import CifarResNet
from fastlt.models.export import read_metadata
from fastlt.models.weight_files import weights_file
from fastlt.models.weights import read_tensors
from fastlt.utils.run_files import checkpoints


class Method(Base):
    """Propheter, in two stages of `train.epochs` epochs each.

    The paper's: every class has two numbers, a and b. In every `cycle`-th epoch of the first stage,
    a teacher learns from maps F + a * e + b with e of N(0, 1), and a and b with it. In the second,
    a new network learns by the configured loss and from the maps of the teacher with noise, which
    stays in training mode, so its batch norm goes by the batch, and gets no gradient. The paper's
    loss is balanced softmax (loss.name=balanced-ce); here it is the one of the recipe.

    Ours: teacher and student start from the same weights, those that a recipe starts from; a mixed
    image has a and b mixed as its labels are; and of a transformer, F is all of its tokens.

    With method.teacher=RUN there is the second stage alone, and the model of the RUN teaches. If
    the RUN is one of propheter that has its checkpoint, its a and b are the noise, by the names of
    classes; of any other RUN, the maps are taken without noise.
    """

    PAPER = "Xu et al. 2023, arXiv 2304.04135"

    class Config(MethodConfig):
        """The numbers of Propheter; all but `teacher` are the paper's."""

        name: str = "propheter"
        """propheter."""
        cycle: Several = 7
        """The teacher's epochs with noise are the first one and every so many after it."""
        weight: NotNegative = 1.0
        """Weight of the mean square between maps of student and teacher."""
        spread: NotNegative = 0.02
        """Standard deviation of what a and b are drawn from at the start."""
        teacher: str = ""
        """A finished RUN of the same targets and model, which teaches; by default, one is trained
        first."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.is_student = self.is_noisy = False
        classes = self.task.space.num_classes
        # a and b of each class, (C,)
        self.scale = nn.Parameter(self.config.spread * torch.randn(classes))
        self.shift = nn.Parameter(self.config.spread * torch.randn(classes).abs())
        # The weights of whichever is not trained: the student's first ones, then the teacher's.
        self.other = copy.deepcopy(self.model).requires_grad_(False)
        if self.config.teacher:
            self.take_teacher(Path(self.config.teacher))

    @torch.no_grad()
    def take_teacher(self, place: Path) -> None:
        """Take the teacher, and its noise if it has any, from a finished run."""
        teacher, path = self.finished(str(place))
        try:
            self.other.backbone.load_state_dict(teacher.backbone.state_dict())
        except RuntimeError as error:
            raise UserError(
                f"{path} is another model than the student's, so it has other maps: set "
                "method.teacher to a run of the same model.name"
            ) from error
        known = noise_of(place)
        for row, name in enumerate(self.task.space.names):
            self.scale[row], self.shift[row] = known.get(name, torch.zeros(2))

    def stages(self) -> list[Stage]:
        """Return the stage of the teacher, unless one is given, and that of the student."""
        teacher = Stage("teacher", trained=("model.", "scale", "shift"))
        student = Stage("student", trained=("model.",))
        return [student] if self.config.teacher else [teacher, student]

    def enter_stage(self, number: int, task: Task) -> None:
        """Take up the task of a stage; see `Base.enter_stage`."""
        super().enter_stage(number, task)
        self.is_student = number == len(self.stages()) - 1

    def start_stage(self, data: StageData) -> None:
        """Let teacher and student change places as the student's stage begins."""
        if self.is_student and not self.config.teacher:
            teacher = {name: value.clone() for name, value in self.model.state_dict().items()}
            self.model.load_state_dict(self.other.state_dict())
            self.other.load_state_dict(teacher)

    def begin(self, epoch: int) -> Hashable:
        """Turn the noise on or off; see `Base.begin`."""
        self.is_noisy = self.is_student or epoch % self.config.cycle == 0
        # DistributedDataParallel waits for gradients of whatever requires one
        for noise in (self.scale, self.shift):
            noise.requires_grad_(self.is_noisy and not self.is_student)
        self.other.train(self.is_student)
        return super().begin(epoch), self.is_noisy

    def forward(
        self,
        images: Tensor,
        target: Tensor,
        target_b: Tensor | None = None,
        mix: Tensor | None = None,
    ) -> Step:
        """Return the step; see `Base.forward`."""
        labels = (target, target_b, mix)
        if not self.is_noisy:
            return super().forward(images, *labels)
        maps = maps_of(self.model.backbone, images)
        seen = maps if self.is_student else self.noisy(maps, *labels)
        logits = self.model.head(pooled(self.model.backbone, seen))
        loss = self.loss(logits, *labels)
        if self.is_student:
            with torch.no_grad():
                theirs = self.noisy(maps_of(self.other.backbone, images), *labels)
            loss = loss + self.config.weight * self.apart(maps.float(), theirs.float())
        return self.scored(loss, logits, *labels)

    def apart(self, ours: Tensor, theirs: Tensor) -> Tensor:
        """Return the mean square () between maps (N, ...) of student and teacher."""
        if self.row_weight is None:
            return F.mse_loss(ours, theirs)
        return self.mean((ours - theirs).square().flatten(1).mean(dim=1))

    def noisy(
        self,
        maps: Tensor,
        target: Tensor,
        target_b: Tensor | None = None,
        mix: Tensor | None = None,
    ) -> Tensor:
        """Return maps (N, ...) with the noise of their labels, of the same shape, float32.

        The paper's code, `GaussianLayer`: a and b are first brought back to a >= 0 and 0 <= b <= 1.
        """
        with torch.no_grad():
            self.scale.clamp_(min=0)
            self.shift.clamp_(0, 1)
        scale, shift = self.scale[target], self.shift[target]
        if target_b is not None and mix is not None:
            scale = mix * scale + (1 - mix) * self.scale[target_b]
            shift = mix * shift + (1 - mix) * self.shift[target_b]
        shape = [-1] + [1] * (maps.ndim - 1)
        return maps + scale.view(shape) * torch.randn_like(maps) + shift.view(shape)

    def metrics(self) -> dict[str, float]:
        """Return the means of a and b over the classes."""
        noise = {"noise_scale": self.scale, "noise_shift": self.shift}
        return {name: part.detach().mean().item() for name, part in noise.items()}


def maps_of(backbone: Any, images: Tensor) -> Tensor:
    """Return what a backbone pools: maps (N, D, h, w), or (N, h, w, D), or tokens (N, L, D)."""
    is_own = isinstance(backbone, CifarResNet)
    return backbone.maps(images) if is_own else backbone.forward_features(images)


def pooled(backbone: Any, maps: Tensor) -> Tensor:
    """Return the features (N, D) of `maps_of`, pooled as the backbone's own forward pass does."""
    if isinstance(backbone, CifarResNet):
        return backbone.pool(maps)
    return backbone.forward_head(maps, pre_logits=True)


def noise_of(run: Path) -> dict[str, Tensor]:
    """Return a and b, (2,), of each class by its name; none where the run has none of its own."""
    metadata, saved = read_metadata(weights_file(str(run))), checkpoints(run)
    if metadata.get("method", {}).get("name") != "propheter" or not saved:
        return {}
    found = read_tensors(saved[-1] / "method.safetensors")
    noise = torch.stack([found["scale"], found["shift"]], dim=1)
    return dict(zip(ClassSpace.load(run / "classes.json").names, noise, strict=True))
