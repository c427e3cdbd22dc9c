"""Evaluation: masked to the targets, no prior, no silencing."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastlt.classes import ClassSpace
from fastlt.config import Config, DataConfig, load_config
from fastlt.data.augment import Geometry
from fastlt.data.batch import normalise
from fastlt.data.loader import Loader
from fastlt.data.packed import Pack, open_pack
from fastlt.data.plan import Batch, evaluation_batches
from fastlt.errors import UserError
from fastlt.export import load_exported
from fastlt.files import whole_file
from fastlt.metrics import Predictions, confusions, score
from fastlt.prepare import choose_device, on_device

EVALUATION_BATCH = 256


def evaluation_geometry(config: DataConfig) -> Geometry:
    return Geometry("centre-crop", config.size, resize=config.eval_resize or config.size)


@torch.inference_mode()
def predict(model: nn.Module, loader: Loader, batches: Iterable[Batch], config: DataConfig, space: ClassSpace, device: torch.device,
            dtype: torch.dtype = torch.float32) -> Predictions:  # fmt: skip
    """Runs the model over the batches in evaluation mode; the mode is put back afterwards."""
    was_training = model.training
    model.eval()
    rows: list[tuple[np.ndarray, np.ndarray, Tensor, Tensor]] = []
    for batch, images in loader.iterate(batches):
        x = normalise(images.to(device, non_blocking=True), config.mean, config.std, channels_last=True)
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            logits = model(x)
        probabilities = logits[:, : space.num_targets].float().softmax(dim=1)
        rows.append((batch.images, batch.labels, *probabilities.max(dim=1)))
    model.train(was_training)
    if not rows:
        raise UserError("there is no validation image: pack one with --val")
    images, labels, confidence, predicted = zip(*rows, strict=True)
    return Predictions(
        np.concatenate(images), np.concatenate(labels).astype(np.int32),
        torch.cat(predicted).cpu().numpy().astype(np.int32), torch.cat(confidence).cpu().numpy(),
    )  # fmt: skip


def save_predictions(predictions: Predictions, path: Path) -> None:
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **vars(predictions))


def evaluate_run(run: Path, pack: Path | str | None = None) -> dict[str, Any]:
    """`fastlt eval`: scores RUN/model.safetensors on the val split of its pack, or of another one with the same targets.

    Returns what `score` does and the confusions, and `best` where the images are those that the run was evaluated on. Groups are
    by the run's own training images. Device and engine are what this machine has, wherever the model was trained.
    """
    config = run_config(run)
    config = config.model_copy(update={"train": config.train.model_copy(update={"device": "auto"})})
    opened = open_pack(pack or config.data.pack, round(config.data.cache_gb * 1e9))
    model, names = load_exported(run / "model.safetensors")
    check_targets(names, opened)
    device, dtype = choose_device(config)
    loader = Loader(opened.val, config.data.size, "auto", config.data.workers, opened.beton.get("val"))
    try:
        batches = evaluation_batches(opened.val, evaluation_geometry(config.data), EVALUATION_BATCH)
        predictions = predict(on_device(model, config, device), loader, batches, config.data, opened.space, device, dtype)
    finally:
        loader.close()
    result = score(predictions, ClassSpace.load(run / "classes.json"))
    return {**result, "confusion": confusions(predictions), **({"best": best_of(run)} if pack is None else {})}


def best_of(run: Path) -> dict[str, Any]:
    """The best epoch, as training noted it."""
    path = run / "result.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))["best"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read {path}: call `fastlt train` again, which goes on where it stopped") from error


def check_targets(names: list[str], pack: Pack) -> None:
    if names != pack.space.target_names:
        raise UserError(
            f"the model was trained for other targets than those of {pack.path}: evaluate it on a pack of the same target classes"
        )


def run_config(run: Path) -> Config:
    if not (run / "config.toml").is_file():
        raise UserError(f"there is no run at {run}: it has no config.toml; train one with `fastlt train`")
    return load_config(str(run / "config.toml"))
