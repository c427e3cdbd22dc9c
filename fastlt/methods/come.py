"""Experts with last stages of their own, which teach each other and are weighed by a gate."""

import math
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlt.config import Count, MethodConfig, NotNegative, Positive, Several
from fastlt.errors import UserError
from fastlt.losses import Step, log_prior, silencing_graph
from fastlt.methods.method import Base
from fastlt.models.classifier import Classifier
from fastlt.models.experts import GatedHead, divide
from fastlt.models.heads import LinearHead


class Method(Base):
    """After the idea of CoMe, collaborative experts for long-tailed graphs, in a form for images.

    The paper's are its four parts: balanced contrastive learning, a loss of each expert among its
    hard classes, a gate over experts, and disentangled distillation between them. The formulas are
    those of BCL, NCL and DKD. Ours: that experts share a stem, how the parts are put together, and
    that hard classes are an expert's own and all others are left out of the sum (in NCL they are
    the first expert's, and other logits are put to 0).

    log n is the prior of the configured loss, where it has one. Silencing acts in the loss of each
    expert, among its hard classes and in the loss of the gate, but neither among what is contrasted
    nor in the distillation. Each rank contrasts its own images.
    """

    PAPER = "Yi et al. 2023, arXiv 2308.16609"
    SETTINGS = {"data.views": 2}  # noqa: RUF012
    ramp: Tensor

    class Config(MethodConfig):
        """The numbers of collaborative experts."""

        name: str = "come"
        """come."""
        experts: Several = 3
        """Experts, K."""
        spread: NotNegative = 0.1
        """Deviation between experts at the start, relative to each weight; ours."""
        hard: Count = 0
        """Hard classes, the label's included; 0: three in ten, as NCL's 30 on CIFAR-100."""
        contrast: NotNegative = 0.35
        """Weight of the contrastive part; BCL's."""
        contrast_temperature: Positive = 0.1
        """Temperature of the contrastive part; BCL's."""
        width: Several = 128
        """Width of the projections that are contrasted; ours."""
        distill: NotNegative = 0.6
        """Weight of the distillation; NCL's."""
        label_weight: NotNegative = 1.0
        """Weight in the distillation of the label against the other classes; DKD's."""
        others_weight: NotNegative = 1.0
        """Weight in the distillation of the other classes among each other; ours, for DKD's 8 goes
        with a stronger teacher."""
        temperature: Positive = 1.0
        """Temperature of the distillation; ours."""
        warmup_epochs: Count = 20
        """Epochs over which the distillation comes in; DKD's."""

    @staticmethod
    def build(config: Any, model: Classifier) -> Classifier:
        """Return the model with K last stages, K heads and a gate."""
        if type(model.head) is not LinearHead:
            raise UserError("method.name=come has heads of its own: set model.head=linear")
        divide(model.backbone, config.experts, config.spread)
        head = GatedHead.of_head(model.head, config.experts, config.spread)
        return Classifier(model.backbone, head)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        config, task = self.config, self.task
        classes, width = len(self.model.head.weight), self.model.head.weight.shape[1]
        width //= config.experts
        if config.hard > classes:
            raise UserError(f"method.hard={config.hard} of {classes} classes: set it lower")
        self.hard = config.hard or min(classes, max(2, round(0.3 * classes)))
        self.projectors = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, config.width))
            for _ in range(config.experts)
        )
        self.prototypes = nn.Parameter(torch.randn(config.experts, classes, config.width))
        self.register_buffer("ramp", torch.ones(()), persistent=False)
        has_prior = getattr(self.criterion, "has_prior", False) and task.loss.tau
        prior = log_prior(task.counts, task.loss.tau) if has_prior else torch.zeros(classes)
        self.prior = prior.to(task.device)
        graph = silencing_graph(task.loss, task.space)
        self.graph = None if graph is None else graph.to(task.device)
        self.log_silence = math.log(task.loss.silence) if task.loss.silence else -math.inf

    def begin(self, epoch: int) -> Hashable:
        """Set the weight of the distillation in an epoch; see `Base.begin`."""
        self.ramp.fill_(min(1.0, (epoch + 1) / max(1, self.config.warmup_epochs)))
        return super().begin(epoch)

    def forward(
        self,
        images: Tensor,
        target: Tensor,
        target_b: Tensor | None = None,
        mix: Tensor | None = None,
    ) -> Step:
        """Return the step; see `Base.forward`."""
        head: Any = self.model.head
        labels = (target, target_b, mix)
        features = self.model.backbone(images)
        each = head.each(features)
        fused = head.fused(features, each)
        loss = sum((self.loss(z, *labels) for z in each.unbind(1)), self.loss(fused, *labels))
        with torch.autocast(images.device.type, enabled=False):
            parts = features.float().chunk(self.config.experts, dim=1)
            views = [project(part) for project, part in zip(self.projectors, parts, strict=True)]
            added = self.added(each.float(), views, target)
            if target_b is not None and mix is not None:
                added = mix * added + (1 - mix) * self.added(each.float(), views, target_b)
        return self.scored(loss + self.mean(added), fused, *labels)

    def added(self, each: Tensor, views: list[Tensor], labels: Tensor) -> Tensor:
        """Return what is lost besides the configured loss, (N,), for labels (N,).

        each (N, K, C): logits of the experts; views: their projections, (N, width) each.
        """
        config, experts = self.config, each.unbind(1)
        weights = (config.label_weight, config.others_weight)
        loss = torch.zeros_like(each[:, 0, 0])
        for k, z in enumerate(experts):
            loss = loss + restricted(self.silenced(z, labels), self.prior, labels, self.hard)
            pulled = contrast(views[k], self.prototypes[k], labels, config.contrast_temperature)
            loss = loss + config.contrast / len(experts) * pulled
            for peer in [*experts[:k], *experts[k + 1 :]]:
                teacher = (peer + self.prior).detach()
                taught = distilled(z + self.prior, teacher, labels, weights, config.temperature)
                loss = loss + config.distill * self.ramp / (len(experts) - 1) * taught
        return loss

    def silenced(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return logits (N, C) with log(silence) added to the neighbours of labels (N,)."""
        if self.graph is None:
            return logits
        return torch.where(self.graph.silenced_by(labels), logits + self.log_silence, logits)


def restricted(logits: Tensor, prior: Tensor, labels: Tensor, count: int) -> Tensor:
    """Return cross entropy (N,) of logits + prior among the label and the highest other logits.

    They are `count` classes. After the hard category mining of NCL (Li et al. 2022, arXiv
    2203.15359).
    """
    ranked = logits.detach().scatter(1, labels[:, None], math.inf)
    adjusted = logits + prior
    hard = adjusted.gather(1, ranked.topk(count, dim=1).indices)
    return hard.logsumexp(dim=1) - adjusted.gather(1, labels[:, None]).squeeze(1)


def contrast(views: Tensor, prototypes: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Return the balanced contrastive loss (N,) of views (N, W) and prototypes (C, W) or (0, W).

    Of anchor i it is -mean_p [s_ip - log sum_{j != i} exp(s_ij) / m_j], where s are cosines over
    the temperature, p the others of its class, and m_j the entries of the class of j that are not i
    (BCL, Zhu et al. 2022, arXiv 2207.09052).
    """
    entries = F.normalize(torch.cat([views, prototypes]), dim=1)
    s = entries[: len(views)] @ entries.T / temperature
    classes = torch.cat([labels, torch.arange(len(prototypes), device=labels.device)])
    is_same = labels[:, None] == classes
    is_self = torch.eye(*s.shape, dtype=torch.bool, device=s.device)
    of_class = is_same.sum(dim=0) + min(1, len(prototypes))
    others = (of_class - is_same.long()).clamp(min=1)
    total = (s - others.log()).masked_fill(is_self, -math.inf).logsumexp(dim=1)
    positive = is_same & ~is_self
    mean = (s * positive).sum(dim=1) / positive.sum(dim=1).clamp(min=1)
    return torch.where(positive.any(dim=1), total - mean, 0.0)


def distilled(
    student: Tensor, teacher: Tensor, labels: Tensor, weights: tuple[float, float], t: float
) -> Tensor:
    """Return T^2 (w_0 TCKD + w_1 NCKD), (N,), of logits (N, C), with T the temperature `t`.

    TCKD is the divergence KL(teacher || student) of the label against all others, NCKD that of the
    others among each other (DKD, Zhao et al. 2022, arXiv 2203.08679, eq. 7).
    """
    is_label = F.one_hot(labels, student.shape[1]).bool()
    binary, among = [], []
    for logits in (teacher, student):
        log_p = (logits / t).log_softmax(dim=1)
        rest = log_p.masked_fill(is_label, -math.inf).logsumexp(dim=1, keepdim=True)
        binary.append(torch.cat([log_p.gather(1, labels[:, None]), rest], dim=1))
        among.append((log_p - rest).masked_fill(is_label, -1e9))  # that is, with probability 0
    tckd, nckd = ((p.exp() * (p - q)).sum(dim=1) for p, q in (binary, among))
    return t**2 * (weights[0] * tckd + weights[1] * nckd)
