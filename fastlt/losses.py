"""The losses: thin over fastlt_kernels, each with its source, its numbers and what it goes with.

A loss is a class below, listed in `LOSSES` under its `name`, which is what `loss.name` calls it. A
new one needs nothing else: keys of its own in the section [loss] are declared by its class
`Numbers`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from functools import cache, partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from fastlt.classes import ClassSpace
from fastlt.config import (
    BelowOne,
    Config,
    Count,
    LossConfig,
    NotNegative,
    Positive,
    Section,
    did_you_mean,
)
from fastlt.errors import UserError
from fastlt_kernels import (
    ClassGraph,
    LossOutput,
    class_parallel_outputs,
    linear_neighbor_silencing_outputs,
    neighbor_silencing_outputs,
)
from fastlt_kernels.graph import MASKS

# Below, the logits of a batch are small and a plain product is at least as fast.
FUSE_FROM_CLASSES = 4096
IGNORED = -100  # a label without a loss


class Task(NamedTuple):
    """What a loss or a method may know of what it is trained on."""

    space: ClassSpace
    """Names, pairs and training images of the classes; `num_targets` T and `num_classes` C."""
    counts: Tensor
    """Images of each class in an epoch, as sampled, (C,) int64."""
    loss: LossConfig
    """The section [loss] of the configuration, with the keys of all losses."""
    epochs: int
    """Epochs of the stage."""
    device: torch.device
    """The device that is trained on."""


class Step(NamedTuple):
    """The loss of a batch, and how many of its target images the model got right."""

    loss: Tensor
    """The mean loss, (), by the rows' weights where they have any."""
    correct: Tensor
    """Images of targets that were predicted right, (); of mixed labels, the share of that one."""
    counted: Tensor
    """Labels that are targets, (), as auxiliaries are not predicted."""


class Loss(ABC):
    """A loss of logits (N, C) and labels (N,), made for one task.

    head: the head whose logits it is given.
    """

    name: ClassVar[str]
    Numbers: ClassVar[type[Section]] = Section  # keys of [loss] that it adds
    is_linear: ClassVar[bool] = False  # in the label, so mixed and smoothed labels are defined
    takes_row_weights: ClassVar[bool] = False  # of data.class_weights and data.sample_weights
    silences: ClassVar[bool] = False  # neighbours, so it needs pairs
    head: ClassVar[str] = ""  # the only `model.head` that it goes with, and why; "": any
    head_reason: ClassVar[str] = ""

    def __init__(self, task: Task, head: Any) -> None:
        self.task = task
        check_counts(self, task)

    @classmethod
    def needs_of_counts(cls, config: LossConfig) -> str:
        """Return what the loss makes of a class's count of images, if 0 will not do; else ""."""
        return ""

    @classmethod
    def misfits(cls, config: Config) -> Iterator[tuple[bool, str]]:
        """Yield whether settings contradict what this loss says of them, and what to do about it.

        Every loss is asked, whichever `loss.name` names.
        """
        yield from ()

    @classmethod
    def prior_left(cls, config: LossConfig) -> float:
        """Return the power of the training prior that predictions keep: 0 where it balances them.

        Then the model answers as if all classes were equally frequent; with 1 as they were trained.
        """
        return 1.0

    def begin(self, epoch: int) -> Hashable:
        """Prepare for an epoch. What is compiled is kept as long as this returns the same."""
        return None

    @abstractmethod
    def of_logits(self, logits: Tensor, target: Tensor, **rows: Tensor | None) -> Any:
        """Return the mean loss () of a batch, or a LossOutput, which holds predictions as well.

        rows: target_b (N,) and mix () or (N,), for losses that are linear in the label; row_weight
        (N,), for those that take it, by which the rows' losses are multiplied before the mean.
        """

    # From features, rows and labels to a LossOutput, without the (N, C) logits; None: not possible.
    of_features: Callable[..., LossOutput] | None = None

    def step(
        self,
        model: Any,
        images: Tensor,
        target: Tensor,
        target_b: Tensor | None,
        mix: Tensor | None,
        row_weight: Tensor | None = None,
    ) -> Step:
        """Return the step of a Classifier on images (N, 3, H, W) and labels.

        target, target_b and row_weight (N,), mix () or (N,).
        """
        rows = rows_of(target_b, mix, row_weight)
        if self.of_features is not None:
            features = model.backbone(images)
            output = self.of_features(
                features, model.head.weight, target=target, bias=model.head.bias, **rows
            )
            return self.scored(output.loss, output.prediction, target, target_b, mix)
        logits = model(images)
        result = self.of_logits(logits, target, **rows)
        if isinstance(result, LossOutput):
            return self.scored(result.loss, result.prediction, target, target_b, mix)
        return self.scored(result, self.predicted(logits), target, target_b, mix)

    def predicted(self, logits: Tensor) -> Tensor:
        """Return the predicted targets (N,) of logits (N, C)."""
        return logits.detach()[:, : self.task.space.num_targets].argmax(dim=1)

    def scored(
        self,
        loss: Tensor,
        prediction: Tensor,
        target: Tensor,
        target_b: Tensor | None = None,
        mix: Tensor | None = None,
    ) -> Step:
        """Return the step of a loss () and predicted targets (N,)."""
        num_targets = self.task.space.num_targets
        counted = (target < num_targets).float()
        correct = counted * (prediction == target)
        if target_b is not None and mix is not None:
            counted_b = (target_b < num_targets).float()
            correct = mix * correct + (1 - mix) * counted_b * (prediction == target_b)
            counted = mix * counted + (1 - mix) * counted_b
        return Step(loss, correct.sum(), counted.sum())


