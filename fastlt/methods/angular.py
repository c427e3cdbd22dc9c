"""Prediction by the angle between feature and row of the head, in two stages."""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlt.config import MethodConfig, Positive, Share
from fastlt.errors import UserError
from fastlt.losses import Step
from fastlt.methods.method import OWN_SCHEDULE, Base, Stage
from fastlt.models.classifier import Classifier
from fastlt.models.heads import Head, LinearHead

Form = Literal["linear", "cosine", "dot"]
EPSILON = 1e-6  # the slope of the arc cosine is infinite at -1 and 1


class AngularHead(Head):
    """A head whose logits fall with the angle between feature (N, D) and row of weight (C, D).

    Neither length counts, and there is no bias. form, of prediction: `linear`, scale * (pi / 2 -
    angle), or `cosine`, scale * cos(angle).
    """

    limits_rows = False

    def __init__(self, weight: Tensor, form: Form, scale: Tensor, learns_scale: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.scale = nn.Parameter(scale.detach().clone(), requires_grad=learns_scale)
        self.bias = None
        self.form = form

    @classmethod
    def build(cls, config: Any, features: int, classes: int) -> "AngularHead":
        """Return a new head; see `Head.build`."""
        start = LinearHead(features, classes).weight
        return cls(start, config.form, torch.tensor(config.scale), config.learn_scale)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, C) float32 of features (N, D), in the form of prediction."""
        return self.logits(x, self.form)

    def logits(self, x: Tensor, form: Form) -> Tensor:
        """Return the logits (N, C) of features (N, D) in a form; `dot`: their plain product.

        Angles and cosines are taken in float32 at least.
        """
        if form == "dot":
            return F.linear(x, self.weight)
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):
            rows = F.normalize(self.weight.to(dtype), dim=1)
            cosine = F.linear(F.normalize(x.to(dtype), dim=1), rows)
            return self.scale.to(dtype) * (cosine if form == "cosine" else of_angle(cosine))

    def of_targets(self, targets: int) -> "AngularHead":
        """Return a head with rows 0..T-1."""
        return AngularHead(self.weight[:targets], self.form, self.scale, self.scale.requires_grad)


def of_angle(cosine: Tensor) -> Tensor:
    """Return pi / 2 less the angle, in radians, of a cosine; the slope is finite everywhere."""
    return math.pi / 2 - torch.acos(cosine.clamp(-1 + EPSILON, 1 - EPSILON))


class Method(Base):
    """After the idea of prediction by the included angle, in the two-stage framework.

    What is the paper's: the head of frequent classes has longer rows, so a probability by the angle
    alone needs no re-balancing of rows; and it is used in two stages. The paper's modules and
    schedule could not be read: the form of the logits, the scale, and a second stage of a tenth of
    the epochs, with the backbone frozen, are ours. For a run that has finished, `fastlt eval RUN
    --post-hoc angular` predicts by the angle without any training.
    """

    PAPER = "Wang and Yan 2022, arXiv 2212.01565"

    class Config(MethodConfig):
        """The numbers of prediction by angle; all are ours."""

        name: str = "angular"
        """angular."""
        form: Literal["linear", "cosine"] = "linear"
        """Logits that predict, by the angle itself or, as a control, by its cosine."""
        first: Literal["angular", "dot"] = "angular"
        """Logits of the first stage: as those that predict, or the plain product without bias."""
        scale: Positive = 16.0
        """The factor on angles or cosines."""
        learn_scale: bool = False
        """Whether the factor is trained."""
        second_share: Share = 0.1
        """Epochs of the second stage, which trains the head alone, as a share of train.epochs; 0:
        no second stage."""
        balanced: bool = True
        """Whether the second stage draws every target class equally often."""

    @staticmethod
    def build(config: Any, model: Classifier) -> Classifier:
        """Return the model with an angular head of as many classes."""
        if type(model.head) is not LinearHead:
            raise UserError("method.name=angular has a head of its own: set model.head=linear")
        scale = torch.tensor(config.scale)
        head = AngularHead(model.head.weight, config.form, scale, config.learn_scale)
        return Classifier(model.backbone, head)

    def stages(self) -> list[Stage]:
        """Return the stage of all, and that of the head alone."""
        epochs = round(self.config.second_share * self.task.epochs)
        if self.config.second_share > 0:
            epochs = max(1, epochs)
        sampling = "class-balanced" if self.config.balanced else "once"
        second = {
            "train.epochs": epochs,
            "data.target_sampling": sampling,
            **OWN_SCHEDULE,
        }
        # the plain product has no scale to train
        without = ("model.backbone.", "model.head.weight")
        first = Stage("all", trained=without if self.config.first == "dot" else ("",))
        return [first, *([Stage("head", second, ("model.head.",))] if epochs else [])]

    def forward(
        self,
        images: Tensor,
        target: Tensor,
        target_b: Tensor | None = None,
        mix: Tensor | None = None,
    ) -> Step:
        """Return the step; see `Base.forward`."""
        head: Any = self.model.head
        first = self.stage == 0 and self.config.first == "dot"
        logits = head.logits(self.model.backbone(images), "dot" if first else self.config.form)
        return self.scored(self.loss(logits, target, target_b, mix), logits, target, target_b, mix)
