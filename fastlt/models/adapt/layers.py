"""How much of a backbone is trained: `model.adapt`."""

from torch import nn

from fastlt.errors import UserError
from fastlt.models.backbones import CifarResNet

FULL, HEAD, LAST = "full", "head", "last:"


def freeze(backbone: nn.Module, adapt: str, name: str) -> None:
    """Let those parameters of a backbone stand still that `model.adapt` does not train.

    adapt: full, head, or last:K for the K topmost layers. name: of the model, for the UserError
    where it has fewer, or its layers are not known.
    """
    if adapt == FULL:
        return
    trained: set[str] = set()
    if adapt.startswith(LAST):
        layers = layers_of(backbone, name)
        count, last = int(adapt.removeprefix(LAST)), max(layers.values())
        if count > last:
            raise UserError(
                f"model.adapt={adapt}, but {name} has {last} layers above its stem: take fewer, or "
                f"{FULL}"
            )
        trained = {name for name, layer in layers.items() if layer > last - count}
    for parameter_name, parameter in backbone.named_parameters():
        parameter.requires_grad_(parameter_name in trained)


def layers_of(backbone: nn.Module, name: str) -> dict[str, int]:
    """Return the layer of each parameter: 0 for the stem, then a number a block, upwards."""
    if isinstance(backbone, CifarResNet):
        return {key: cifar_layer(key) for key, _ in backbone.named_parameters()}
    if not hasattr(backbone, "group_matcher"):
        raise UserError(f"the layers of {name} are not known: set model.adapt={FULL} or {HEAD}")
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


def still_modules(backbone: nn.Module, trained: set[int]) -> list[nn.Module]:
    """Return the topmost modules of a backbone that have parameters, none of which is trained.

    trained: the ids of the parameters that are. The modules stay in evaluation mode: statistics of
    batch norm would drift under weights that stand still.
    """
    own = {id(parameter) for parameter in backbone.parameters()}
    if not own & trained:
        return [backbone] if own else []
    return [module for child in backbone.children() for module in still_modules(child, trained)]
