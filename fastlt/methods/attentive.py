"""A classifier that routes positions of the feature map to classes, on a frozen backbone."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlt.config import BelowOne, MethodConfig, NotNegative, Positive, Several
from fastlt.errors import UserError
from fastlt.losses import Step, mean_of
from fastlt.methods.method import OWN_SCHEDULE, Base, Stage, StageData
from fastlt.models.classifier import Classifier
from fastlt.models.heads import Head, LinearHead, with_values
from fastlt.models.pretrained import load_backbone

BEFORE = ("routing", "ncm")  # whose head is no linear one, so the first stage has one of its own


class RoutingHead(Head):
    """A head with a capsule of q numbers for each class, whose length is the class's score.

    weight is (C, D, q): row o maps a position (D,) to its vote for class o.
    """

    limits_rows = False

    def __init__(
        self,
        classes: int,
        width: int,
        size: int,
        rounds: int,
        scale: float,
        dropout: float,
        unit: bool,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, width, size))
        self.bias = None
        self.options = (size, rounds, scale, dropout, unit)
        for row in self.weight:
            nn.init.xavier_uniform_(row)

    @classmethod
    def build(cls, config: Any, features: int, classes: int) -> "RoutingHead":
        """Return a new head; see `Head.build`."""
        options = (config.size, config.rounds, config.scale, config.dropout, config.unit_length)
        return cls(classes, features, *options)

    def forward(self, positions: Tensor) -> Tensor:
        """Return the logits (N, C) float32 of positions (N, I, D): scores times the scale."""
        return self.options[2] * self.scores(positions)

    def scores(self, positions: Tensor) -> Tensor:
        """Return the lengths (N, C) of the classes' capsules, from 0 to 1."""
        _, rounds, _, dropout, unit = self.options
        with torch.autocast(positions.device.type, enabled=False):
            x = F.normalize(positions.float(), dim=2) if unit else positions.float()
            x = F.dropout(x, dropout, self.training)
            return routed(x, self.weight, rounds).norm(dim=2)

    def of_targets(self, targets: int) -> "RoutingHead":
        """Return a head with the capsules of classes 0..T-1."""
        head = RoutingHead(targets, self.weight.shape[1], *self.options)
        return with_values(head, self.weight[:targets]).train(self.training)


def routed(x: Tensor, weight: Tensor, rounds: int) -> Tensor:
    """Return the capsules (N, C, q) of positions x (N, I, D) by agreement, weight (C, D, q).

    As in DeepKE's capsule classifier: the votes are u_oi = W_o' x_i; in every round the shares c
    are the softmax over classes of the agreement b, which is 0 at first and v_o u_oi then, not
    added up; and v_o = squash(sum_i c_oi u_oi). Votes are never held: the sum goes before the map.
    """
    # not len(x), by which an exported model would be of one batch size
    shares = x.new_full((x.shape[0], len(weight), x.shape[1]), 1 / len(weight))
    capsules = x.new_zeros(x.shape[0], len(weight), weight.shape[2])
    for number in range(rounds):
        if number:
            agreement = torch.einsum("odq,noq->nod", weight, capsules) @ x.transpose(1, 2)
            shares = agreement.softmax(dim=1)
        capsules = squash(torch.einsum("nod,odq->noq", shares @ x, weight))
    return capsules


def squash(v: Tensor) -> Tensor:
    """Return vectors (..., q) of the same direction and of length |v|^2 / (1 + |v|^2)."""
    square = v.square().sum(dim=-1, keepdim=True)
    return v * square / (1 + square) / (square + 1e-12).sqrt()


def margin_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Return max(0, 0.9 - s_y)^2 plus half the mean of max(0, s - 0.1)^2 of other classes, (N,).

    In Sabour et al. 2017, arXiv 1710.09829, eq. 4, it is their sum, which grows with the classes.
    """
    is_label = F.one_hot(labels, scores.shape[1]).bool()
    wrong = (scores - 0.1).clamp(min=0).square().masked_fill(is_label, 0)
    right = (0.9 - scores.gather(1, labels[:, None]).squeeze(1)).clamp(min=0).square()
    return right + 0.5 * wrong.sum(dim=1) / max(1, scores.shape[1] - 1)


class RoutingClassifier(Classifier):
    """A classifier whose head is given the positions of the feature map."""

    predicts_by_head = False

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, C) of images (N, 3, H, W)."""
        return self.head(self.positions(images))

    def positions(self, images: Tensor) -> Tensor:
        """Return the positions (N, h * w, D) of images."""
        return self.maps(images).flatten(2).transpose(1, 2)

    def predicting(self, targets: int) -> "RoutingClassifier":
        """Return a model that routes to the targets alone."""
        return RoutingClassifier(self.backbone, self.head.of_targets(targets))


