"""Classifiers of features that stand still: class means, nearest neighbours, linear probes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlt_kernels import ClassGraph, neighbor_silencing_loss

# of L2, the strongest first: each probe starts from the one before
STRENGTHS = (10.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4)
UNCHOSEN = 0.1  # where no class has an image to choose by
NEIGHBOURS = (1, 3, 5, 10, 20, 50)
TEMPERATURE = 0.07  # of the votes of neighbours, as in DINO
STEPS = 100  # of L-BFGS, at most
BLOCK = 2048  # rows whose similarities are held at a time


class Labelled(NamedTuple):
    """Features of images, and their classes."""

    features: Tensor  # (n, D) float32
    labels: Tensor  # (n,) int64

    def take(self, which: Tensor) -> "Labelled":
        """Those that a mask (n,) or indices name."""
        return Labelled(self.features[which], self.labels[which])


def nearest_mean(train: Labelled, features: Tensor, classes: int) -> Tensor:
    """Return scores (n, T): minus the squared distance to the mean of each class."""
    means = class_means(train, classes)
    return -torch.cdist(features, means).square()


def prototypes(train: Labelled, features: Tensor, classes: int) -> Tensor:
    """Return scores (n, T): the cosine to the mean of a class's features of length 1."""
    means = class_means(train._replace(features=F.normalize(train.features)), classes)
    return F.normalize(features) @ F.normalize(means).T


def class_means(train: Labelled, classes: int) -> Tensor:
    """Return the mean feature of each class, (T, D); 0 where it has no image."""
    sums = torch.zeros(classes, train.features.shape[1])
    sums.index_add_(0, train.labels, train.features)
    counts = torch.bincount(train.labels, minlength=classes).clamp(min=1)
    return sums / counts[:, None]


def nearest_neighbours(train: Labelled, features: Tensor, classes: int, k: int) -> Tensor:
    """Return scores (n, T): the votes of the k most alike training images, by their cosine."""
    return votes(F.normalize(train.features), train.labels, F.normalize(features), classes, k)


def choose_neighbours(train: Labelled, classes: int) -> int:
    """Return the number of neighbours with the best balanced accuracy, each training image judged
    by all others.
    """
    unit = F.normalize(train.features)
    usable = [k for k in NEIGHBOURS if k < len(unit)] or [1]
    found = {
        k: balanced_accuracy(votes(unit, train.labels, unit, classes, k, True), train.labels)
        for k in usable
    }
    return max(usable, key=lambda k: found[k])


def votes(
    known: Tensor, labels: Tensor, queries: Tensor, classes: int, k: int, leave_out: bool = False
) -> Tensor:
    """Return the votes (n, T) of the k known ones (m, D) that are most alike each query (n, D).

    All features are of length 1; labels (m,). A vote counts exp(cosine / 0.07). leave_out: queries
    are the known ones, none of which votes for itself.
    """
    parts = []
    for start in range(0, len(queries), BLOCK):
        alike = queries[start : start + BLOCK] @ known.T
        if leave_out:
            rows = torch.arange(len(alike))
            alike[rows, rows + start] = -torch.inf
        values, places = alike.topk(min(k, len(known)), dim=1)
        votes = torch.zeros(len(alike), classes)
        parts.append(votes.scatter_add_(1, labels[places], (values / TEMPERATURE).exp()))
    return torch.cat(parts)


class Probe(NamedTuple):
    """What a linear probe is trained with."""

    classes: int  # C, targets and auxiliaries
    log_prior: Tensor | None = None  # (C,)
    graph: ClassGraph | None = None
    silence: float = 1.0


def linear_probe(train: Labelled, probe: Probe, strength: float, start: Tensor) -> Tensor:
    """Return the weights (C, D + 1) of a linear classifier of standardised features, by L-BFGS.

    The last column is the bias. strength: of half the squared length of the weights. start: the
    weights that it begins with.
    """
    weights = start.clone().requires_grad_()
    features = with_one(train.features)
    optimiser = torch.optim.LBFGS(
        [weights], max_iter=STEPS, history_size=10, line_search_fn="strong_wolfe"
    )

    def objective() -> Tensor:
        optimiser.zero_grad()
        loss = neighbor_silencing_loss(
            features @ weights.T,
            train.labels,
            graph=probe.graph,
            log_prior=probe.log_prior,
            silence=probe.silence,
            backend="torch",
        )
        loss = loss + strength / 2 * weights[:, :-1].square().sum()
        loss.backward()
        return loss

    optimiser.step(objective)
    return weights.detach()


def choose_strength(train: Labelled, probe: Probe, targets: int, share: float = 0.2) -> float:
    """Return the strength with the best balanced accuracy on a share of each target class, at least
    one image of two or more, which the probes that are compared have not seen.
    """
    aside = set_aside(train.labels, targets, share)
    if not aside.any():
        return UNCHOSEN
    seen, held = train.take(~aside), train.take(aside)
    weights = torch.zeros(probe.classes, train.features.shape[1] + 1)
    found = {}
    for strength in STRENGTHS:
        weights = linear_probe(seen, probe, strength, weights)
        scores = with_one(held.features) @ weights[:targets].T
        found[strength] = balanced_accuracy(scores, held.labels)
    return max(STRENGTHS, key=lambda strength: found[strength])


def set_aside(labels: Tensor, targets: int, share: float) -> Tensor:
    """Return which images (n,) bool are held out: the last of each target class."""
    aside = torch.zeros(len(labels), dtype=torch.bool)
    for target in range(targets):
        own = (labels == target).nonzero().squeeze(1)
        if len(own) > 1:
            aside[own[-max(1, int(len(own) * share)) :]] = True
    return aside


def standardised(train: Tensor, others: Sequence[Tensor]) -> list[Tensor]:
    """Return features less the mean over the deviation of the training images, these first."""
    mean, deviation = train.mean(dim=0), train.std(dim=0).clamp(min=1e-6)
    return [(features - mean) / deviation for features in (train, *others)]


def with_one(features: Tensor) -> Tensor:
    """Return features (n, D + 1), with a last one that is 1."""
    return F.pad(features, (0, 1), value=1.0)


def balanced_accuracy(scores: Tensor, labels: Tensor) -> float:
    """Return the mean over the classes that occur of the share of right predictions."""
    right = (scores.argmax(dim=1) == labels).float()
    counts = torch.bincount(labels, minlength=scores.shape[1])
    sums = torch.zeros(scores.shape[1]).index_add_(0, labels, right)
    return float((sums[counts > 0] / counts[counts > 0]).mean())
