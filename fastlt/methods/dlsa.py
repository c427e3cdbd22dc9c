"""A flow sorts features into clusters; likely ones get a classifier that knows their cluster."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlt.config import Count, MethodConfig, NotNegative, Positive, Several, Share
from fastlt.errors import UserError
from fastlt.losses import Step
from fastlt.methods.method import OWN_SCHEDULE, Base, Stage, StageData
from fastlt.models.classifier import Classifier
from fastlt.models.flows import Flow
from fastlt.models.heads import Head, LinearHead
from fastlt.models.pretrained import load_backbone
from fastlt.models.start import start_from_file

NEVER = torch.finfo(torch.float32).max  # a threshold; of infinities an average would be NaN
AT_ONCE = 8192  # features that a flow is given together
DECAY = 0.7  # of the running mean of posteriors


class Level(nn.Module):
    """A flow, and the cluster-aided classifier of what it finds likely."""

    threshold: Tensor  # (), of log p(x), from which on features are routed to the classifier
    biases: Tensor  # (K, C), of each cluster: what the classifier makes of its class frequencies

    def __init__(self, flow: Flow, rows: Tensor, biases: Tensor, threshold: Tensor) -> None:
        super().__init__()
        self.flow, self.rows = flow, nn.Parameter(rows.detach().clone())
        self.register_buffer("biases", biases)
        self.register_buffer("threshold", threshold)


class AlignedClassifier(Classifier):
    """A classifier that routes features to cluster-aided classifiers, or else to the head."""

    predicts_by_head = False

    def __init__(self, backbone: nn.Module, head: Head, levels: list[Level]) -> None:
        super().__init__(backbone, head)
        self.levels: Any = nn.ModuleList(levels)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, C) of images (N, 3, H, W); while it trains, those of the head."""
        features = self.backbone(images)
        if self.training:
            return self.head(features)
        tables = [level.biases for level in self.levels]
        return self.routed(features, *self.routes(features, len(tables)), tables)

    def routes(self, features: Tensor, levels: int) -> tuple[Tensor, Tensor]:
        """Return the level (N,) of features, and their cluster there (N,), by the first levels.

        Features (N, D) that none of them takes have the number of all levels.
        """
        # not len(features), by which an exported model would be of one batch size
        route = torch.full((features.shape[0],), len(self.levels), device=features.device)
        cluster = torch.zeros_like(route)
        for number in reversed(range(levels)):
            likelihood, posterior = self.levels[number].flow(features)
            goes = likelihood >= self.levels[number].threshold
            route = torch.where(goes, number, route)
            cluster = torch.where(goes, posterior.argmax(dim=1), cluster)
        return route, cluster

    def routed(self, features: Tensor, route: Tensor, cluster: Tensor, tables: Any) -> Tensor:
        """Return the logits (N, C) of features (N, D), each by the classifier of its route (N,).

        tables: of each level the biases (K, C) of its clusters.
        """
        logits = self.head(features)
        for number, (level, table) in enumerate(zip(self.levels, tables, strict=True)):
            aided = F.linear(features, level.rows) + table[cluster]
            logits = torch.where((route == number)[:, None], aided, logits)
        return logits

    def predicting(self, targets: int) -> "AlignedClassifier":
        """Return a model of the same backbone and flows with classifiers of the targets alone."""
        levels = [
            Level(level.flow, level.rows[:targets], level.biases[:, :targets], level.threshold)
            for level in self.levels
        ]
        model = AlignedClassifier(self.backbone, self.head.of_targets(targets), levels)
        return model.train(self.training)


