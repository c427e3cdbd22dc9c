"""The layers of a backbone, and which of them are trained."""

from torch import nn

from fastlt.errors import UserError
from fastlt.models.backbones import CifarResNet

FULL, LAST = "full", "last:"


def freeze(backbone: nn.Module, kind: str, name: str) -> None:
    """Let all parameters of a backbone stand still but those of its K topmost layers.

    kind: last:K. name: of the model, for the UserError where it has fewer, or its layers are not
    known.
    """
    layers = layers_of(backbone, name)
    count, last = int(kind.removeprefix(LAST)), max(layers.values())
    if count > last:
        raise UserError(
            f"model.adapt={kind}, but {name} has {last} layers above its stem: take fewer, or "
            f"{FULL}"
        )
    for key, parameter in backbone.named_parameters():
        parameter.requires_grad_(layers[key] > last - count)


BATCH_NORM = nn.modules.batchnorm._BatchNorm
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def norms_of(backbone: nn.Module) -> set[str]:
    """Return the names of the parameters of normalisation layers."""
    return {
        f"{place}.{key}" if place else key
        for place, module in backbone.named_modules()
        if isinstance(module, NORMS)
        for key, _ in module.named_parameters(recurse=False)
    }


def layers_of(backbone: nn.Module, name: str) -> dict[str, int]:
    """Return the layer of each parameter: 0 for the stem, then a number a block, upwards."""
    if isinstance(backbone, CifarResNet):
        return {key: cifar_layer(key) for key, _ in backbone.named_parameters()}
    if not hasattr(backbone, "group_matcher"):
        raise UserError(f"the layers of {name} are not known: set model.adapt={FULL} or head")
    from timm.models._manipulate import group_with_matcher  # present: the backbone came from timm

    return group_with_matcher(
        backbone.named_parameters(),
        backbone.group_matcher(coarse=False),  # type: ignore[operator]
        reverse=True,
    )


def cifar_layer(name: str) -> int:
    """Return the layer of a parameter of a CIFAR ResNet by its name, `stages.3.conv1.weight`."""
    parts = name.split(".")
    return int(parts[1]) + 1 if parts[0] == "stages" else 0


def still_modules(backbone: nn.Module, trained: set[int], kind: str) -> list[nn.Module]:
    """Return the modules of a backbone that stay in evaluation mode under a kind of `model.adapt`.

    trained: the ids of the parameters that are trained. The modules are the topmost ones that have
    parameters, none of which is trained, and batch norms, trained or not, unless the weights before
    them are trained as well: statistics would drift, and take what was pretrained with them.
    """
    found = untrained(backbone, trained)
    if kind.startswith(LAST):
        return found
    return found + [module for module in backbone.modules() if isinstance(module, BATCH_NORM)]


def untrained(module: nn.Module, trained: set[int]) -> list[nn.Module]:
    """Return the topmost modules that have parameters, none of which is trained."""
    own = {id(parameter) for parameter in module.parameters()}
    if not own & trained:
        return [module] if own else []
    return [part for child in module.children() for part in untrained(child, trained)]
