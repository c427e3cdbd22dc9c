"""Published methods that are settings, between a recipe and what the user sets.

A method of two stages is two runs: the second one is started from the first, and keeps its backbone
as it is.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from fastlt.errors import ConfigError

Settings = dict[str, Any]  # section.key -> value
SECOND_STAGE_EPOCHS = 10  # in all three papers, on CIFAR-100-LT


class Preset(NamedTuple):
    """A published method as settings."""

    line: str
    paper: str
    settings: Callable[..., Settings]  # of the epochs and, in a second stage, of the run to start


def ldam_drw(epochs: int) -> Settings:
    """Return LDAM with re-weighting in the last fifth of the epochs."""
    drw_epoch = min(round(0.8 * epochs), epochs - 1)
    return {"loss.name": "ldam", "model.head": "cosine", "loss.drw_epoch": drw_epoch}


def balanced_softmax(epochs: int) -> Settings:
    """Return cross entropy with the prior; its strength loss.tau is 1 in both papers."""
    return {"loss.name": "balanced-ce", "loss.tau": 1.0}


def weight_decay(epochs: int) -> Settings:
    """Return decay strong enough to keep norms even (arXiv 2203.14197, section 4.1).

    The learning rate is the paper's, for it is their product that shrinks the weights.
    """
    return {
        "loss.name": "ce",
        "optim.weight_decay": 5e-3,
        "optim.lr": 0.01,
        "optim.lr_base_batch": 0,
        "schedule.name": "cosine",
        "schedule.warmup_epochs": 0,
    }


def crt(epochs: int, start: str) -> Settings:
    """Return a new head on class-balanced images (arXiv 1910.09217, section 4.1)."""
    balanced = {"loss.name": "ce", "data.target_sampling": "class-balanced"}
    return {**_second_stage(epochs, start), **balanced}


def lws(epochs: int, start: str) -> Settings:
    """Return a factor for each row of the head as it is (arXiv 1910.09217, section 4.3)."""
    head = {"model.head": "scaled", "model.scale_alone": True, "model.head_weights": start}
    balanced = {"loss.name": "ce", "data.target_sampling": "class-balanced"}
    return {**_second_stage(epochs, start), **head, **balanced}


def mislas(epochs: int, start: str) -> Settings:
    """Return label-aware smoothing, factors, shifted batch norm (arXiv 2104.00466, section 3)."""
    return {
        **_second_stage(epochs, start),
        "model.head": "scaled",
        "model.head_weights": start,
        "loss.name": "label-aware-smoothing",
        "data.target_sampling": "class-balanced",
        "schedule.shift_bn": True,
    }


def weight_balancing(epochs: int, start: str) -> Settings:
    """Return class-balanced weights, decay and MaxNorm on the head (arXiv 2203.14197)."""
    return {
        **_second_stage(epochs, start),
        "model.head_weights": start,
        "loss.name": "class-balanced",
        "optim.lr": 0.01,
        "optim.lr_base_batch": 0,
        "optim.weight_decay": 0.1,
        "optim.max_norm": 0.1,
    }


def _second_stage(epochs: int, start: str) -> Settings:
    """Return what trains the head alone, on targets alone, mixed and smoothed no more."""
    return {
        "model.weights": start,
        "data.auxiliary": False,
        "train.epochs": epochs,
        "schedule.name": "cosine",
        "schedule.warmup_epochs": 0,
        "schedule.head_only_epochs": epochs,
        "schedule.head_only_lr": 1.0,
        "augment.mixup": 0.0,
        "augment.cutmix": 0.0,
        "loss.label_smoothing": 0.0,
    }


KANG = "Kang et al. 2020, arXiv 1910.09217"
ONE_STAGE = {
    "ce": Preset("Cross entropy.", "", lambda epochs: {"loss.name": "ce"}),
    "focal": Preset(
        "The focal loss.",
        "Lin et al. 2017, arXiv 1708.02002",
        lambda epochs: {"loss.name": "focal"},
    ),
    "class-balanced": Preset(
        "Weights by the effective number of images.",
        "Cui et al. 2019, arXiv 1901.05555",
        lambda epochs: {"loss.name": "class-balanced"},
    ),
    "ldam-drw": Preset(
        "Margins, and re-weighting in the last fifth.",
        "Cao et al. 2019, arXiv 1906.07413",
        ldam_drw,
    ),
    "balanced-softmax": Preset(
        "The prior added to the logits.", "Ren et al. 2020, arXiv 2007.10740", balanced_softmax
    ),
    "logit-adjustment": Preset(
        "The same loss by its other name; loss.tau is its strength.",
        "Menon et al. 2021, arXiv 2007.07314",
        balanced_softmax,
    ),
    "mixup": Preset(
        "Mixup, the first stage of MiSLAS.",
        "Zhong et al. 2021, arXiv 2104.00466",
        lambda epochs: {"loss.name": "ce", "augment.mixup": 1.0},
    ),
    "weight-decay": Preset(
        "Strong decay, the first stage of weight balancing.",
        "Alshammari et al. 2022, arXiv 2203.14197",
        weight_decay,
    ),
}
SECOND_STAGE = {
    "crt": Preset("A new head on class-balanced images.", KANG, crt),
    "lws": Preset("A learned factor per row of the head.", KANG, lws),
    "mislas": Preset(
        "Label-aware smoothing and shifted batch norm, after `mixup`.",
        "Zhong et al. 2021, arXiv 2104.00466",
        mislas,
    ),
    "weight-balancing": Preset(
        "Class-balanced weights, decay and MaxNorm, after `weight-decay`.",
        "Alshammari et al. 2022, arXiv 2203.14197",
        weight_balancing,
    ),
}
PRESETS = {**ONE_STAGE, **SECOND_STAGE}


def preset_settings(name: str | None, start: str | None) -> Callable[[int, int | None], Settings]:
    """Return the function from the epochs of the recipe, and those asked for, to settings.

    name: a preset, or None for `start` alone, the finished RUN, or its model, to begin with.
    """
    if name in SECOND_STAGE:
        if start is None:
            raise ConfigError(
                f"--method {name} begins with the model of another run: name it with --start RUN"
            )
        second = SECOND_STAGE[name].settings
        return lambda epochs, asked: second(asked or SECOND_STAGE_EPOCHS, start)
    begin: Settings = {"model.weights": start} if start else {}
    first = ONE_STAGE[name].settings if name else lambda epochs: {}
    return lambda epochs, asked: begin | first(asked or epochs)
