"""A backbone and a head on top: images to logits."""

from typing import ClassVar

from torch import Tensor, nn

from fastlt.classes import ClassSpace
from fastlt.config import ModelConfig
from fastlt.models.adapt import adapt, merged
from fastlt.models.backbones import build_backbone, feature_maps, pooled
from fastlt.models.heads import HEADS, Head
from fastlt.models.pretrained import load_backbone
from fastlt.models.start import start_head
from fastlt.models.weight_files import weights_file


class Classifier(nn.Module):
    """A backbone and a head over C classes; the first T rows of the head are the targets."""

    predicts_by_head: ClassVar[bool] = True  # logits are what the head makes of `features`

    def __init__(self, backbone: nn.Module, head: Head):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, C) of images (N, 3, H, W)."""
        return self.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """Return what the head takes of images (N, 3, H, W), by default the backbone's (N, D).

        Features that were computed before, (N, D), are taken as they are.
        """
        return images if images.ndim == 2 else self.backbone(images)

    def maps(self, images: Tensor) -> Tensor:
        """Return the backbone's feature maps (N, D, h, w) of images (N, 3, H, W)."""
        return feature_maps(self.backbone, images)

    def pool(self, maps: Tensor) -> Tensor:
        """Return the features (N, D) of feature maps, which the head takes."""
        return pooled(self.backbone, maps)

    def predicting(self, targets: int) -> "Classifier":
        """Return a model of the same backbone, merged with what can be merged into its weights,
        and with a head of the targets alone.

        Where classes are sharded over ranks, all ranks call it together.
        """
        return Classifier(merged(self.backbone), self.head.of_targets(targets))


def build_model(
    config: ModelConfig,
    classes: int,
    size: int,
    space: ClassSpace | None = None,
    notes: list[str] | None = None,
) -> Classifier:
    """Return the configured model of C = `classes` for images of `size` pixels a side.

    space: of these classes, where the head starts from vectors of their names. notes: a list to
    which a sentence is added about each way in which weights were made to fit.

    Raises UserError for a name that neither fastlt nor timm knows, and for weights that do not fit.
    """
    backbone = build_backbone(config, size)
    if config.weights:
        said = load_backbone(backbone, weights_file(config.weights))
        if notes is not None:
            notes += [f"{config.weights}: {sentence}" for sentence in said]
    adapt(backbone, config.adapt, config.adapter, config.name)
    head = HEADS[config.head].build(config, int(backbone.num_features), classes)  # type: ignore[arg-type]
    start_head(head, config, space)
    return Classifier(backbone, head)
