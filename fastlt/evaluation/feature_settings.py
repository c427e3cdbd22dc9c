"""The settings of features: which backbone, and how its images are prepared."""

from fastlt.config import Count, Section, Several


class FeatureSettings(Section):
    """A backbone, its images, and the device that makes the features."""

    backbone: str = "vit_small_patch14_dinov2.lvd142m"
    """The backbone of the features, any timm model."""
    weights: str = ""
    """A safetensors file for the backbone; or a RUN, or its model, which name their own."""
    size: Several = 224
    """Pixels a side of what the backbone is given; of a RUN, its own."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Mean of red, green and blue that is taken off."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Standard deviation of red, green and blue that is divided by."""
    batch: Several = 128
    """Images per batch."""
    workers: Count = 2
    """Processes or threads that load images."""
    device: str = "auto"
    """A torch device; auto: a GPU where there is one."""