class MeanHead(Head):
    """A head with scaled cosines between features and class means, the rows of weight (C, D)."""

    limits_rows = False

    def __init__(self, weight: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
        self.scale = nn.Parameter(scale.detach().clone())
        self.bias = None

    @classmethod
    def build(cls, config: Any, features: int, classes: int) -> "MeanHead":
        """Return a new head; see `Head.build`."""
        return cls(torch.zeros(classes, features), torch.tensor(config.scale))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits (N, C) of features (N, D)."""
        return self.scale * F.linear(F.normalize(x, dim=1), F.normalize(self.weight, dim=1))

    def of_targets(self, targets: int) -> "MeanHead":
        """Return a head with the means of classes 0..T-1."""
        return MeanHead(self.weight[:targets], self.scale)


class Method(Base):
    """After the idea of attentive relation routing, with the study of decoupled classifiers.

    The paper's: representations by instance-balanced sampling serve all classes, the classifier
    alone is to be adjusted, and it assigns soft weights. Its own formula could not be read: the
    routing is that of its authors' capsule classifier, on positions of the feature map. Ours: these
    are of length 1, and the configured loss takes the place of margins. The second stage,
    class-balanced with a frozen backbone, and its controls are those of Kang et al. 2020, arXiv
    1910.09217: `crt` (a new linear head), `tau-norm`, `ncm` (nearest class mean, by cosine) and
    `lws` (a factor per class).
    """

    PAPER = "Yu et al. 2020, arXiv 2009.07022"

    class Config(MethodConfig):
        """The numbers of the classifiers; rounds and dropout are DeepKE's, the others ours."""

        name: str = "attentive"
        """attentive."""
        classifier: Literal["routing", "crt", "tau-norm", "ncm", "lws"] = "routing"
        """What predicts in the end; crt is a new linear head."""
        start: str = ""
        """A finished RUN whose model is taken in place of a first stage."""
        epochs: Several = 10
        """Epochs of the second stage."""
        size: Several = 16
        """Numbers of a capsule."""
        rounds: Several = 5
        """Rounds of routing."""
        dropout: BelowOne = 0.3
        """Dropout of the positions that are routed."""
        unit_length: bool = True
        """Whether positions are of length 1 as they are routed: longer ones agree with one class
        alone after two rounds, and do not train at the rates of other heads."""
        loss: Literal["margin", "configured"] = "configured"
        """Loss of the routing: the configured one on scaled scores, or DeepKE's, of margins, which
        wants `unit_length` off and a tenth of the rate."""
        scale: Positive = 16.0
        """Factor on scores, and on cosines at their start."""
        tau: NotNegative = 1.0
        """Exponent of the length that rows are divided by, of tau-norm."""

    @staticmethod
    def build(config: Any, model: Classifier) -> Classifier:
        """Return the model with the head that predicts in the end."""
        if type(model.head) is not LinearHead:
            raise UserError("method.name=attentive has a head of its own: set model.head=linear")
        classes, width = model.head.weight.shape
        if config.classifier == "routing":
            return RoutingClassifier(model.backbone, RoutingHead.build(config, width, classes))
        if config.classifier == "ncm":
            return Classifier(model.backbone, MeanHead.build(config, width, classes))
        return model

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        config, head = self.config, self.model.head
        self.is_second = False
        if config.classifier in BEFORE:
            self.first = LinearHead(head.weight.shape[1], len(head.weight)).to(self.task.device)
        if config.classifier == "lws":
            self.factors = nn.Parameter(torch.ones(len(head.weight)))
        if config.start:
            self.take_start(config.start)

    def take_start(self, place: str) -> None:
        """Take backbone and rows of the targets from a finished run."""
        if self.config.classifier == "tau-norm":
            raise UserError(
                "tau-norm trains nothing on a finished run: use `fastlt eval RUN "
                "--post-hoc tau-norm`, or leave out method.start"
            )
        start, path = self.finished(place)
        load_backbone(self.model.backbone, path)
        if self.config.classifier == "lws" and type(start.head) is LinearHead:
            with torch.no_grad():
                self.model.head.weight[: len(start.head.weight)] = start.head.weight
                self.model.head.bias[: len(start.head.bias)] = start.head.bias

    def stages(self) -> list[Stage]:
        """Return the stage of the representation, unless given, and that of the classifier."""
        second = {
            "train.epochs": self.config.epochs,
            "data.target_sampling": "class-balanced",
            **OWN_SCHEDULE,
        }
        trained = {"lws": ("factors",), "ncm": ("model.head.scale",)}
        own = trained.get(self.config.classifier, ("model.head.",))
        head = "first." if self.config.classifier in BEFORE else "model.head."
        first = (
            [] if self.config.start else [Stage("representation", {}, ("model.backbone.", head))]
        )
        if self.config.classifier == "tau-norm":
            return first
        features = self.config.classifier == "ncm"
        return [*first, Stage("classifier", second, own, features)]

    def enter_stage(self, number: int, task: Any) -> None:
        """Take up the task of a stage; see `Base.enter_stage`."""
        super().enter_stage(number, task)
        self.is_second = bool(self.config.start) or number == 1

    @torch.no_grad()
    def start_stage(self, data: StageData) -> None:
        """Give cRT a new head, and ncm the means of the features."""
        if not self.is_second:
            return
        head: Any = self.model.head
        if self.config.classifier == "crt":
            nn.init.kaiming_normal_(head.weight)
            head.bias.zero_()
        if self.config.classifier == "ncm":
            features = F.normalize(data.features().float(), dim=1)
            for label in range(len(head.weight)):
                own = features[data.labels == label]
                head.weight[label] = own.mean(dim=0) if len(own) else 0

    def forward(
        self,
        images: Tensor,
        target: Tensor,
        target_b: Tensor | None = None,
        mix: Tensor | None = None,
    ) -> Step:
        """Return the step; see `Base.forward`."""
        model: Any = self.model
        labels = (target, target_b, mix)
        if not self.is_second:
            head = self.first if self.config.classifier in BEFORE else model.head
            logits = head(model.backbone(images))
        elif self.config.classifier == "lws":
            logits = self.factors * model.head(model.backbone(images))
        elif self.config.classifier == "ncm":
            logits = model.head(images)  # features
        elif self.config.classifier == "routing" and self.config.loss == "margin":
            scores = model.head.scores(model.positions(images))
            loss = margin_of(scores, *labels, row_weight=self.row_weight)
            return self.scored(loss, scores, *labels)
        else:
            logits = model(images)
        return self.scored(self.loss(logits, *labels), logits, *labels)

    @torch.no_grad()
    def predictor(self) -> Classifier:
        """Return the classifier of the stage, over the targets where it routes."""
        model, kind = self.model, self.config.classifier
        head: Any = model.head
        if not self.is_second and kind in BEFORE:
            return Classifier(model.backbone, self.first)
        if kind == "routing":
            return model.predicting(self.task.space.num_targets)
        if kind == "lws":
            rows = head.weight * self.factors[:, None], head.bias * self.factors
            return Classifier(model.backbone, with_values(LinearHead(*head.weight.T.shape), *rows))
        if kind == "tau-norm":
            rows = head.weight / head.weight.norm(dim=1, keepdim=True) ** self.config.tau
            new = LinearHead(*head.weight.T.shape)
            return Classifier(model.backbone, with_values(new, rows, torch.zeros_like(head.bias)))
        return model


def margin_of(
    scores: Tensor,
    target: Tensor,
    target_b: Tensor | None = None,
    mix: Tensor | None = None,
    row_weight: Tensor | None = None,
) -> Tensor:
    """Return the mean margin loss () of scores (N, C), mixed as the labels are.

    row_weight (N,): see `mean_of`.
    """
    losses = margin_loss(scores, target)
    if target_b is not None and mix is not None:
        losses = mix * losses + (1 - mix) * margin_loss(scores, target_b)
    return mean_of(losses, row_weight)
