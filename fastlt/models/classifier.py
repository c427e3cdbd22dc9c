"""Backbones and the classifier head on top: images to features, features to logits."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from fastlt.config import ModelConfig, did_you_mean
from fastlt.errors import UserError
from fastlt_kernels import ClassParallelLinear, shard_of

CIFAR_DEPTHS = (8, 14, 20, 32, 44, 56, 110)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; the shortcut has no parameters (option A of arXiv 1512.03385:
    subsample, pad channels with zeros).
    """

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.padding = stride, (channels - channels_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1 or self.padding:
            x = F.pad(
                x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding)
            )
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """The CIFAR ResNet of 6n + 2 layers (arXiv 1512.03385, section 4.2):

    (N, 3, H, W) to (N, 64) features.
    """

    num_features = 64

    def __init__(self, depth: int):
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        stages = []
        for channels_in, channels, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2)):
            stages += [
                BasicBlock(channels_in if i == 0 else channels, channels, stride if i == 0 else 1)
                for i in range(blocks)
            ]
        self.stages = nn.Sequential(*stages)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(F.relu(self.bn1(self.conv1(x))))
        return x.mean(dim=(2, 3))


class LinearHead(nn.Module):
    """(N, D) features to (N, C) logits."""

    def __init__(self, features: int, classes: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, features))
        self.bias = nn.Parameter(torch.zeros(classes))
        nn.init.kaiming_normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class ScaledHead(LinearHead):
    """A linear head with a learned factor per class: learnable weight scaling (arXiv 1910.09217,
    section 4.3).
    """

    def __init__(self, features: int, classes: int, scale_alone: bool):
        super().__init__(features, classes)
        self.scale = nn.Parameter(torch.ones(classes))
        for parameter in (self.weight, self.bias):
            parameter.requires_grad_(not scale_alone)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * super().forward(x)


class CosineHead(nn.Module):
    """(N, D) features to (N, C) logits `scale * cos(feature, class weight)`."""

    def __init__(self, features: int, classes: int, scale: float):
        super().__init__()
        # Of length 1, as in the LDAM code: the length sets how far a step of the optimiser turns a
        # row.
        self.weight = nn.Parameter(
            F.normalize(torch.empty(classes, features).uniform_(-1, 1), dim=1)
        )
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(F.normalize(x, dim=1), F.normalize(self.weight, dim=1))


Head = LinearHead | CosineHead | ClassParallelLinear


class Classifier(nn.Module):
    """A backbone and a head over C classes; the first T rows of the head are the targets."""

    def __init__(self, backbone: nn.Module, head: Head):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """(N, 3, H, W) float to (N, C) logits."""
        return self.head(self.backbone(images))


def build_model(config: ModelConfig, classes: int, size: int) -> Classifier:
    """Raises UserError for a name that neither fastlt nor timm knows, and for weights that do not
    fit.
    """
    backbone = cifar_backbone(config) or timm_backbone(config, size)
    if config.checkpoint_activations:
        checkpoint_activations(backbone, config.name)
    if config.weights:
        load_backbone(backbone, weights_file(config.weights))
    features = int(backbone.num_features)  # type: ignore[arg-type]
    head = build_head(config, features, classes)
    if config.head_weights:
        start_head(head, weights_file(config.head_weights))
    return Classifier(backbone, head)


def checkpoint_activations(backbone: nn.Module, name: str) -> None:
    try:
        backbone.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"{name} cannot compute its activations anew: set model.checkpoint_activations=false"
        ) from error


def build_head(config: ModelConfig, features: int, classes: int) -> Head:
    if config.head == "class-parallel":
        return ClassParallelLinear(features, classes, seed=int(torch.randint(2**31, ())))
    if config.head == "scaled":
        return ScaledHead(features, classes, config.scale_alone)
    return (
        CosineHead(features, classes, config.head_scale)
        if config.head == "cosine"
        else LinearHead(features, classes)
    )


@torch.no_grad()
def whole_targets(model: Classifier, num_targets: int) -> Classifier:
    """The model with a head of the targets alone, where each rank has but its own classes; all
    ranks have to ask together.
    """
    if not isinstance(model.head, ClassParallelLinear):
        return model
    parts = [[], []]  # type: list[list[Tensor]]
    world = dist.get_world_size(model.head.group)
    for rank in range(world):
        shard = shard_of(model.head.num_classes, rank, world)
        rows = max(0, min(shard.stop, num_targets) - shard.start)
        for part, parameter in zip(parts, (model.head.weight, model.head.bias), strict=True):
            assert parameter is not None
            sent = parameter.new_zeros(rows, *parameter.shape[1:])
            if rank == dist.get_rank(model.head.group):
                sent.copy_(parameter[:rows])
            if rows:
                dist.broadcast(sent, rank, group=model.head.group)
            part.append(sent)
    head = LinearHead(model.head.in_features, num_targets).to(model.head.weight.device)
    head.weight.copy_(torch.cat(parts[0]))
    head.bias.copy_(torch.cat(parts[1]))
    return Classifier(model.backbone, head)