# --- linear in the label


class CrossEntropy(Loss):
    """Cross entropy. Those below add a prior, and silence neighbours."""

    name = "ce"
    is_linear = True
    takes_row_weights = True
    has_prior: ClassVar[bool] = False

    def __init__(self, task: Task, head: Any) -> None:
        super().__init__(task, head)
        config, space, device = task.loss, task.space, task.device
        graph = silencing_graph(config, space)
        options: dict[str, Any] = {
            "num_targets": space.num_targets,
            "graph": graph.to(device) if graph is not None else None,
            "log_prior": log_prior(task.counts, config.tau).to(device)
            if self.has_prior and config.tau
            else None,
            "silence": config.silence if graph is not None else 1.0,
            "label_smoothing": config.label_smoothing,
        }
        self._of_logits: Callable[..., LossOutput] = partial(neighbor_silencing_outputs, **options)
        if head.is_sharded:
            parallel = partial(class_parallel_outputs, num_classes=space.num_classes, **options)
            self.of_features = partial(weighted_outputs, parallel, dist.get_world_size())
        elif head.is_linear and space.num_classes >= FUSE_FROM_CLASSES:
            linear = partial(linear_neighbor_silencing_outputs, **options)
            self.of_features = partial(weighted_outputs, linear, 1)

    @classmethod
    def needs_of_counts(cls, config: LossConfig) -> str:
        """Return that the prior takes the logarithm of counts."""
        return "prior" if cls.has_prior and config.tau else ""

    @classmethod
    def prior_left(cls, config: LossConfig) -> float:
        """Return what the prior, at its strength, leaves of the training's."""
        return 1.0 - config.tau if cls.has_prior else 1.0

    def of_logits(self, logits: Tensor, target: Tensor, **rows: Tensor | None) -> LossOutput:
        """Return the loss and the predictions of a batch; see `Loss.of_logits`."""
        return weighted_outputs(self._of_logits, 1, logits, target=target, **rows)


class BalancedCrossEntropy(CrossEntropy):
    """Cross entropy of logits plus tau times the log prior.

    Balanced Softmax (Ren et al. 2020, arXiv 2007.10740), logit adjustment (Menon et al. 2021, arXiv
    2007.07314, eq. 10).
    """

    name = "balanced-ce"
    has_prior = True


