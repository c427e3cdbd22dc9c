"""A finished RUN teaches another model: its soft labels beside the configured loss."""

from collections.abc import Hashable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fastlt.config import Count, MethodConfig, Positive, Share
from fastlt.errors import UserError
from fastlt.losses import Step
from fastlt.methods.method import Base, Frozen


class Method(Base):
    """Knowledge distillation over the targets (Hinton et al. 2015, arXiv 1503.02531, section 2).

    From `start_epoch` on the loss is (1 - weight) * L + weight * T^2 * KL(teacher || student), both
    softened by the temperature T, over the targets alone: the teacher knows no auxiliaries.
    """

    PAPER = "Hinton et al. 2015, arXiv 1503.02531"

    class Config(MethodConfig):
        """The numbers of distillation."""

        name: str = "distill"
        """distill."""
        teacher: str = ""
        """The finished RUN, or its model.safetensors, of a model with the same targets."""
        weight: Share = 0.5
        """Share of the teacher's labels in the loss."""
        temperature: Positive = 2.0
        """Temperature that both predictions are softened by."""
        start_epoch: Count = 0
        """The first epoch with the teacher's labels."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if not self.config.teacher:
            raise UserError("method.name=distill needs a teacher: set method.teacher=RUN")
        teacher, _ = self.finished(self.config.teacher)
        self.teacher = Frozen(teacher, self.task.device)
        self.is_taught = False

    def begin(self, epoch: int) -> Hashable:
        """Turn the teacher's labels on from `start_epoch`."""
        self.is_taught = epoch >= self.config.start_epoch
        return super().begin(epoch), self.is_taught

    def forward(
        self,
        images: Tensor,
        target: Tensor,
        target_b: Tensor | None = None,
        mix: Tensor | None = None,
    ) -> Step:
        """Return the step; see `Base.forward`."""
        logits = self.model(images)
        loss = self.loss(logits, target, target_b, mix)
        if self.is_taught:
            weight, temperature = self.config.weight, self.config.temperature
            theirs = (self.teacher(images).float() / temperature).log_softmax(dim=1)  # (N, T)
            ours = (logits[:, : theirs.shape[1]].float() / temperature).log_softmax(dim=1)
            if self.row_weight is None:
                kl = F.kl_div(ours, theirs, log_target=True, reduction="batchmean")
            else:
                each = F.kl_div(ours, theirs, log_target=True, reduction="none")
                kl = self.mean(each.sum(dim=1))
            loss = (1 - weight) * loss + weight * temperature**2 * kl
        return self.scored(loss, logits, target, target_b, mix)
