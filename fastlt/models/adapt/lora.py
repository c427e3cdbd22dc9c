"""LoRA (arXiv 2106.09685), by the library peft: a product of two thin matrices beside the weights
of linear layers and convolutions.
"""

import copy
from typing import Any

from torch import nn

from fastlt.config import AdapterConfig
from fastlt.errors import MissingExtra, UserError


def add_lora(backbone: nn.Module, config: AdapterConfig, name: str) -> set[str]:
    """Put LoRA beside every linear layer of attention and MLP and every convolution but the first.

    Convolutions in groups, which have few weights, stay as they are. Returns the names of its
    parameters. Raises MissingExtra without peft, and UserError where there is no such layer.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise MissingExtra('model.adapt=lora needs peft: pip install "fastlt[peft]"') from error
    targets = places_of(backbone)
    if not targets:
        raise UserError(f"model.adapt=lora: {name} has no linear layers or convolutions for it")
    alpha: Any = config.alpha or config.rank
    settings: Any = LoraConfig(
        r=config.rank,
        lora_alpha=alpha,
        lora_dropout=config.dropout,
        target_modules=targets,
    )
    inject_adapter_in_model(settings, backbone)
    return {key for key, _ in backbone.named_parameters() if ".lora_" in key}


def places_of(backbone: nn.Module) -> list[str]:
    """Return the names of the layers that LoRA goes beside."""
    found = [
        place
        for place, module in backbone.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    ]
    # the first one takes pixels, and moves least
    first = [place for place in found if isinstance(backbone.get_submodule(place), nn.Conv2d)][:1]
    return [place for place in found if place not in first]


def merge_lora(backbone: nn.Module) -> nn.Module:
    """Return a copy of a backbone in which LoRA is added to the weights that it lies beside, with
    the names that these had before; the backbone itself where it has none.
    """
    if not any(is_lora(module) for module in backbone.modules()):
        return backbone
    plain = copy.deepcopy(backbone)
    for place, module in list(plain.named_modules()):
        if is_lora(module):
            layer: Any = module
            layer.merge()
            parent, _, child = place.rpartition(".")
            setattr(plain.get_submodule(parent), child, layer.get_base_layer())
    return plain


def is_lora(module: nn.Module) -> bool:
    """Return whether a module is one that peft put in the place of another."""
    return hasattr(module, "lora_A") and hasattr(module, "get_base_layer")