class NeighborSilencing(BalancedCrossEntropy):
    """Balanced cross entropy in which a label's neighbours count `silence` times.

    arXiv 2410.15980. With silence = 1 it is balanced cross entropy; with silence = 0 neighbours are
    left out.
    """

    name = "neighbor-silencing"
    silences = True


# --- others


class Focal(Loss):
    """The mean of (1 - p_y)^gamma * CE (Lin et al. 2017, arXiv 1708.02002)."""

    name = "focal"
    takes_row_weights = True

    class Numbers(Section):
        """The key of the focal loss."""

        gamma: NotNegative = 2.0
        """Exponent of the focal loss."""

    def of_logits(self, logits: Tensor, target: Tensor, **rows: Tensor | None) -> Tensor:
        """Return the mean loss () of a batch."""
        ce = F.cross_entropy(logits.float(), target, reduction="none")
        # the gradient of 0 ** gamma is not finite for gamma below 1
        missing = (1 - torch.exp(-ce)).clamp(min=1e-8)
        losses = missing**self.task.loss.gamma * ce  # type: ignore[attr-defined]
        return mean_of(losses, rows.get("row_weight"))


class EffectiveNumber(Section):
    """The key of losses that weigh classes by their effective number of images."""

    beta: BelowOne = 0.9999
    """Beta of the effective number of images: of class-balanced, and of LDAM's re-weighting."""


class ClassBalanced(Loss):
    """Cross entropy with weights by the effective number of images (arXiv 1901.05555)."""

    name = "class-balanced"
    takes_row_weights = True
    Numbers = EffectiveNumber

    def __init__(self, task: Task, head: Any) -> None:
        super().__init__(task, head)
        self.weights = effective_number_weights(task.counts, task.loss.beta).to(task.device)  # type: ignore[attr-defined]

    @classmethod
    def needs_of_counts(cls, config: LossConfig) -> str:
        """Return that weights divide by counts."""
        return "weight"

    @classmethod
    def prior_left(cls, config: LossConfig) -> float:
        """Return 0: weights balance the classes, if not exactly."""
        return 0.0

    def of_logits(self, logits: Tensor, target: Tensor, **rows: Tensor | None) -> Tensor:
        """Return the weighted mean loss () of a batch."""
        return weighted_ce(logits, target, self.weights, rows.get("row_weight"))


class LDAM(Loss):
    """Label-distribution-aware margins, with deferred re-weighting (Cao et al. 2019, arXiv
    1906.07413, eq. 13).
    """

    name = "ldam"
    takes_row_weights = True
    head = "cosine"
    head_reason = "as its margins are angles"

    class Numbers(EffectiveNumber):
        """The keys of LDAM."""

        max_margin: Positive = 0.5
        """Margin of the rarest class, with ldam."""
        drw_epoch: Count = 0
        """Re-weight the classes from this epoch on (DRW), with ldam; 0: never."""

    def __init__(self, task: Task, head: Any) -> None:
        super().__init__(task, head)
        config: Any = task.loss
        self.scale = head.scale
        self.margin = margins(task.counts, config.max_margin).to(task.device)
        self.weights: Tensor | None = None

    @classmethod
    def needs_of_counts(cls, config: LossConfig) -> str:
        """Return that margins divide by counts."""
        return "margin"

    @classmethod
    def prior_left(cls, config: LossConfig) -> float:
        """Return 0 where classes are re-weighted in the end."""
        numbers: Any = config
        return 0.0 if numbers.drw_epoch else 1.0

    @classmethod
    def misfits(cls, config: Config) -> Iterator[tuple[bool, str]]:
        """Yield that nothing else is re-weighted later."""
        loss: Any = config.loss
        yield (
            loss.drw_epoch > 0 and loss.name != cls.name,
            "loss.drw_epoch is for loss.name=ldam: set it to 0",
        )

    def begin(self, epoch: int) -> bool:
        """Weigh the classes from `drw_epoch` on; return whether they are."""
        config: Any = self.task.loss
        is_weighted = 0 < config.drw_epoch <= epoch
        weights = effective_number_weights(self.task.counts, config.beta)
        self.weights = weights.to(self.task.device) if is_weighted else None
        return is_weighted

    def of_logits(self, logits: Tensor, target: Tensor, **rows: Tensor | None) -> Tensor:
        """Return the loss () of a batch; logits are `scale * cos`.

        The true class loses scale * margin_y before the cross entropy.
        """
        margin = F.one_hot(target, logits.shape[1]) * (self.scale * self.margin[target])[:, None]
        return weighted_ce(logits.float() - margin, target, self.weights, rows.get("row_weight"))


