"""The settings of features: which backbone, and how its images are prepared."""

from fastlt.config import Count, Section, Several


class FeatureSettings(Section):
    """A backbone, its images, and the device that makes the features."""

    backbone: str = "vit_small_patch14_dinov2.lvd142m"  # any timm model
    # a safetensors file for it; or a RUN folder, or its model.safetensors, which name their model
    # themselves
    weights: str = ""
    size: Several = 224  # pixels a side; of a RUN, its own
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    batch: Several = 128
    workers: Count = 2
    device: str = "auto"