def cifar_backbone(config: ModelConfig) -> nn.Module | None:
    """The CIFAR ResNet of that name, or None."""
    depths = [depth for depth in CIFAR_DEPTHS if config.name == f"resnet{depth}"]
    if depths and config.pretrained:
        raise UserError(
            f"there are no pretrained weights for {config.name}: set model.pretrained=false"
        )
    if depths and config.drop_path:
        raise UserError(f"{config.name} has no drop path: set model.drop_path=0")
    return CifarResNet(depths[0]) if depths else None


def timm_backbone(config: ModelConfig, size: int) -> nn.Module:
    """A timm model without its classifier: (N, 3, size, size) to (N, D) pooled features."""
    from fastlt.utils import torchvision_shim

    torchvision_shim.make_importable()
    try:
        import timm
    except ImportError as error:
        raise UserError(
            f"model {config.name} comes from timm, which is not installed: pip install "
            "'fastlt[timm]'"
        ) from error
    if not timm.is_model(config.name):
        near = did_you_mean(config.name, timm.list_models())
        raise UserError(f"neither fastlt nor timm has a model '{config.name}'{near}")
    cfg = timm.models.get_pretrained_cfg(config.name)
    options: dict[str, Any] = {"img_size": size} if cfg is not None and cfg.fixed_input_size else {}
    if config.drop_path:
        options["drop_path_rate"] = config.drop_path
    try:
        return timm.create_model(
            config.name,
            pretrained=config.pretrained and not config.weights,
            num_classes=0,
            **options,
        )
    except TypeError as error:
        raise UserError(
            f"timm's {config.name} does not take {', '.join(options)}: set model.drop_path=0"
        ) from error
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"there are no pretrained weights of {config.name} to be had: give a file with "
            "model.weights="
        ) from error


def load_backbone(backbone: nn.Module, path: Path) -> None:
    """Weights from a safetensors file, which must hold all of the backbone's; what else it holds is
    passed over.
    """
    weights = read_weights(path)
    own = backbone.state_dict()
    weights = {name.removeprefix("backbone."): tensor for name, tensor in weights.items()}
    if "pos_embed" in own and "pos_embed" in weights:
        weights["pos_embed"] = of_size(weights["pos_embed"], backbone)
    missing = [name for name in own if name not in weights]
    wrong = [name for name in own if name in weights and weights[name].shape != own[name].shape]
    if missing or wrong:
        raise UserError(
            f"{path} does not fit the model: {len(missing)} tensors are missing and {len(wrong)} "
            "have another shape; "
            f"the first is {(missing + wrong)[0]}"
        )
    backbone.load_state_dict({name: weights[name] for name in own})


def of_size(pos_embed: Tensor, backbone: nn.Module) -> Tensor:
    """Position embeddings (1, tokens, D) of a vision transformer, resampled where they are of
    images of another size.
    """
    if pos_embed.ndim != 3 or pos_embed.shape == backbone.pos_embed.shape:
        return pos_embed
    from timm.layers import resample_abs_pos_embed

    # Prefix tokens, such as that of the class, may have positions of their own, or none, as the
    # model was made.
    prefix = (
        0
        if getattr(backbone, "no_embed_class", False)
        else int(getattr(backbone, "num_prefix_tokens", 1))
    )
    patches: Any = backbone.patch_embed
    return resample_abs_pos_embed(
        pos_embed, new_size=list(patches.grid_size), num_prefix_tokens=prefix
    )


def start_head(head: Head, path: Path) -> None:
    """Copies the rows of `weight` in the file, (T, D) or (C, D), and of `bias`, into the first rows
    of the head. `head.weight` and `head.bias`, as a trained model has them, will do as well.
    """
    found = {name.removeprefix("head."): tensor for name, tensor in read_weights(path).items()}
    rows, bias = found.get("weight"), found.get("bias")
    if (
        rows is None
        or rows.ndim != 2
        or rows.shape[1] != head.weight.shape[1]
        or len(rows) > len(head.weight)
    ):
        shape = "no `weight`" if rows is None else f"a weight of shape {tuple(rows.shape)}"
        raise UserError(
            f"{path} has {shape}; the head is {tuple(head.weight.shape)} and takes its first rows "
            "from it"
        )
    with torch.no_grad():
        head.weight[: len(rows)] = rows
        if bias is not None and isinstance(head, LinearHead):
            head.bias[: len(bias)] = bias


def weights_file(place: str) -> Path:
    """Of a RUN folder, its trained model."""
    path = Path(place)
    if path.is_dir() and not (path / "model.safetensors").is_file():
        raise UserError(f"{path} has no model.safetensors: name a run that has finished")
    return path / "model.safetensors" if path.is_dir() else path


def read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot read the weights {path}: it must be a safetensors file ({error})"
        ) from error