class LabelAwareSmoothing(Loss):
    """Cross entropy that takes smoothing_y from the true class and spreads it over the others
    (MiSLAS, Zhong et al. 2021, arXiv 2104.00466, eq. 4 and 5).
    """

    name = "label-aware-smoothing"
    takes_row_weights = True

    class Numbers(Section):
        """The keys of label-aware smoothing."""

        smooth_head: BelowOne = 0.4
        """Label-aware smoothing of the most frequent class."""
        smooth_tail: BelowOne = 0.1
        """Label-aware smoothing of the rarest class."""

    def __init__(self, task: Task, head: Any) -> None:
        super().__init__(task, head)
        config: Any = task.loss
        # stored counts, not sampled ones: the second stage samples all classes alike
        stored = torch.tensor(task.space.train_counts)
        smoothing = smoothing_by_class(stored, config.smooth_head, config.smooth_tail)
        self.smoothing = smoothing.to(task.device)

    def of_logits(self, logits: Tensor, target: Tensor, **rows: Tensor | None) -> Tensor:
        """Return the mean loss () of a batch."""
        smoothing = self.smoothing[target]
        log_p = logits.float().log_softmax(dim=1)
        true = log_p.gather(1, target[:, None]).squeeze(1)
        others = (log_p.sum(dim=1) - true) / (logits.shape[1] - 1)
        return -mean_of((1 - smoothing) * true + smoothing * others, rows.get("row_weight"))


LOSSES: dict[str, type[Loss]] = {
    loss.name: loss
    for loss in (
        NeighborSilencing,
        BalancedCrossEntropy,
        CrossEntropy,
        Focal,
        ClassBalanced,
        LDAM,
        LabelAwareSmoothing,
    )
}


def build_loss(task: Task, head: Any) -> Loss:
    """Return the configured loss for logits of `head`.

    Raises UserError where a class has no image but the loss needs one, and where silencing was
    asked for but silences nothing.
    """
    return LOSSES[task.loss.name](task, head)


# --- the section [loss]


@cache
def section(method: str = "plain") -> type[LossConfig]:
    """Return the class of the section [loss]: with the keys of every loss."""
    found = dict.fromkeys(loss.Numbers for loss in LOSSES.values() if loss.Numbers is not Section)
    # one that another extends comes with that one
    numbers = [n for n in found if not any(n is not m and issubclass(m, n) for m in found)]
    doc = {"__doc__": LossConfig.__doc__, "__module__": __name__}
    return type("LossConfig", (*numbers, LossConfig), doc)