class Method(Base):
    """Constructing balance from imbalance: distribution alignment by a flow, on frozen features.

    The paper's and its code's: the flow and its three losses, the filter by likelihood, the
    classifier that is aided by class frequencies of clusters, the recursion, and prediction by the
    same routing. Ours: the first stage, which trains the backbone by the configured loss unless a
    run is given; pairs of two classes come from class-balanced batches; fewer clusters for few
    features; limited scales and clipped gradients of the flow, whose last epoch is kept, not its
    best; norms of later flows see all features, not only what is left; each classifier is one
    linear map in place of a sum of two, starts from the head, and has the prior of all images, not
    of those that it takes; all are trained in one stage, by the configured loss.
    """

    PAPER = "Xu et al. 2022, arXiv 2208.02567"
    takes_row_weights = False  # its flows have weights of their own
    balance: Tensor  # (K,), running mean of the clusters' posteriors in a flow's stage
    steps: Tensor  # (), of that mean
    frequencies: Tensor  # (levels, K, C), shares of classes in the clusters of each level
    weights: Tensor  # (C,), by which classes count in the likelihood
    aids: Any  # of each level what its classifier makes of these shares

    class Config(MethodConfig):
        """The numbers of distribution alignment; weights are those of ImageNet-LT."""

        name: str = "dlsa"
        """dlsa."""
        backbone: str = ""
        """A finished RUN whose backbone and linear head are taken in place of a first stage."""
        depth: Several = 1
        """Levels of flows; the paper's 3 for its strongest features."""
        clusters: Count = 0
        """Clusters of a flow; 0: the paper's 500, or as many as there are features."""
        share: Share = 0.3
        """Share of the features of a level that its classifier takes, the most likely ones."""
        flow_epochs: Several = 50
        """Epochs of a flow."""
        flow_rate: Positive = 0.2
        """Learning rate of a flow."""
        classifier_epochs: Several = 150
        """Epochs of the classifiers."""
        classifier_rate: Positive = 0.01
        """Learning rate of the classifiers."""
        likelihood: NotNegative = 2.0
        """Weight of the likelihood, in which rare classes count more."""
        tail: NotNegative = 2.0
        """Exponent q of the inverse count by which a class counts."""
        balance: NotNegative = 1.0
        """Weight of even clusters."""
        purity: NotNegative = 0.02
        """Weight of two classes' being in different clusters."""

    @staticmethod
    def build(config: Any, model: Classifier) -> Classifier:
        """Return the model with levels that route nothing yet."""
        if type(model.head) is not LinearHead:
            raise UserError("method.name=dlsa has a head of its own: set model.head=linear")
        classes, width = model.head.weight.shape
        clusters = config.clusters or min(500, width)
        levels = [
            Level(
                Flow(width, clusters),
                torch.zeros(classes, width),
                torch.zeros(clusters, classes),
                torch.tensor(NEVER),
            )
            for _ in range(config.depth)
        ]
        return AlignedClassifier(model.backbone, model.head, levels)

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        classes = len(self.model.head.weight)
        levels: Any = self.model.levels
        clusters = len(levels[0].flow.centres)
        self.aids = nn.ModuleList(nn.Linear(classes, classes) for _ in levels)
        self.register_buffer("frequencies", torch.zeros(len(levels), clusters, classes))
        self.register_buffer("balance", torch.zeros(clusters))
        self.register_buffer("steps", torch.zeros(()))
        weights = class_weights(self.task.space.train_counts, self.config.tail)
        self.register_buffer("weights", weights, persistent=False)
        if self.config.backbone:
            self.start_from(self.config.backbone)

    def start_from(self, place: str) -> None:
        """Take backbone and head of a finished run; rows of auxiliaries stay as they are."""
        start, path = self.finished(place)
        if type(start.head) is not LinearHead:
            raise UserError(f"{path} has no linear head: name a run of model.head=linear")
        load_backbone(self.model.backbone, path)
        start_from_file(self.model.head, path)

    def stages(self) -> list[Stage]:
        """Return the stages of the backbone, unless given, of each flow, and of the classifiers."""
        config = self.config
        common = {
            "data.target_sampling": "class-balanced",
            "optim.name": "sgd",
            "optim.momentum": 0.0,
            "optim.nesterov": False,
            "optim.lr_base_batch": 0,
            "optim.layer_decay": 1.0,
            "optim.max_norm": 1.0,
            **OWN_SCHEDULE,
            "schedule.final_lr": 1.0,  # constant
        }
        flow = {
            "train.epochs": config.flow_epochs,
            "train.eval_every": config.flow_epochs,  # what predicts stands still meanwhile
            "optim.lr": config.flow_rate,
            "optim.clip": 1.0,
        }
        last = {
            "train.epochs": config.classifier_epochs,
            "optim.lr": config.classifier_rate,
            "data.target_sampling": "once",
        }
        rows = tuple(f"model.levels.{number}.rows" for number in range(config.depth))
        flows = [
            Stage(f"flow {n + 1}", {**common, **flow}, (f"model.levels.{n}.flow.",), True)
            for n in range(config.depth)
        ]
        heads = Stage("classifiers", {**common, **last}, ("model.head.", "aids.", *rows), True)
        first = Stage("backbone", trained=("model.backbone.", "model.head."))
        return [*flows, heads] if config.backbone else [first, *flows, heads]

    @property
    def level(self) -> int:
        """The number of the flow that is trained; -1: the backbone, `depth`: the classifiers."""
        return self.stage - (0 if self.config.backbone else 1)

    @torch.no_grad()
    def start_stage(self, data: StageData) -> None:
        """Set the threshold of the flow before; with the last one, what the classifiers need."""
        self.balance.zero_()
        self.steps.zero_()
        if self.level < 1:
            return
        model: Any = self.model
        was_training = model.training
        model.eval()
        features, labels = data.features(), data.labels
        left, likelihood = self.likelihoods(features, self.level - 1)
        model.levels[self.level - 1].threshold.fill_(
            threshold_of(likelihood[left], self.config.share)
        )
        if self.level == self.config.depth:
            for number, level in enumerate(model.levels):
                level.rows.copy_(model.head.weight)
                self.aids[number].weight.zero_()
                self.aids[number].bias.copy_(model.head.bias)
                self.frequencies[number] = self.frequencies_of(features, labels, number)
        model.train(was_training)

    def likelihoods(self, features: Tensor, number: int) -> tuple[Tensor, Tensor]:
        """Return which features (n, D) the levels before leave, (n,) bool, and their log p(x)."""
        model: Any = self.model
        left, found = [], []
        for part in features.split(AT_ONCE):
            part = part.to(self.balance.device)
            left.append(model.routes(part, number)[0] == self.config.depth)
            found.append(model.levels[number].flow(part)[0])
        return torch.cat(left), torch.cat(found)

    def frequencies_of(self, features: Tensor, labels: Tensor, number: int) -> Tensor:
        """Return the shares (K, C) of classes in each cluster, of features that a level takes.

        Where a cluster has none, they are those of all features that the level takes.
        """
        model: Any = self.model
        counts = torch.zeros_like(self.frequencies[number])
        for part, label in zip(features.split(AT_ONCE), labels.split(AT_ONCE), strict=True):
            route, cluster = model.routes(part.to(counts.device), self.config.depth)
            taken = route == number
            place = cluster[taken] * counts.shape[1] + label.to(counts.device)[taken]
            counts += torch.bincount(place, minlength=counts.numel()).view_as(counts)
        whole = counts.sum(dim=0) + 1e-12
        counts = torch.where(counts.sum(dim=1, keepdim=True) > 0, counts, whole)
        return counts / counts.sum(dim=1, keepdim=True)

    def forward(
        self,
        images: Tensor,
        target: Tensor,
        target_b: Tensor | None = None,
        mix: Tensor | None = None,
    ) -> Step:
        """Return the step; after the first stage, `images` are features (N, D)."""
        if self.level < 0:
            return super().forward(images, target, target_b, mix)
        model: Any = self.model
        if self.level == self.config.depth:
            with torch.no_grad():
                route, cluster = model.routes(images, self.config.depth)
            logits = model.routed(images, route, cluster, self.tables())
            return self.scored(self.loss(logits, target), logits, target)
        with torch.no_grad():
            left = model.routes(images, self.level)[0] == self.config.depth
        loss = self.flow_loss(images, target, left)
        return self.scored(loss, model.head(images), target)

    def flow_loss(self, features: Tensor, labels: Tensor, left: Tensor) -> Tensor:
        """Return the loss () of a flow on features (N, D), of which `left` (N,) bool count."""
        config, model = self.config, self.model
        levels: Any = model.levels
        likelihood, posterior = levels[self.level].flow(features)
        counted = left.float()
        total = counted.sum().clamp(min=1)
        lost = (-likelihood * self.weights[labels] * counted).sum() / total
        mean = (posterior.exp() * counted[:, None]).sum(dim=0) / total
        self.steps += 1
        running = DECAY * self.balance + (1 - DECAY) * mean
        uneven = unevenness(running / (1 - DECAY**self.steps))
        with torch.no_grad():
            self.balance.copy_(running)
        # not randperm: the compiler takes indexing by one for something else
        other = torch.rand(len(features), device=features.device).argsort()
        apart = counted * counted[other] * (labels != labels[other])
        alike = (posterior.exp().detach() * posterior[other]).sum(dim=1)
        mixed = (alike * apart).sum() / apart.sum().clamp(min=1)
        return config.likelihood * lost + config.balance * uneven + config.purity * mixed

    def tables(self) -> list[Tensor]:
        """Return what the frequencies of each level's clusters add to its logits, (K, C) each."""
        return [aid(of) for aid, of in zip(self.aids, self.frequencies, strict=True)]

    @torch.no_grad()
    def predictor(self) -> Classifier:
        """Return the model that routes, or before the classifiers' stage the plain one."""
        model: Any = self.model
        if self.level < self.config.depth:
            return Classifier(model.backbone, model.head)
        for level, table in zip(model.levels, self.tables(), strict=True):
            level.biases.copy_(table)
        return model


def threshold_of(likelihood: Tensor, share: float) -> float:
    """Return the log p(x) from which on a share of features (n,) lies; NEVER where none is to."""
    count = round(share * len(likelihood))
    return float(likelihood.topk(count).values[-1]) if count else NEVER


def class_weights(counts: Any, exponent: float) -> Tensor:
    """Return (n_max / n_c)^q, (C,), divided by their sum; classes without images have 0."""
    n = torch.tensor(counts, dtype=torch.float32)
    weights = torch.where(n > 0, (n.max() / n.clamp(min=1)) ** exponent, 0.0)
    return weights / weights.sum()


def unevenness(mean: Tensor) -> Tensor:
    """Return log K + sum_k p_k log p_k, () of the clusters' mean posterior (K,): 0 where even."""
    p = mean + 1e-7
    return math.log(len(p)) + (p * p.log()).sum()
