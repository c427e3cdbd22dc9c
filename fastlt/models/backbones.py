"""Backbones: images (N, 3, H, W) to features (N, D), D being `num_features`.

`feature_maps` and `pooled` are the two halves of that for any backbone, with the maps (N, D, h, w)
between.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fastlt.config import ModelConfig, did_you_mean
from fastlt.errors import MissingExtra, UserError
from fastlt.models.hub import cached_weights, has_hub

CIFAR_DEPTHS = (8, 14, 20, 32, 44, 56, 110)


class BasicBlock(nn.Module):
    """A block of two 3x3 convolutions, whose shortcut has no parameters.

    Option A of arXiv 1512.03385: subsample, pad channels with zeros.
    """

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.padding = stride, (channels - channels_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Return the maps (N, channels, H, W) of a block; a stride of 2 halves the sides."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1 or self.padding:
            x = F.pad(
                x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.padding, self.padding)
            )
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """The CIFAR ResNet of 6n + 2 layers (arXiv 1512.03385, section 4.2).

    Images (N, 3, H, W) to features (N, 64).
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

    def maps(self, images: Tensor) -> Tensor:
        """Return the feature maps (N, 64, H / 4, W / 4) of images (N, 3, H, W)."""
        return self.stages(F.relu(self.bn1(self.conv1(images))))

    def pool(self, maps: Tensor) -> Tensor:
        """Return the features (N, 64) of feature maps."""
        return maps.mean(dim=(2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (N, 64) of images (N, 3, H, W)."""
        return self.pool(self.maps(images))


def build_backbone(config: ModelConfig, size: int) -> nn.Module:
    """Return the backbone of that name for images of `size` pixels a side.

    Raises UserError for a name that neither fastlt nor timm knows.
    """
    backbone = cifar_backbone(config) or timm_backbone(config, size)
    if config.checkpoint_activations:
        checkpoint_activations(backbone, config.name)
    return backbone


def checkpoint_activations(backbone: nn.Module, name: str) -> None:
    """Make a backbone recompute its activations. UserError where it cannot."""
    try:
        backbone.set_grad_checkpointing(True)  # type: ignore[operator]
    except (AttributeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"{name} cannot compute its activations anew: set model.checkpoint_activations=false"
        ) from error


def cifar_backbone(config: ModelConfig) -> nn.Module | None:
    """The CIFAR ResNet of that name, or None."""
    depths = [depth for depth in CIFAR_DEPTHS if config.name == f"resnet{depth}"]
    if depths and config.pretrained and not config.weights:
        raise UserError(
            f"there are no pretrained weights for {config.name}: set model.pretrained=false"
        )
    if depths and (config.drop_path or config.args):
        raise UserError(
            f"{config.name} takes no further arguments: set model.drop_path=0, and leave out "
            "model.args"
        )
    return CifarResNet(depths[0]) if depths else None


def timm_backbone(config: ModelConfig, size: int) -> nn.Module:
    """A timm model without its classifier: (N, 3, size, size) to (N, D) pooled features."""
    timm = import_timm(config.name)
    if not timm.is_model(config.name):
        near = did_you_mean(config.name, timm.list_models())
        raise UserError(f"neither fastlt nor timm has a model '{config.name}'{near}")
    cfg = timm.models.get_pretrained_cfg(config.name)
    options: dict[str, Any] = {"img_size": size} if cfg is not None and cfg.fixed_input_size else {}
    if config.drop_path:
        options["drop_path_rate"] = config.drop_path
    options |= config.args | pooling_of(config)
    width = projection_of(config, cfg)
    if config.pretrained and not config.weights:
        options |= from_hub(timm, config.name)
    try:
        backbone = timm.create_model(
            config.name,
            pretrained=config.pretrained and not config.weights,
            num_classes=width,
            **options,
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(
            f"timm's {config.name} does not take {', '.join(options)} ({error}): see "
            "model.drop_path and model.args"
        ) from error
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"there are no pretrained weights of {config.name} to be had: give a file with "
            "model.weights="
        ) from error
    if width:
        backbone.num_features = width
    return backbone


def pooling_of(config: ModelConfig) -> dict[str, Any]:
    """Return the arguments by which a vision transformer averages its patch tokens.

    Its last norm stays before that, as its weights were trained.
    """
    if config.pooling == "default":
        return {}
    if not config.name.partition(".")[0].startswith(("vit_", "deit", "test_vit")):
        raise UserError(
            f"model.pooling=patches is for vision transformers, not for {config.name}: leave it out"
        )
    return {"global_pool": "avg", "fc_norm": False}


def projection_of(config: ModelConfig, cfg: Any) -> int:
    """Return the width of the projection that is kept of a model of CLIP; 0: none is."""
    if not config.projection:
        return 0
    if cfg is None or "clip" not in config.name or not cfg.num_classes:
        raise UserError(
            f"model.projection is for images of CLIP such as vit_base_patch16_clip_224.openai, not "
            f"for {config.name}: set it to false"
        )
    return int(cfg.num_classes)


def from_hub(timm: Any, name: str) -> dict[str, Any]:
    """Return the option by which timm takes weights from the hub's cache, without asking the hub.

    Nothing where they are to be fetched. Raises UserError where they are not in the cache and the
    hub is out of reach, as its own client would try for a minute.
    """
    if (cached := cached_weights(timm, name)) is not None:
        return {"pretrained_cfg_overlay": {"file": str(cached)}}
    if not has_hub():
        raise UserError(
            f"the weights of {name} are not in the cache and the hub cannot be reached: give a "
            "file with model.weights=FILE"
        )
    return {}


def import_timm(name: str) -> Any:
    """Return timm. Raises MissingExtra, that says what the model `name` needs, where it is not."""
    from fastlt.utils import torchvision_shim

    torchvision_shim.make_importable()
    try:
        import timm
    except ImportError as error:
        raise MissingExtra(
            f"model {name} comes from timm, which is not installed: pip install 'fastlt[timm]'"
        ) from error
    return timm


def feature_maps(backbone: Any, images: Tensor) -> Tensor:
    """Return the feature maps (N, D, h, w) of a backbone; of a transformer, its patch tokens."""
    if isinstance(backbone, CifarResNet):
        return backbone.maps(images)
    maps = backbone.forward_features(images)
    if maps.ndim == 3:  # (N, tokens, D)
        height, width = backbone.patch_embed.grid_size
        patches = maps[:, maps.shape[1] - height * width :]
        return patches.transpose(1, 2).unflatten(2, (height, width))
    if maps.shape[-1] == backbone.num_features != maps.shape[1]:  # channels last, as Swin's
        return maps.permute(0, 3, 1, 2)
    return maps


def pooled(backbone: Any, maps: Tensor) -> Tensor:
    """Return the features (N, D) of feature maps: as the backbone's own forward pass pools them.

    Transformers, most of which take the class token instead, get the mean of their patch tokens.
    """
    if isinstance(backbone, CifarResNet):
        return backbone.pool(maps)
    if hasattr(backbone, "patch_embed"):
        return maps.mean(dim=(2, 3))
    return backbone.forward_head(maps, pre_logits=True)
