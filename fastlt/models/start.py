"""What a head starts from: a file, vectors of the names of classes, or means of their features."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastlt.classes import ClassSpace
from fastlt.config import ModelConfig
from fastlt.errors import UserError
from fastlt.models.heads import BatchNormHead, CosineHead, Head
from fastlt.models.text import OPEN_CLIP, text_vectors
from fastlt.models.weight_files import read_weights, weights_file
from fastlt.utils.embeddings import read_embeddings

MEANS = "means"  # of `model.head_weights`
AT_MOST = 10_000  # images by which the scale of a start from means is chosen
SCALES = torch.logspace(-1, 3, 33)


def is_file(place: str) -> bool:
    """Return whether `model.head_weights` names a RUN or a file of weights."""
    return bool(place) and place != MEANS and not is_vectors(place)


def is_vectors(place: str) -> bool:
    """Return whether `model.head_weights` names vectors by the names of classes."""
    return place.endswith(".npz") or ".npz:" in place or place.startswith(OPEN_CLIP)


def start_head(head: Head, config: ModelConfig, space: ClassSpace | None) -> None:
    """Fill a head with what `model.head_weights` names.

    Means of features are left to `start_from_means`, for which images are needed. Raises UserError
    where it does not fit.
    """
    place = config.head_weights
    if is_vectors(place):
        if space is None:
            raise UserError(f"model.head_weights={place} needs the names of a pack's classes")
        fill_head(head, class_vectors(place, space, config.templates), None, place)
    elif is_file(place):
        start_from_file(head, weights_file(place))


def start_from_file(head: Head, path: Path) -> None:
    """Copy `weight` (T or C, D) and `bias` of a file into the first rows of a head.

    `head.weight` and `head.bias`, as a trained model has them, will do as well.
    """
    found = {name.removeprefix("head."): tensor for name, tensor in read_weights(path).items()}
    fill_head(head, found.get("weight"), found.get("bias"), str(path))


def class_vectors(place: str, space: ClassSpace, templates: Sequence[str]) -> Tensor:
    """Return the vectors (C, D) of all classes, each of length 1.

    place: `FILE.npz` or `FILE.npz:KEY`, such as CLIP's text features, or open-clip:MODEL/WEIGHTS.
    Raises UserError where a class has no vector.
    """
    if place.startswith(OPEN_CLIP):
        return text_vectors(place, space, templates)
    vectors = read_embeddings(place).of(space.names)
    known = [vector for vector in vectors if vector is not None]
    if missing := [n for n, vector in zip(space.names, vectors, strict=True) if vector is None]:
        more = f" and of {len(missing) - 1} more classes" if len(missing) > 1 else ""
        raise UserError(f"{place} has no vector of '{missing[0]}'{more}: add them to the file")
    return torch.from_numpy(np.stack(known)).float()


def fill_head(head: Head, rows: Tensor | None, bias: Tensor | None, place: str) -> None:
    """Copy rows (T or C, D), and a bias, into the first ones of a head.

    place: what they are from, for the UserError where they do not fit.
    """
    if (
        rows is None
        or rows.ndim != 2
        or rows.shape[1] != head.weight.shape[1]
        or len(rows) > len(head.weight)
    ):
        shape = "no `weight`" if rows is None else f"a weight of shape {tuple(rows.shape)}"
        raise UserError(
            f"{place} has {shape}; the head is {tuple(head.weight.shape)} and takes its first rows "
            "from it"
        )
    with torch.no_grad():
        head.weight[: len(rows)] = rows
        if bias is not None and head.bias is not None and not head.is_sharded:
            head.bias[: len(bias)] = bias


@torch.no_grad()
def start_from_means(head: Head, features: Tensor, labels: Tensor) -> None:
    """Fill a head with the means of the features (n, D) of each class; labels (n,) int64.

    A cosine head gets their directions. A linear one gets the classifier of normal distributions
    around the means, all as wide in all directions, whose logits are -s |x - m|^2 / 2 but for what
    all classes share; its s is the likeliest for the images, each left out of its own mean. A head
    with batch norm gets the statistics of the features, too. Classes without images keep their
    rows.
    """
    if head.is_sharded:
        raise UserError("model.head_weights=means is not for model.head=class-parallel")
    if isinstance(head, BatchNormHead):
        norm = head.norm
        norm.running_mean.copy_(features.mean(dim=0))  # type: ignore[union-attr]
        norm.running_var.copy_(features.var(dim=0))  # type: ignore[union-attr]
        features = (features - norm.running_mean) / (norm.running_var + norm.eps).sqrt()  # type: ignore[operator,union-attr]
    if isinstance(head, CosineHead):
        features = F.normalize(features, dim=1)
    counts = torch.bincount(labels, minlength=len(head.weight))
    means = features.new_zeros(head.weight.shape).index_add_(0, labels, features)
    means /= counts.clamp(min=1)[:, None]
    has_images = (counts > 0).to(head.weight.device)
    if isinstance(head, CosineHead):
        rows, bias = F.normalize(means, dim=1), None
    else:
        scale = likeliest_scale(features, labels, means, counts)
        rows, bias = scale * means, -scale / 2 * means.square().sum(dim=1)
    head.weight[has_images] = rows.to(head.weight.device)[has_images]
    if bias is not None:
        head.bias[has_images] = bias.to(head.weight.device)[has_images]


def likeliest_scale(features: Tensor, labels: Tensor, means: Tensor, counts: Tensor) -> float:
    """Return the s of `start_from_means`; means (C, D), counts (C,) images of each class."""
    step = -(-len(labels) // AT_MOST)
    own = counts[labels] > 1
    features, labels = features[own][::step], labels[own][::step]
    if not len(labels):
        return 1.0
    distances = torch.cdist(features, means).square()
    distances[:, counts == 0] = torch.inf
    others = counts[labels].float()
    rows = torch.arange(len(labels))
    # to the mean of the others of its class
    distances[rows, labels] *= (others / (others - 1)).square()
    scales = SCALES / distances[rows, labels].mean().clamp(min=1e-12)
    losses = torch.stack([F.cross_entropy(-s * distances / 2, labels) for s in scales])
    return float(scales[losses.argmin()])
