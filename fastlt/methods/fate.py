"""A graph of images and classes predicts the rows of rare classes, and of new ones."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastlt.config import Count, MethodConfig, NotNegative, Several, Share
from fastlt.errors import UserError
from fastlt.losses import Step
from fastlt.methods.method import OWN_SCHEDULE, Base, Stage, StageData
from fastlt.models.classifier import Classifier
from fastlt.models.heads import LinearHead, with_values


class Nodes(NamedTuple):
    """The image nodes of the graph, M of them, each with its edges to classes."""

    values: Tensor  # (M, H) float32, features with a 1 at their end, H = D + 1
    linked: Tensor  # (M, 1 + m) int64, its own class and the classes of the nearest means
    weight: Tensor  # (M,) float32, 0 for what only fills a place


class RowGraph(nn.Module):
    """Graph convolutions without anything between them, from known rows (C, H) to all rows.

    Kipf and Welling 2017, arXiv 1609.02907, eq. 2, on the graph of images and classes. All maps
    start as the identity: from random ones, rows of unseen classes come out worse.
    """

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, width)
        self.layers: Any = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        for module in (self.project, *self.layers):
            nn.init.eye_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(self, rows: Tensor, nodes: Nodes, keep: Tensor) -> Tensor:
        """Return the rows (C, H) that the graph gives to classes whose known rows are `rows`.

        keep: (M, 1 + m), 0 for edges that are dropped.
        """
        classes = len(rows)
        image = torch.arange(classes, classes + len(nodes.values), device=rows.device)
        start = image[:, None].expand_as(nodes.linked).reshape(-1)
        end = nodes.linked.reshape(-1)
        weight = (keep * nodes.weight[:, None]).reshape(-1)
        x = torch.cat([rows, self.project(nodes.values)])
        for layer in self.layers:
            x = propagated(F.linear(x, layer.weight), start, end, weight) + layer.bias
        return x[:classes]


def propagated(x: Tensor, start: Tensor, end: Tensor, weight: Tensor) -> Tensor:
    """Return D^-1/2 (A + I) D^-1/2 x for nodes x (n, H) and undirected edges (E,) with a weight."""
    degree = torch.ones(len(x), dtype=x.dtype, device=x.device).index_add(0, start, weight)
    root = degree.index_add(0, end, weight).rsqrt()[:, None]
    x = x * root
    there = x.index_add(0, end, x[start] * weight[:, None])  # x itself is the edge to itself
    return root * there.index_add(0, start, x[end] * weight[:, None])


class Method(Base):
    """The image form of feature extrapolation, with classes as the embedded nodes.

    The paper's: a graph network without non-linearities is trained to give the embeddings of nodes
    that are hidden fold by fold, with dropped edges, and gives them to nodes that it never saw.
    There nodes are input features; that they are the rows of the head, linked through a few images
    of each class by label and by the nearest class means, is ours, and so is the weight kappa /
    (kappa + n) of a predicted row. The loss of all folds makes one step of the graph, as the
    paper's accumulated gradients do; the rows stand still meanwhile.
    """

    PAPER = "Wu et al. 2021, arXiv 2110.04514"
    values: Tensor  # (C, shots, H), features of images of each class, with a 1 at their end
    weight: Tensor  # (C, shots), 0 where a class has fewer images
    means: Tensor  # (C, H), of the features of all images
    linked: Tensor  # (C * shots, 1 + m) int64, the classes that each is linked to

    class Config(MethodConfig):
        """The numbers of the class graph; folds, layers, edges and rate are the paper's."""

        name: str = "fate"
        """fate."""
        graph_epochs: Several = 20
        """Epochs of the stage that trains the graph."""
        folds: Several = 5
        """Parts of the classes, each of which is hidden once in a step; at most one a class."""
        layers: Several = 4
        """Graph convolutions."""
        keep_edges: Share = 0.5
        """Share of the edges that a step keeps."""
        shots: Several = 8
        """Images of each class that are nodes of the graph."""
        nearest: Count = 2
        """Classes of the nearest means that an image is linked to besides its own."""
        kappa: NotNegative = 20.0
        """Images of a class at which its trained and its predicted row count alike; 0: the head as
        it was trained."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if not isinstance(self.model.head, LinearHead) or not self.model.head.is_linear:
            raise UserError("method.name=fate needs rows of a linear head: set model.head=linear")
        classes, width = self.model.head.weight.shape
        config = self.config
        self.folds = min(config.folds, classes)
        self.graph = RowGraph(width + 1, config.layers)
        self.register_buffer("values", torch.zeros(classes, config.shots, width + 1))
        self.register_buffer("weight", torch.zeros(classes, config.shots))
        self.register_buffer("means", torch.zeros(classes, width + 1))
        edges = 1 + min(config.nearest, classes - 1)
        linked = torch.zeros(classes * config.shots, edges, dtype=torch.int64)
        self.register_buffer("linked", linked)

    def stages(self) -> list[Stage]:
        """Return the stage of backbone and head, and that of the graph."""
        graph = {
            "train.epochs": self.config.graph_epochs,
            "data.target_sampling": "class-balanced",
            "optim.name": "adamw",
            "optim.nesterov": False,
            "optim.lr": 1e-3,
            "optim.lr_base_batch": 0,
            "optim.weight_decay": 0.0,
            "optim.layer_decay": 1.0,
            "optim.max_norm": 1.0,
            **OWN_SCHEDULE,
        }
        rows = Stage("rows", trained=("model.",))
        return [rows, Stage("graph", graph, trained=("graph.",), features=True)]

    def start_stage(self, data: StageData) -> None:
        """Take the nodes of the graph from the training images."""
        if self.stage == 0:
            return
        features = with_one(data.features())
        for label in range(len(self.means)):
            own = features[data.labels == label]
            shown = own[: self.config.shots]
            self.values[label, : len(shown)] = shown
            self.weight[label, : len(shown)] = 1
            self.means[label] = own.mean(dim=0) if len(own) else 0
        labels = torch.arange(len(self.means), device=self.means.device)
        labels = labels.repeat_interleave(self.config.shots)
        self.linked.copy_(
            links_of(self.values.flatten(0, 1), labels, self.means, self.config.nearest)
        )

    def rows(self) -> Tensor:
        """Return the rows of the head with their biases at the end, (C, H) float32."""
        head: Any = self.model.head
        return torch.cat([head.weight, head.bias[:, None]], dim=1).detach().float()

    def nodes(self) -> Nodes:
        """Return the image nodes of all classes."""
        return Nodes(self.values.flatten(0, 1), self.linked, self.weight.flatten())

    def predicted(self, rows: Tensor, hidden: Tensor, keep: Tensor, nodes: Nodes) -> Tensor:
        """Return rows (C, H) of which the hidden ones, (C,) bool, are those of the graph."""
        known = rows.masked_fill(hidden[:, None], 0)
        with torch.autocast(rows.device.type, enabled=False):
            found = self.graph(known, nodes, keep)
        return torch.where(hidden[:, None], found, rows)

    def forward(
        self,
        images: Tensor,
        target: Tensor,
        target_b: Tensor | None = None,
        mix: Tensor | None = None,
    ) -> Step:
        """Return the step; in the graph's stage `images` are features (N, D)."""
        if self.stage == 0:
            return super().forward(images, target, target_b, mix)
        rows, nodes, features = self.rows(), self.nodes(), with_one(images)
        order = torch.rand(len(rows), device=rows.device).argsort()
        losses = []
        for fold in range(self.folds):
            kept = torch.rand(nodes.linked.shape, device=rows.device) < self.config.keep_edges
            hidden = order % self.folds == fold
            mixed = self.predicted(rows, hidden, kept.float(), nodes)
            losses.append(self.loss(features @ mixed.T, target))
        return self.scored(torch.stack(losses).mean(), features @ rows.T, target)

    @torch.no_grad()
    def predictor(self) -> Classifier:
        """Return the model whose rows of rare classes lean towards those of the graph."""
        if self.stage == 0:
            return self.model
        rows, nodes = self.rows(), self.nodes()
        order, every = torch.arange(len(rows), device=rows.device), torch.ones_like(nodes.linked)
        predicted = rows
        for fold in range(self.folds):
            hidden = order % self.folds == fold
            found = self.predicted(rows, hidden, every.float(), nodes)
            predicted = torch.where(hidden[:, None], found, predicted)
        stored = torch.tensor(self.task.space.train_counts, device=rows.device)
        share = (self.config.kappa / (self.config.kappa + stored).clamp(min=1e-12))[:, None]
        return with_rows(self.model, (1 - share) * rows + share * predicted)

    @torch.no_grad()
    def new_rows(self, features: Tensor, labels: Tensor, classes: int) -> Tensor:
        """Return the rows (K, H) of K = `classes` classes that were never trained.

        They are given by the features (M, D) of a few images, labels (M,) from 0 to K - 1.
        """
        rows, nodes, added = self.rows(), self.nodes(), with_one(features)
        links = links_of(added, labels + len(rows), self.means, self.config.nearest)
        new = Nodes(added, links, torch.ones(len(added), device=added.device))
        both = Nodes(*(torch.cat(pair) for pair in zip(nodes, new, strict=True)))
        known = torch.cat([rows, rows.new_zeros(classes, rows.shape[1])])
        return self.graph(known, both, torch.ones_like(both.linked).float())[len(rows) :]


def with_one(features: Tensor) -> Tensor:
    """Return features (N, D) with a 1 at their end, for the bias, (N, D + 1) float32."""
    return F.pad(features.float(), (0, 1), value=1.0)


def links_of(values: Tensor, labels: Tensor, means: Tensor, nearest: int) -> Tensor:
    """Return the class of images (M, H) and those of the nearest means (C, H), (M, 1 + m) int64."""
    distance = torch.cdist(values, means)
    is_own = labels[:, None] == torch.arange(len(means), device=labels.device)
    others = distance.masked_fill(is_own, torch.inf)
    near = others.topk(min(nearest, len(means) - 1), dim=1, largest=False).indices
    return torch.cat([labels[:, None], near], dim=1)


def with_rows(model: Classifier, rows: Tensor) -> Classifier:
    """Return a model with a linear head of these rows (C, H), whose biases are at their end."""
    head = LinearHead(rows.shape[1] - 1, len(rows))
    return Classifier(model.backbone, with_values(head, rows[:, :-1], rows[:, -1]))