def misfits(config: Config) -> Iterator[tuple[bool, str]]:
    """Yield whether settings of [loss] contradict others, and what to do about it."""
    name, head = config.loss.name, config.model.head
    linear = ", ".join(loss.name for loss in LOSSES.values() if loss.is_linear)
    yield (
        name not in LOSSES,
        f"there is no loss '{name}'{did_you_mean(name, list(LOSSES))}: loss.name is one of "
        f"{', '.join(LOSSES)}",
    )
    mask = config.loss.mask
    yield (
        mask not in MASKS,
        f"there is no mask '{mask}'{did_you_mean(mask, list(MASKS))}: loss.mask is one of "
        f"{', '.join(MASKS)}",
    )
    loss = LOSSES.get(name, CrossEntropy)
    yield (
        loss.head not in ("", head),
        f"loss.name={name} needs model.head={loss.head}, {loss.head_reason}",
    )
    yield (
        head == "class-parallel" and not loss.is_linear,
        f"model.head=class-parallel does not go with loss.name={name}: choose one of {linear}",
    )
    for one in LOSSES.values():
        yield from one.misfits(config)
    mixes = bool(config.augment.mixup or config.augment.cutmix or config.loss.label_smoothing)
    yield (
        mixes and not loss.is_linear,
        f"loss.name={name} does not go with mixup, cutmix or label smoothing: switch them off",
    )
    weighs = bool(config.data.class_weights or config.data.sample_weights)
    taking = ", ".join(loss.name for loss in LOSSES.values() if loss.takes_row_weights)
    yield (
        weighs and not loss.takes_row_weights,
        f"loss.name={name} does not go with data.class_weights or data.sample_weights: leave them "
        f"out, or choose one of {taking}",
    )


# --- weights of rows


def rows_of(
    target_b: Tensor | None, mix: Tensor | None, row_weight: Tensor | None
) -> dict[str, Tensor | None]:
    """Return what a loss is told of the rows besides their label: nothing where there is nothing.

    So a loss that knows no mixed labels, or no weights, need not name them.
    """
    mixed = {} if target_b is None else {"target_b": target_b, "mix": mix}
    return mixed if row_weight is None else {**mixed, "row_weight": row_weight}


def mean_of(losses: Tensor, row_weight: Tensor | None) -> Tensor:
    """Return the mean () of losses (N,), each times its weight (N,) where there are any.

    It is no division by the sum of the weights: these come with a mean of 1 over all the rows that
    share an optimiser step.
    """
    return losses.mean() if row_weight is None else (row_weight * losses).mean()


def weighted_outputs(
    loss: Callable[..., LossOutput],
    ranks: int,
    *inputs: Tensor,
    target: Tensor,
    row_weight: Tensor | None = None,
    **options: Any,
) -> LossOutput:
    """Return a loss of the kernels over inputs and target, its mean as `mean_of` has it.

    ranks: those over whose rows the loss sums. Ignored labels do not count in the mean.
    """
    if row_weight is None:
        return loss(*inputs, target, **options)
    count = ranks * counted_labels(target, options.get("target_b"), options.get("mix"))
    if not is_half(inputs[0]):
        return loss(*inputs, target, row_weight=row_weight / count, reduction="sum", **options)
    # In half precision gradients divided by the rows would vanish before the loss scale lifts them.
    output = loss(*inputs, target, row_weight=row_weight, reduction="sum", **options)
    return output._replace(loss=output.loss / count)


def counted_labels(target: Tensor, target_b: Tensor | None, mix: Tensor | None) -> Tensor:
    """Return how many of the rows have a label, (); of mixed labels, the shares. 1 at least."""
    counted = (target != IGNORED).float()
    if target_b is not None and mix is not None:
        counted = mix * counted + (1 - mix) * (target_b != IGNORED).float()
    return counted.sum().clamp(min=1)


def is_half(inputs: Tensor) -> bool:
    """Return whether a loss of these inputs makes gradients in float16."""
    kind = inputs.device.type
    autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) == torch.float16
    return inputs.dtype == torch.float16 or autocast


# --- what they are made of


def check_counts(loss: Loss, task: Task) -> None:
    """Raise UserError where the loss divides by the images of a class, and there are none."""
    need = loss.needs_of_counts(task.loss)
    if need and (task.counts == 0).any():
        name = task.space.names[int((task.counts == 0).nonzero()[0])]
        raise UserError(
            f"'{name}' has no training image in an epoch, so loss.name={loss.name} has no {need} "
            "for it: give it a data.budgets above 0, or pack without it"
        )


