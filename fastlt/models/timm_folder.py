"""Models as folders of timm: `timm.create_model("local-dir:X", pretrained=True)` loads them."""

import math
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastlt.config import ModelConfig
from fastlt.models.backbones import CifarResNet, import_timm, pooling_of
from fastlt.models.classifier import Classifier
from fastlt.models.heads import LinearHead


def timm_model(
    model: Classifier, described: dict[str, Any], size: int
) -> tuple[nn.Module, str] | None:
    """Return a model of timm with the weights of a trained one, and the name of its classifier.

    described: the section [model] of its run; size: pixels a side of its images.

    None where timm has no such model: another backbone, a changed one, or a head that is not
    linear.
    """
    if type(model) is not Classifier or type(model.head) is not LinearHead:
        return None
    if isinstance(model.backbone, CifarResNet) or described.get("projection"):
        return None
    name, classes = described["name"], len(model.head.weight)
    options = timm_options(described, size)
    whole = import_timm(name).create_model(name, num_classes=classes, **options)
    head = whole.get_classifier()
    place = next((key for key, module in whole.named_modules() if module is head), "")
    if not isinstance(head, nn.Linear) or not place:
        return None
    try:
        whole.load_state_dict(timm_names(model, place))
    except RuntimeError:  # a method has changed the backbone
        return None
    return whole.eval(), place


def timm_options(described: dict[str, Any], size: int) -> dict[str, Any]:
    """Return the arguments of timm's model besides its name."""
    cfg = import_timm(described["name"]).models.get_pretrained_cfg(described["name"])
    fixed = {"img_size": size} if cfg is not None and cfg.fixed_input_size else {}
    pooling = described.get("pooling", "default")
    averaged = pooling_of(ModelConfig(name=described["name"], pooling=pooling))
    return fixed | described.get("args", {}) | averaged


def timm_names(model: Classifier, classifier: str) -> dict[str, Tensor]:
    """Return the tensors of a model under timm's names."""
    backbone = model.backbone.state_dict()
    head = model.head.state_dict()
    return {**backbone, **{f"{classifier}.{name}": tensor for name, tensor in head.items()}}


def write_config(
    whole: Any,
    folder: Path,
    classes: list[str],
    described: dict[str, Any],
    are_shrunk: bool,
) -> None:
    """Write config.json as timm does: architecture, names of classes, and its preprocessing.

    are_shrunk: whether images are larger than what the model is given, and so averaged over areas.
    """
    from timm.models._hub import save_config_for_hf  # present: the model is timm's

    data = described["data"]
    size, resize = data["size"], data["eval_resize"] or data["size"]
    preprocessing = {
        "mean": list(data["mean"]),
        "std": list(data["std"]),
        "input_size": [3, size, size],
        "crop_pct": crop_share(size, resize),
        "crop_mode": "center",
        "interpolation": "box" if are_shrunk else "bilinear",
    }
    config = {"label_names": classes, "pretrained_cfg": preprocessing}
    options = timm_options(described["model"], size)
    save_config_for_hf(whole, str(folder / "config.json"), config, options or None)


def crop_share(size: int, resize: int) -> float:
    """Return the share of the crop by which timm resizes to just so many pixels.

    It takes size / share, rounded down, for the shorter side.
    """
    share = size / resize
    return share if math.floor(size / share) == resize else size / (resize + 0.01)


def load_timm_folder(folder: Path) -> nn.Module:
    """Return the model of a folder by timm's own loader, in evaluation mode."""
    return import_timm("").create_model(f"local-dir:{folder}", pretrained=True).eval()
