"""Features of one class are dropped at a time, so that the others learn to do without it."""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlt.config import MethodConfig, NotNegative
from fastlt.errors import UserError
from fastlt.losses import IGNORED, Step
from fastlt.methods.method import Base
from fastlt.models.classifier import Classifier
from fastlt.models.heads import Head, LinearHead


class DropClassifier(Classifier):
    """A classifier that predicts by its drop branch, with the channels of all classes kept."""

    importance: Tensor  # (D,), of each channel, over all classes

    def __init__(self, backbone: nn.Module, head: Head, width: int) -> None:
        super().__init__(backbone, head)
        self.mix = nn.Conv2d(width, width, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.register_buffer("importance", torch.ones(width))

    def features(self, images: Tensor) -> Tensor:
        """Return the features (N, D) of images (N, 3, H, W) by the drop branch."""
        return self.kept(self.maps(images), self.importance)

    def kept(self, maps: Tensor, importance: Tensor) -> Tensor:
        """Return the features of the drop branch, of maps (N, D, h, w) and channels (D,)."""
        return self.pool(F.relu(self.norm(self.mix(maps * importance[:, None, None]))))

    def branch(self, maps: Tensor, importance: Tensor) -> Tensor:
        """Return the logits (N, C) of the drop branch, of maps (N, D, h, w) and channels (D,)."""
        return self.head(self.kept(maps, importance))

    def predicting(self, targets: int) -> "DropClassifier":
        """Return a model of the same branch with a head of the targets alone."""
        model = DropClassifier(self.backbone, self.head.of_targets(targets), len(self.importance))
        model.mix, model.norm, model.importance = self.mix, self.norm, self.importance
        return model.train(self.training)


def importance_of(rows: Tensor, dropped: Tensor | None = None) -> Tensor:
    """Return the mean over classes of ReLU(rows), (D,) of (C, D), without one class ()."""
    kept = F.relu(rows.to(torch.promote_types(rows.dtype, torch.float32)))
    if dropped is None:
        return kept.mean(dim=0)
    return (kept.sum(dim=0) - kept[dropped]) / max(1, len(rows) - 1)


class Method(Base):
    """The image form of stochastic class dropping.

    The paper's, for segmentation: importance of channels by the classifier's positive weights, one
    class that is dropped with a probability that grows with the epochs, the plain branch whose loss
    counts the less, the loss of the drop branch without the dropped class, and the suppression of
    that class, whose weight is 10; prediction is by the drop branch. Pooling before the head, and
    the configured loss in place of weighted cross entropy, are ours. What is lost is that several
    classes meet in one image: expect a regulariser.
    """

    PAPER = "Chu et al. 2021, arXiv 2111.00531"
    probability: Tensor  # (), that a class is dropped in a step of this epoch

    class Config(MethodConfig):
        """The numbers of class dropping."""

        name: str = "dropclass"
        """dropclass."""
        suppression: NotNegative = 10.0
        """Weight of the dropped class's probability in the loss."""

    @staticmethod
    def build(config: Any, model: Classifier) -> Classifier:
        """Return the model with a drop branch."""
        if not isinstance(model.head, LinearHead) or not model.head.is_linear:
            raise UserError(
                "method.name=dropclass needs rows of a linear head: set model.head=linear"
            )
        return DropClassifier(model.backbone, model.head, model.head.weight.shape[1])

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if not self.criterion.is_linear:
            raise UserError(
                f"method.name=dropclass leaves labels out, which loss.name={self.task.loss.name} "
                "does not know: set loss.name=balanced-ce"
            )
        self.register_buffer("probability", torch.zeros(()))

    def begin(self, epoch: int) -> Hashable:
        """Set the probability that a class is dropped."""
        self.probability.fill_(epoch / self.task.epochs)
        return super().begin(epoch)

    def forward(
        self,
        images: Tensor,
        target: Tensor,
        target_b: Tensor | None = None,
        mix: Tensor | None = None,
    ) -> Step:
        """Return the step; see `Base.forward`."""
        classes = len(self.model.head.weight)
        drawn = torch.rand(2, device=images.device)
        dropped, is_dropped = (drawn[0] * classes).long(), drawn[1] < self.probability
        loss, logits = self.dropping(dropped, is_dropped, images, target, target_b, mix)
        return self.scored(loss, logits, target, target_b, mix)

    def dropping(
        self,
        dropped: Tensor,
        is_dropped: Tensor,
        images: Tensor,
        target: Tensor,
        target_b: Tensor | None = None,
        mix: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the loss (), and the logits (N, C) of the drop branch, for one class () int64.

        is_dropped: () bool, whether that class is dropped at all.
        """
        model: Any = self.model
        maps, rows = model.maps(images), model.head.weight
        plain = self.loss(model.head(model.pool(maps)), target, target_b, mix)
        importance = torch.where(is_dropped, importance_of(rows, dropped), importance_of(rows))
        logits = model.branch(maps, importance)
        others = [
            None if label is None else label.masked_fill(is_dropped & (label == dropped), IGNORED)
            for label in (target, target_b)
        ]
        without = self.loss(logits, others[0], others[1], mix)  # type: ignore[arg-type]
        suppressed = is_dropped * self.mean(logits.float().softmax(dim=1)[:, dropped])
        p = self.probability
        loss = (1 - p) * plain + p * without + self.config.suppression * suppressed
        return loss, logits

    @torch.no_grad()
    def predictor(self) -> Classifier:
        """Return the model with the importance of channels over all classes as they are."""
        model: Any = self.model
        model.importance.copy_(importance_of(model.head.weight))
        return model
