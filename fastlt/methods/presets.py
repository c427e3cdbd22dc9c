"""The methods that people compare with: each a few settings between a recipe and what the user sets
himself.

A method of two stages is two runs: the second one is started from the first, and keeps its backbone
as it is.
"""

from collections.abc import Callable
from typing import Any

from fastlt.config import did_you_mean
from fastlt.errors import UserError

Settings = dict[str, Any]  # section.key -> value
SECOND_STAGE_EPOCHS = 10  # in all three papers, on CIFAR-100-LT


def cross_entropy(epochs: int) -> Settings:
    return {"loss.name": "ce"}


def focal(epochs: int) -> Settings:
    """Lin et al. 2017, arXiv 1708.02002."""
    return {"loss.name": "focal"}


def class_balanced(epochs: int) -> Settings:
    """Weights by the effective number of images: Cui et al. 2019, arXiv 1901.05555."""
    return {"loss.name": "class-balanced"}


def ldam_drw(epochs: int) -> Settings:
    """Margins, and weights in the last fifth: Cao et al. 2019, arXiv 1906.07413."""
    return {
        "loss.name": "ldam",
        "model.head": "cosine",
        "loss.drw_epoch": min(round(0.8 * epochs), epochs - 1),
    }


def balanced_softmax(epochs: int) -> Settings:
    """Ren et al. 2020, arXiv 2007.10740."""
    return {"loss.name": "balanced-ce", "loss.tau": 1.0}


def logit_adjustment(epochs: int) -> Settings:
    """Menon et al. 2021, arXiv 2007.07314, eq. 10:

    Balanced Softmax with a strength, loss.tau, which is 1 in the paper.
    """
    return {"loss.name": "balanced-ce", "loss.tau": 1.0}


def mixup(epochs: int) -> Settings:
    """The first stage of MiSLAS (arXiv 2104.00466, section 3.2)."""
    return {"loss.name": "ce", "augment.mixup": 1.0}


def weight_decay(epochs: int) -> Settings:
    """The first stage of weight balancing (arXiv 2203.14197, section 4.1): decay strong enough to
    keep norms even, at the paper's learning rate, for it is their product that shrinks the weights.
    """
    rate = {
        "optim.lr": 0.01,
        "optim.lr_base_batch": 0,
        "schedule.name": "cosine",
        "schedule.warmup_epochs": 0,
    }
    return {"loss.name": "ce", "optim.weight_decay": 5e-3, **rate}


def crt(epochs: int, start: str) -> Settings:
    """Classifier re-training: a new head on class-balanced images (Kang et al. 2020, arXiv
    1910.09217, section 4.1).
    """
    return {
        **_second_stage(epochs, start),
        "loss.name": "ce",
        "data.target_sampling": "class-balanced",
    }


def lws(epochs: int, start: str) -> Settings:
    """Learnable weight scaling: a factor for each row of the head as it is (arXiv 1910.09217,
    section 4.3).
    """
    head = {"model.head": "scaled", "model.scale_alone": True, "model.head_weights": start}
    return {
        **_second_stage(epochs, start),
        **head,
        "loss.name": "ce",
        "data.target_sampling": "class-balanced",
    }


def mislas(epochs: int, start: str) -> Settings:
    """Label-aware smoothing, factors and shifted batch norm, after `mixup` (Zhong et al. 2021,
    arXiv 2104.00466, section 3).
    """
    return {
        **_second_stage(epochs, start),
        "model.head": "scaled",
        "model.head_weights": start,
        "loss.name": "label-aware-smoothing",
        "data.target_sampling": "class-balanced",
        "schedule.shift_bn": True,
    }


def weight_balancing(epochs: int, start: str) -> Settings:
    """Class-balanced weights, decay and MaxNorm on the head, after `weight-decay` (Alshammari et
    al. 2022, arXiv 2203.14197).
    """
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
    """The head alone, on targets alone, mixed and smoothed no more."""
    return {
        "model.weights": start,
        "data.auxiliary": False,
        "train.epochs": epochs,
        "schedule.name": "cosine",
        "schedule.warmup_epochs": 0,
        "schedule.head_only_epochs": epochs,
        "augment.mixup": 0.0,
        "augment.cutmix": 0.0,
        "loss.label_smoothing": 0.0,
    }


ONE_STAGE: dict[str, Callable[[int], Settings]] = {
    "ce": cross_entropy,
    "focal": focal,
    "class-balanced": class_balanced,
    "ldam-drw": ldam_drw,
    "balanced-softmax": balanced_softmax,
    "logit-adjustment": logit_adjustment,
    "mixup": mixup,
    "weight-decay": weight_decay,
}
SECOND_STAGE: dict[str, Callable[[int, str], Settings]] = {
    "crt": crt,
    "lws": lws,
    "mislas": mislas,
    "weight-balancing": weight_balancing,
}


def method_settings(method: str | None, start: str | None) -> Callable[[int, int | None], Settings]:
    """Epochs of the recipe, and those that the user asks for, to settings. start: the finished run,
    or its model, to begin with.
    """
    if method in SECOND_STAGE:
        if start is None:
            raise UserError(
                f"--method {method} begins with the model of another run: name it with --start RUN"
            )
        return lambda epochs, asked: SECOND_STAGE[method](asked or SECOND_STAGE_EPOCHS, start)
    if method is not None and method not in ONE_STAGE:
        names = [*ONE_STAGE, *SECOND_STAGE]
        raise UserError(
            f"there is no method '{method}'{did_you_mean(method, names)}; methods: "
            f"{', '.join(names)}"
        )
    begin: Settings = {"model.weights": start} if start else {}
    return lambda epochs, asked: begin | (ONE_STAGE[method](asked or epochs) if method else {})
