"""Weight-space ensembling of a trained model with the weights it started from (WiSE-FT, Wortsman et
al. 2022, arXiv 2109.01903).

A model between the two keeps more of what the pretrained one knew of images unlike those it was
fine-tuned on, at the cost of one model.
"""

import copy
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastlt.config import Config, with_changes
from fastlt.decode.deep import scale_of
from fastlt.errors import UserError
from fastlt.evaluation.evaluate import opened, predict, run_config
from fastlt.evaluation.metrics import score
from fastlt.models.classifier import Classifier
from fastlt.models.device import on_device
from fastlt.models.export import export_safetensors, load_exported, read_metadata
from fastlt.models.heads import HEADS
from fastlt.training.distributed import process_group
from fastlt.training.loop import open_packs
from fastlt.training.setup import prepare, start_stage
from fastlt.utils.files import whole_folder
from fastlt.utils.progress import rated_progress
from fastlt.utils.run_files import MODEL

WEIGHTS = tuple(tenth / 10 for tenth in range(11))
KEPT = ("config.toml", "classes.json")  # of a RUN, beside the model


class Ends(NamedTuple):
    """The two models of a run, both of the targets alone."""

    start: Classifier
    end: Classifier
    has_start_head: bool  # whether the head began as something else than chance


def blend_run(run: Path, weight: float, out: Path) -> None:
    """Write to a new folder OUT the model of a RUN whose weights are (1 - weight) of those that it
    started from and `weight` of those that it ended with.

    OUT is evaluated, exported and predicted with as a RUN. Raises UserError where the start of the
    run is not known any more.
    """
    if not 0 <= weight <= 1:
        raise UserError(f"--weight {weight} must be from 0, the start, to 1, the end of the run")
    if out.exists():
        raise UserError(f"{out} is there already: name another folder with --out")
    config = run_config(run)
    model = between(ends_of(run, config), weight)
    described = read_metadata(run / MODEL)
    with whole_folder(out) as folder:
        for name in KEPT:
            shutil.copy(run / name, folder / name)
        classes, prior = described["classes"], described.get("prior")
        scale = scale_of(described.get("scale"))
        export_safetensors(model, config, classes, folder / MODEL, prior, scale)


def score_blends(run: Path) -> dict[float, dict[str, Any]]:
    """Return the figures on validation images of eleven models from the start to the end of a run,
    by their weight.
    """
    ends, found = ends_of(run, run_config(run)), {}
    with opened(run, None) as it, rated_progress(None, "models/s", transient=True) as bar:
        for weight in bar.track(WEIGHTS, description="blending"):
            model = on_device(between(ends, weight), it.config, it.device)
            predictions = predict(model, it.loader, it.batches(), *it.parts)
            found[weight] = score(predictions, it.space, it.config.data.grouping)
    return found


def ends_of(run: Path, config: Config) -> Ends:
    """Return a run's model as it started and as it ended.

    Raises UserError where it did not start from pretrained weights, or in a way that has no start.
    """
    model = config.model
    if model.adapt.startswith("vpt"):
        raise UserError(
            f"the prompts of model.adapt={model.adapt} start at random, and have nothing to be "
            "blended with: take another kind"
        )
    if config.method.name != "plain" or not (model.weights or model.pretrained):
        raise UserError(
            f"{run} did not start from pretrained weights by the plain method: there is nothing to "
            "blend it with"
        )
    end, _ = load_exported(run / MODEL)
    here = with_changes(config, {"train.device": "auto"})  # wherever it was trained
    with (
        process_group(HEADS[model.head].is_sharded),
        prepare(here, Path(os.devnull), open_packs(here.data)) as trainer,
    ):
        start_stage(trainer)
        start = trainer.model.predicting(len(end.head.weight)).eval().cpu()
    return Ends(start, end, bool(model.head_weights))


@torch.no_grad()
def between(ends: Ends, weight: float) -> Classifier:
    """Return the model between the start (weight 0) and the end (1) of a run.

    A head that began by chance stays as it ended.
    """
    model = copy.deepcopy(ends.end)
    begun = ends.start.state_dict()
    for name, tensor in model.state_dict().items():
        is_chance = name.startswith("head.") and not ends.has_start_head
        if tensor.is_floating_point() and not is_chance:
            tensor.copy_(torch.lerp(begun[name].to(tensor.dtype), tensor, weight))
    return model
