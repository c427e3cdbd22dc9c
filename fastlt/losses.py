"""The loss zoo: thin over fastlt_kernels, each loss a short function with its source.

Every loss takes logits (N, C) and targets (N,) and gives a scalar; those that are linear in the
label take mixed labels too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from fastlt.classes import ClassSpace
from fastlt.config import LINEAR_LOSSES, LossConfig
from fastlt.errors import UserError
from fastlt.models.classifier import Classifier, CosineHead, LinearHead
from fastlt_kernels import (
    ClassGraph,
    ClassParallelLinear,
    LossOutput,
    class_parallel_outputs,
    linear_neighbor_silencing_outputs,
    neighbor_silencing_outputs,
)

# below, the logits of a batch are small and a plain product is at least as fast
FUSE_FROM_CLASSES = 4096


def check_counts(config: LossConfig, space: ClassSpace, counts: Tensor) -> None:
    """Losses that divide by the number of images of a class, or take its logarithm, need one of
    each.
    """
    needs = {"ldam": "margin", "class-balanced": "weight"}
    needs |= {"balanced-ce": "prior", "neighbor-silencing": "prior"} if config.tau else {}
    if config.name in needs and (counts == 0).any():
        name = space.names[int((counts == 0).nonzero()[0])]
        raise UserError(
            f"'{name}' has no training image in an epoch, so loss.name={config.name} has no "
            f"{needs[config.name]} for it: "
            "give it a data.budgets above 0, or pack without it"
        )


def log_prior(counts: Tensor, tau: float) -> Tensor:
    """tau * log(n_j / sum(n)), (C,) float32; counts (C,) are images per epoch, as sampled.

    Zero counts are an error.
    """
    if (counts == 0).any():
        raise UserError(
            f"class {int((counts == 0).nonzero()[0])} has no training image, so it has no prior: "
            "remove the class"
        )
    return tau * torch.log(counts.double() / counts.sum()).float()


def effective_number_weights(counts: Tensor, beta: float) -> Tensor:
    """Class weights (1 - beta) / (1 - beta^n), scaled to a mean of 1 (Cui et al. 2019, arXiv
    1901.05555). counts (C,).
    """
    weights = (1 - beta) / (1 - beta ** counts.double())
    return (weights * len(counts) / weights.sum()).float()


def focal(logits: Tensor, target: Tensor, *, gamma: float) -> Tensor:
    """Mean of (1 - p_y)^gamma * CE (Lin et al. 2017, arXiv 1708.02002)."""
    ce = F.cross_entropy(logits.float(), target, reduction="none")
    # the gradient of 0 ** gamma is not finite for gamma below 1
    missing = (1 - torch.exp(-ce)).clamp(min=1e-8)
    return (missing**gamma * ce).mean()


def weighted_ce(logits: Tensor, target: Tensor, *, weights: Tensor | None) -> Tensor:
    """Cross entropy with a weight per class, divided by the sum of the weights in the batch (as
    torch does), of all ranks.
    """
    if weights is None or not dist.is_initialized():
        return F.cross_entropy(logits.float(), target, weight=weights)
    total = weights[target].sum()
    dist.all_reduce(total)
    return F.cross_entropy(logits.float(), target, weight=weights, reduction="sum") * (
        dist.get_world_size() / total
    )


def margins(counts: Tensor, max_margin: float) -> Tensor:
    """LDAM's margin per class, n^(-1/4) scaled so that the rarest has max_margin (Cao et al. 2019,
    arXiv 1906.07413).
    """
    raw = counts.double() ** -0.25
    return (raw * max_margin / raw.max()).float()


def ldam(
    logits: Tensor, target: Tensor, *, margin: Tensor, scale: float, weights: Tensor | None
) -> Tensor:
    """Logits are `scale * cos`; the true class loses scale * margin_y before the cross entropy
    (arXiv 1906.07413, eq. 13).
    """
    lowered = (
        logits.float() - F.one_hot(target, logits.shape[1]) * (scale * margin[target])[:, None]
    )
    return weighted_ce(lowered, target, weights=weights)


def smoothing_by_class(counts: Tensor, head: float, tail: float) -> Tensor:
    """What label-aware smoothing takes from each class:

    `head` of the most frequent, `tail` of the rarest, a quarter sine between (MiSLAS, arXiv
    2104.00466, eq. 6). counts (C,).
    """
    n = counts.double()
    share = (n - n.min()) / (n.max() - n.min()).clamp(min=1)
    return (tail + (head - tail) * torch.sin(share * torch.pi / 2)).float()


def label_aware_smoothing(logits: Tensor, target: Tensor, *, smoothing: Tensor) -> Tensor:
    """Cross entropy that takes smoothing_y from the true class and spreads it over the others
    (arXiv 2104.00466, eq. 4 and 5).
    """
    taken = smoothing[target]
    log_p = logits.float().log_softmax(dim=1)
    of_true = log_p.gather(1, target[:, None]).squeeze(1)
    of_others = (log_p.sum(dim=1) - of_true) / (logits.shape[1] - 1)
    return -((1 - taken) * of_true + taken * of_others).mean()


class Step(NamedTuple):
    """The loss of a batch, and how many of its target images the model got right in the same pass;
    each ().
    """

    loss: Tensor
    correct: Tensor  # of mixed labels, the share of the one that was predicted
    counted: Tensor  # labels that are targets; auxiliaries are not predicted


@dataclass(frozen=True)
class Criterion:
    """Model and labels to loss."""

    of_logits: Callable[..., Tensor | LossOutput]
    num_targets: int
    # never makes the (N, C) logits; where that pays
    of_features: Callable[..., LossOutput] | None = None

    def step(
        self,
        model: Classifier,
        images: Tensor,
        target: Tensor,
        target_b: Tensor | None,
        mix: Tensor | None,
    ) -> Step:
        """images (N, 3, H, W), target and target_b (N,), mix () or (N,)."""
        mixed = {} if target_b is None else {"target_b": target_b, "mix": mix}
        if self.of_features is not None:
            features = model.backbone(images)
            output = self.of_features(
                features, model.head.weight, target, bias=model.head.bias, **mixed
            )
            return self._scored(output.loss, output.prediction, target, target_b, mix)
        logits = model(images)
        result = self.of_logits(logits, target, **mixed)
        if isinstance(result, LossOutput):
            return self._scored(result.loss, result.prediction, target, target_b, mix)
        return self._scored(
            result, logits.detach()[:, : self.num_targets].argmax(dim=1), target, target_b, mix
        )

    def _scored(
        self,
        loss: Tensor,
        prediction: Tensor,
        target: Tensor,
        target_b: Tensor | None,
        mix: Tensor | None,
    ) -> Step:
        counted = (target < self.num_targets).float()
        correct = counted * (prediction == target)
        if target_b is not None and mix is not None:
            counted_b = (target_b < self.num_targets).float()
            correct = mix * correct + (1 - mix) * counted_b * (prediction == target_b)
            counted = mix * counted + (1 - mix) * counted_b
        return Step(loss, correct.sum(), counted.sum())


def in_drw(config: LossConfig, epoch: int) -> bool:
    """Deferred re-weighting (arXiv 1906.07413): the classes are weighted from `drw_epoch` on."""
    return 0 < config.drw_epoch <= epoch


def build_criterion(
    config: LossConfig,
    space: ClassSpace,
    counts: Tensor,
    model: Classifier,
    drw: bool,
    device: torch.device,
) -> Criterion:
    """The configured loss. counts (C,) are images per epoch; `drw` tells whether the epoch is one
    of deferred re-weighting.

    Raises UserError where silencing was asked for but silences nothing.
    """
    check_counts(config, space, counts)
    if config.name in LINEAR_LOSSES:
        return _linear_in_the_label(config, space, counts, model, device)
    weights = None
    if drw or config.name == "class-balanced":
        weights = effective_number_weights(counts, config.beta).to(device)
    if config.name == "focal":
        return Criterion(partial(focal, gamma=config.gamma), space.num_targets)
    if config.name == "class-balanced":
        return Criterion(partial(weighted_ce, weights=weights), space.num_targets)
    if config.name == "label-aware-smoothing":
        # of whom there is enough: the second stage samples all alike
        stored = torch.tensor(space.train_counts)
        smoothing = smoothing_by_class(stored, config.smooth_head, config.smooth_tail).to(device)
        return Criterion(partial(label_aware_smoothing, smoothing=smoothing), space.num_targets)
    assert isinstance(model.head, CosineHead)  # the configuration was refused otherwise
    margin = margins(counts, config.max_margin).to(device)
    return Criterion(
        partial(ldam, margin=margin, scale=model.head.scale, weights=weights), space.num_targets
    )


def _linear_in_the_label(
    config: LossConfig, space: ClassSpace, counts: Tensor, model: Classifier, device: torch.device
) -> Criterion:
    silent = silencing_graph(config, space)
    options: dict[str, Any] = {
        "num_targets": space.num_targets,
        "graph": silent.to(device) if silent is not None else None,
        "log_prior": None
        if config.name == "ce" or config.tau == 0
        else log_prior(counts, config.tau).to(device),
        "silence": config.silence if silent is not None else 1.0,
        "label_smoothing": config.label_smoothing,
    }
    if isinstance(model.head, ClassParallelLinear):
        of_features: Callable[..., LossOutput] = partial(
            class_parallel_outputs, num_classes=space.num_classes, **options
        )
        return Criterion(
            partial(neighbor_silencing_outputs, **options), space.num_targets, of_features
        )
    fuse = type(model.head) is LinearHead and space.num_classes >= FUSE_FROM_CLASSES
    fused = partial(linear_neighbor_silencing_outputs, **options) if fuse else None
    return Criterion(partial(neighbor_silencing_outputs, **options), space.num_targets, fused)


def silencing_graph(config: LossConfig, space: ClassSpace) -> ClassGraph | None:
    """The graph whose rows are the silenced sets, or None where the loss does not silence.

    Silencing that was asked for and finds no pair is an error: the release's ablations silenced
    nothing without noticing.
    """
    if config.name != "neighbor-silencing" or config.silence == 1.0:
        return None
    graph = space.graph()
    if config.few_shot_below:
        stored = torch.tensor(space.train_counts[: space.num_targets])
        graph = graph.restricted(stored < config.few_shot_below)
    graph = graph.directed(config.directions)
    if graph.indices.numel() == 0:
        raise UserError(
            f"loss.silence={config.silence} asks for silencing, but no pair of classes is "
            "silenced: pack auxiliaries with pairs, "
            "relax loss.few_shot_below, or choose loss.name=balanced-ce"
        )
    return graph
