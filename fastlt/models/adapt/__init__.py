"""How a backbone is adapted to a task: `model.adapt`, all of it, a part, or small modules in it."""

from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from fastlt.config import AdapterConfig
from fastlt.models.adapt.adaptformer import add_adaptformer
from fastlt.models.adapt.layers import FULL, LAST, freeze, norms_of, still_modules
from fastlt.models.adapt.lora import add_lora, merge_lora
from fastlt.models.adapt.prompts import add_deep_prompts, add_shallow_prompts

__all__ = ["FULL", "KINDS", "adapt", "merged", "stays", "still_modules"]


class Kind(NamedTuple):
    """A way to adapt a backbone."""

    add: Callable[[nn.Module, AdapterConfig, str], set[str]]
    """Adds its modules to a backbone of a name; returns the names of what is trained in it."""
    stays: bool = False
    """Whether an exported model holds modules of it: others are timm's own."""


def _head(backbone: nn.Module, config: AdapterConfig, name: str) -> set[str]:
    return set()


def _bitfit(backbone: nn.Module, config: AdapterConfig, name: str) -> set[str]:
    """All biases (BitFit, arXiv 2106.10199)."""
    return {key for key, _ in backbone.named_parameters() if key.endswith("bias")}


def _norm(backbone: nn.Module, config: AdapterConfig, name: str) -> set[str]:
    """Scales and shifts of all normalisation layers."""
    return norms_of(backbone)


KINDS: dict[str, Kind] = {
    "head": Kind(_head),
    "bitfit": Kind(_bitfit),
    "norm": Kind(_norm),
    "lora": Kind(add_lora),
    "adaptformer": Kind(add_adaptformer, stays=True),
    "vpt-shallow": Kind(add_shallow_prompts, stays=True),
    "vpt-deep": Kind(add_deep_prompts, stays=True),
}


def adapt(backbone: nn.Module, kind: str, config: AdapterConfig, name: str) -> None:
    """Prepare a backbone, filled with the weights that it starts from, as `model.adapt` says.

    Parameters that are not trained stand still. name: of the model, for the UserError where its
    form does not allow the kind.
    """
    if kind == FULL:
        return
    if kind.startswith(LAST):
        freeze(backbone, kind, name)
        return
    trained = KINDS[kind].add(backbone, config, name)
    for key, parameter in backbone.named_parameters():
        parameter.requires_grad_(key in trained)


def stays(kind: str) -> bool:
    """Return whether an exported model holds modules of a kind."""
    return kind in KINDS and KINDS[kind].stays


def merged(backbone: nn.Module) -> nn.Module:
    """Return the backbone with what can be merged into its weights merged, a copy where there is
    such.
    """
    return merge_lora(backbone)
