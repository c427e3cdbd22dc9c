"""Images that look as if they were of another class: by their neighbours, and by confident learning
(Northcutt et al. 2021, arXiv 1911.00068).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlt.evaluation.probe import Labelled, votes

NEIGHBOURS = 10  # that vote about an image
NOT_SUSPECTED = -1


class Suspects(NamedTuple):
    """What is suspected of n images."""

    instead: Tensor  # (n,) int64, the class that an image looks like; -1: its own
    confidence: Tensor  # (n,) float32, the share of the votes for that class

    @property
    def places(self) -> Tensor:
        """The suspected images, the surest first."""
        found = (self.instead != NOT_SUSPECTED).nonzero().flatten()
        return found[self.confidence[found].argsort(descending=True, stable=True)]


def probabilities(images: Labelled, classes: int, k: int = NEIGHBOURS) -> Tensor:
    """Return the probabilities (n, C) of each image's classes by the votes of its k nearest
    neighbours, itself left out.
    """
    unit = F.normalize(images.features)
    found = votes(unit, images.labels, unit, classes, k, leave_out=True)
    return found / found.sum(dim=1, keepdim=True).clamp(min=1e-12)


def confident(labels: Tensor, found: Tensor) -> Suspects:
    """Return the images that are confidently of another class than their label (n,) says.

    found (n, C): probabilities that no image has a part in itself. A class is confident of an image
    where its probability is at least the mean that it has for images labelled so; of several the
    most probable counts. Of classes with one image there is no such mean, and they suspect nothing.
    """
    classes = found.shape[1]
    counts = torch.bincount(labels, minlength=classes)
    own = found.gather(1, labels[:, None]).squeeze(1)
    sums = torch.zeros(classes).index_add_(0, labels, own)
    threshold = torch.where(counts > 1, sums / counts.clamp(min=1), torch.inf)
    is_confident = (found >= threshold) & (found > 0)
    best = found.masked_fill(~is_confident, -1.0).max(dim=1)
    is_other = is_confident.any(dim=1) & (best.indices != labels)
    instead = torch.where(is_other, best.indices, NOT_SUSPECTED)
    return Suspects(instead, torch.where(is_other, best.values, 0.0))