def log_prior(counts: Tensor, tau: float) -> Tensor:
    """Return tau * log(n_j / sum(n)), (C,) float32.

    counts (C,) are images per epoch, as sampled. Zero counts are an error.
    """
    if (counts == 0).any():
        raise UserError(
            f"class {int((counts == 0).nonzero()[0])} has no training image, so it has no prior: "
            "remove the class"
        )
    return tau * torch.log(counts.double() / counts.sum()).float()


def effective_number_weights(counts: Tensor, beta: float) -> Tensor:
    """Return class weights (1 - beta) / (1 - beta^n), (C,) float32, scaled to a mean of 1.

    Cui et al. 2019, arXiv 1901.05555. counts (C,).
    """
    weights = (1 - beta) / (1 - beta ** counts.double())
    return (weights * len(counts) / weights.sum()).float()


def weighted_ce(
    logits: Tensor, target: Tensor, weights: Tensor | None, row_weight: Tensor | None = None
) -> Tensor:
    """Return cross entropy with a weight per class, divided by the sum of the batch's weights.

    The sum is over all ranks. weights (C,), row_weight (N,); where both are given, a row weighs
    their product.
    """
    if row_weight is not None:
        each = F.cross_entropy(logits.float(), target, reduction="none")
        if weights is None:
            return mean_of(each, row_weight)
        counts = weights[target] * row_weight
        return (counts * each).sum() / mean_over_ranks(counts.sum())
    if weights is None or not dist.is_initialized():
        return F.cross_entropy(logits.float(), target, weight=weights)
    total = weights[target].sum()
    dist.all_reduce(total)
    loss = F.cross_entropy(logits.float(), target, weight=weights, reduction="sum")
    return loss * (dist.get_world_size() / total)


def mean_over_ranks(total: Tensor) -> Tensor:
    """Return the mean () over ranks of a sum of weights; 1 where it is 0, which divides zeros."""
    if dist.is_initialized():
        dist.all_reduce(total)
        total = total / dist.get_world_size()
    return torch.where(total > 0, total, torch.ones_like(total))


def margins(counts: Tensor, max_margin: float) -> Tensor:
    """Return LDAM's margin per class, n^(-1/4) scaled so that the rarest has max_margin, (C,).

    Cao et al. 2019, arXiv 1906.07413. counts (C,).
    """
    raw = counts.double() ** -0.25
    return (raw * max_margin / raw.max()).float()


def smoothing_by_class(counts: Tensor, head: float, tail: float) -> Tensor:
    """Return what label-aware smoothing takes from each class, (C,) float32.

    `head` of the most frequent, `tail` of the rarest, a quarter sine between (MiSLAS, arXiv
    2104.00466, eq. 6). counts (C,).
    """
    n = counts.double()
    share = (n - n.min()) / (n.max() - n.min()).clamp(min=1)
    return (tail + (head - tail) * torch.sin(share * torch.pi / 2)).float()


def silencing_graph(config: LossConfig, space: ClassSpace) -> ClassGraph | None:
    """Return the graph whose rows are the silenced sets, or None where the loss does not silence.

    Silencing that was asked for and finds no pair is an error: the release's ablations silenced
    nothing without noticing.
    """
    if not LOSSES[config.name].silences or config.silence == 1.0 or config.mask == "none":
        return None
    stored = torch.tensor(space.train_counts[: space.num_targets])
    graph = space.graph().masked(config.mask, stored < config.few_shot_images)
    if not graph.silences:
        raise UserError(
            f"loss.silence={config.silence} asks for silencing, but no pair of classes is "
            "silenced: pack auxiliaries with pairs, choose another loss.mask, or "
            "loss.name=balanced-ce"
        )
    return graph
