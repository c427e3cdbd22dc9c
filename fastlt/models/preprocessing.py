"""What images were made into for the weights that a model starts from: size, mean, deviation."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fastlt.config import Config, DataConfig, ModelConfig, with_changes
from fastlt.models.backbones import CIFAR_DEPTHS, import_timm
from fastlt.models.export import find_metadata
from fastlt.models.weight_files import weights_file

AREA = "area"  # how the loaders shrink images, as timm calls it


class Preprocessing(NamedTuple):
    """How images are prepared for some weights."""

    size: int
    """Pixels a side."""
    crop_share: float
    """Side of the centre crop over the shorter side of the image."""
    mean: tuple[float, ...]
    """Of red, green and blue, of values from 0 to 1."""
    std: tuple[float, ...]
    """Of red, green and blue."""
    interpolation: str
    """The filter by which images are resized."""
    source: str
    """Whose it is, in words."""


def with_preprocessing(config: Config) -> tuple[Config, list[str]]:
    """Return a configuration whose images are those of the weights, where it does not say itself.

    With it comes a sentence about what was taken, and one about each value that differs from the
    weights' because a recipe or the user has set it.
    """
    found = preprocessing_of(config.model)
    if found is None:
        return config, []
    data, given = config.data, config.data.model_fields_set
    wanted = wanted_of(found, data)
    taken = {key: value for key, value in wanted.items() if key not in given}
    kept = [key for key in ("mean", "std") if key in given and getattr(data, key) != wanted[key]]
    said = []
    if taken:
        values = ", ".join(f"data.{key}={shown(value)}" for key, value in taken.items())
        said.append(f"{values}, as {found.source} has it")
    if kept:
        theirs = ", ".join(f"data.{key}={shown(wanted[key])}" for key in kept)
        said.append(f"{found.source} has {theirs}, which your settings or the recipe's replace")
    if taken and found.interpolation != AREA:
        said.append(
            "images are resized by averaging areas; those of the weights were "
            f"{found.interpolation}"
        )
    changes = {f"data.{key}": value for key, value in taken.items()}
    return with_changes(config, changes) if changes else config, said


def wanted_of(found: Preprocessing, data: DataConfig) -> dict[str, Any]:
    """Return keys of [data] by the weights, for the size that the configuration has set, if any."""
    given = data.model_fields_set
    is_too_large = "eval_resize" in given and 0 < data.eval_resize < found.size
    size = data.size if "size" in given or is_too_large else found.size
    resize = round(size / found.crop_share)
    wanted = {"size": size, "eval_resize": resize, "mean": found.mean, "std": found.std}
    if is_too_large:
        del wanted["size"]
    return wanted


def preprocessing_of(model: ModelConfig) -> Preprocessing | None:
    """Return how images are prepared for the weights of a configuration; None where not known."""
    if model.weights:
        path = weights_file(model.weights)
        if (described := find_metadata(path)) is not None:
            return of_fastlt(described["data"], model.weights)
        if (cfg := stored_cfg(path.parent)) is not None:
            return of_timm(cfg, model.weights)
    elif not model.pretrained:
        return None
    if model.name in [f"resnet{depth}" for depth in CIFAR_DEPTHS]:
        return None
    timm = import_timm(model.name)
    known = timm.models.get_pretrained_cfg(model.name) if timm.is_model(model.name) else None
    return None if known is None else of_timm(known.to_dict(), f"timm's {model.name}")


def stored_config(folder: Path) -> dict[str, Any]:
    """Return the config.json of a folder, as timm writes them; empty where it has none."""
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def stored_cfg(folder: Path) -> dict[str, Any] | None:
    """Return the pretrained_cfg of a folder as timm writes them; None where it has none."""
    cfg = stored_config(folder).get("pretrained_cfg")
    return cfg if isinstance(cfg, dict) and {"mean", "std", "input_size"} <= cfg.keys() else None


def stored_architecture(folder: Path) -> str | None:
    """Return the name of the model in a folder as timm writes them; None where it has none."""
    found = stored_config(folder).get("architecture")
    return found if isinstance(found, str) else None


def of_timm(cfg: Mapping[str, Any], source: str) -> Preprocessing:
    """Return what a pretrained_cfg of timm says."""
    return Preprocessing(
        int(cfg["input_size"][-1]),
        float(cfg.get("crop_pct") or 1.0),
        tuple(cfg["mean"]),
        tuple(cfg["std"]),
        str(cfg.get("interpolation") or "bilinear"),
        source,
    )


def of_fastlt(data: Mapping[str, Any], source: str) -> Preprocessing:
    """Return what a model of fastlt says of its images."""
    share = data["size"] / (data["eval_resize"] or data["size"])
    return Preprocessing(data["size"], share, tuple(data["mean"]), tuple(data["std"]), AREA, source)


def shown(value: Any) -> str:
    """Return a value as it is typed on the command line."""
    if isinstance(value, tuple):
        return "[" + ",".join(f"{number:g}" for number in value) + "]"
    return str(value)
