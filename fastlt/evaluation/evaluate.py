"""Evaluation: masked to the targets, no prior, no silencing."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from fastlt.classes import ClassSpace
from fastlt.config import Config, DataConfig, load_config
from fastlt.data.geometry import Geometry
from fastlt.data.loader import Feed, Loader
from fastlt.data.plan import Batch, evaluation_batches, target_counts
from fastlt.errors import UserError
from fastlt.evaluation.calibration import (
    fitted,
    losses_by_temperature,
    read_calibration,
    with_thresholds,
    write_calibration,
)
from fastlt.evaluation.forward import output_of
from fastlt.evaluation.metrics import Predictions, confusions, score
from fastlt.evaluation.posthoc import (
    METHODS,
    RETRAIN,
    Features,
    Method,
    applies,
    apply,
    check_methods,
    choose,
    set_aside,
)
from fastlt.evaluation.retrain import retraining
from fastlt.losses import log_prior as log_prior_of
from fastlt.models.classifier import Classifier
from fastlt.models.device import choose_device, on_device
from fastlt.models.export import load_exported
from fastlt.packing.reader import Pack, Split, open_pack
from fastlt.utils.files import whole_file, write_text
from fastlt.utils.progress import rated_progress
from fastlt.utils.run_files import result_of

EVALUATION_BATCH = 256


def evaluation_geometry(config: DataConfig) -> Geometry:
    """Return how images are cut for evaluation: their centre, of `size` pixels a side."""
    return Geometry("centre-crop", config.size, resize=config.eval_resize or config.size)


@torch.inference_mode()
def predict(
    model: nn.Module,
    loader: Feed,
    batches: Iterable[Batch],
    config: DataConfig,
    space: ClassSpace,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    temperature: float = 1.0,
    on_logits: Callable[[Tensor, Tensor], Any] | None = None,
) -> Predictions:
    """Return the predictions of a model in evaluation mode, which is put back afterwards.

    temperature: what logits are divided by. on_logits is called with the logits (N, T) of each
    batch, as the model gives them, and its labels (N,) on the device.
    """
    was_training = model.training
    model.eval()
    rows: list[tuple[np.ndarray, np.ndarray, Tensor, Tensor]] = []
    for batch, images in loader.iterate(batches):
        logits = output_of(model, images, config.mean, config.std, device, dtype)
        logits = logits[:, : space.num_targets].float()
        if on_logits is not None:
            on_logits(logits, torch.from_numpy(batch.labels).long().to(logits.device))
        probabilities = (logits / temperature).softmax(dim=1)
        rows.append((batch.images, batch.labels, *probabilities.max(dim=1)))
    model.train(was_training)
    if not rows:
        raise UserError("there is no validation image: pack one with --val")
    images, labels, confidence, predicted = zip(*rows, strict=True)
    return Predictions(
        np.concatenate(images),
        np.concatenate(labels).astype(np.int32),
        torch.cat(predicted).cpu().numpy().astype(np.int32),
        torch.cat(confidence).cpu().numpy(),
    )


def save_predictions(predictions: Predictions, path: Path) -> None:
    """Write predictions to an .npz file."""
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **vars(predictions))


class Opened(NamedTuple):
    """A trained model, and the images to score it on."""

    config: Config
    space: ClassSpace  # the run's: groups are by its own training images
    model: Classifier
    loader: Loader
    pack: Pack
    device: torch.device
    dtype: torch.dtype
    split: Split

    @property
    def parts(self) -> tuple[DataConfig, ClassSpace, torch.device, torch.dtype]:
        """What `predict` takes besides a model and its images."""
        return self.config.data, self.pack.space, self.device, self.dtype

    def batches(self) -> Iterator[Batch]:
        """Return the batches of the split, in its order."""
        return evaluation_batches(
            self.split, evaluation_geometry(self.config.data), EVALUATION_BATCH
        )


@contextmanager
def opened(run: Path, pack: Path | str | None, split: str = "val") -> Iterator[Opened]:
    """Open a run, and the images of `val` or `test` to score it on.

    Device and engine are what this machine has, wherever the model was trained. Raises UserError
    for other splits.
    """
    if split not in ("val", "test"):
        raise UserError(f"there is no split '{split}' to score on: val or test")
    config = run_config(run)
    config = config.model_copy(update={"train": config.train.model_copy(update={"device": "auto"})})
    images = open_pack(pack or config.data.pack, round(config.data.cache_gb * 1e9))
    model, names = load_exported(run / "model.safetensors")
    check_targets(names, images)
    device, dtype = choose_device(config)
    scored = images.test if split == "test" else images.val
    if scored is None:
        raise UserError(
            f"the pack {images.path} has no test images: pack it with --test, or leave out "
            "--split test"
        )
    loader = Loader(scored, config.data.size, "auto", config.data.workers, images.betons(split))
    try:
        space = ClassSpace.load(run / "classes.json")
        model = on_device(model, config, device)
        yield Opened(config, space, model, loader, images, device, dtype, scored)
    finally:
        loader.close()


def evaluate_run(
    run: Path,
    pack: Path | str | None = None,
    split: str = "val",
    precision: float | None = None,
) -> dict[str, Any]:
    """Score RUN/model.safetensors on a split of its pack, or of another one of the same targets.

    Returns what `score` does and the confusions, and `best` where the images are those that the run
    was evaluated on. Groups are by the run's own training images. The result on the `test` images
    of the run's own pack is written to RUN/test.json too.

    precision: of predictions that are not called unsure; the thresholds for it are chosen on these
    images, stored in RUN/calibration.json, and returned as `calibration`.
    """
    if precision is not None and split == "test":
        raise UserError(
            "thresholds are not chosen on test images, whose figures would flatter then: leave out "
            "--split test, or name a pack with --data"
        )
    losses: list[Tensor] = []
    with opened(run, pack, split) as it:
        predictions = predict(
            it.model,
            it.loader,
            it.batches(),
            *it.parts,
            on_logits=lambda *batch: losses.append(losses_by_temperature(*batch)),
        )
        result = score(predictions, it.space, it.config.data.grouping)
        known = read_calibration(run)
        if pack is None and split == "val" and not known.images:
            known = fitted(losses, len(predictions.label))
            write_calibration(run, known)
        if precision is not None:
            at = known.temperature
            sure = predict(it.model, it.loader, it.batches(), *it.parts, temperature=at)
            known = with_thresholds(known, sure, it.space.target_names, precision)
            write_calibration(run, known)
            result["calibration"] = known.model_dump()
    result = {**result, "confusion": confusions(predictions)}
    if pack is None and split == "test":
        write_text(run / "test.json", json.dumps(result, indent=1) + "\n")
    return result | (
        {"best": (result_of(run) or {}).get("best", {})} if pack is None and split == "val" else {}
    )


@torch.inference_mode()
def features_of(it: Opened) -> Features:
    """Return what the head takes of every image."""
    if not len(it.split):
        raise UserError(f"{it.pack.path} has no validation image: pack one with --val")
    it.model.eval()
    data = it.config.data
    images, labels, values = [], [], []
    with rated_progress(Console(), "images/s", transient=True) as bar:
        task = bar.add_task("features", total=len(it.split))
        for batch, pixels in it.loader.iterate(it.batches()):
            found = output_of(it.model.features, pixels, data.mean, data.std, it.device, it.dtype)
            values.append(found.float())
            images.append(batch.images)
            labels.append(batch.labels)
            bar.advance(task, len(batch.images))
    return Features(np.concatenate(images), np.concatenate(labels), torch.cat(values))


def retrained(it: Opened) -> Method:
    """Return the post-hoc method of a new classifier on the run's training images of targets."""
    pack = open_pack(it.config.data.pack, round(it.config.data.cache_gb * 1e9))
    check_targets(it.space.target_names, pack)
    targets = np.flatnonzero(pack.train.label < it.space.num_targets)
    split = pack.train.subset(targets)
    loader = Loader(split, it.config.data.size, "auto", it.config.data.workers)
    with closing(loader):
        found = features_of(it._replace(loader=loader, pack=pack, split=split))
    counts = np.bincount(found.label, minlength=it.space.num_targets)
    prior = log_prior_of(torch.from_numpy(counts), 1.0).to(it.device)
    # not tensors of inference mode, which no gradient goes through
    values, labels = found.values.clone(), torch.from_numpy(found.label).to(it.device)
    return retraining(values, labels, prior)


def evaluate_post_hoc(
    run: Path,
    methods: list[str],
    pack: Path | str | None,
    validation: Path | str | None,
    share: float,
    strength: float | None,
) -> dict[str, dict[str, Any]]:
    """`fastlt eval --post-hoc`: what `score` says of the model as trained, and with each method,
    all on the same images.

    A method's strength, in its result, is chosen on the val split of the pack `validation`; without
    one, on `share` of the images of each class, which are not scored then. strength: fixes it, and
    nothing is set aside. methods: names, or `all` alone, for those of METHODS that make a
    difference to the model.
    """
    with opened(run, pack) as it:
        methods = (
            [name for name in METHODS if applies(name, it.model)] if methods == ["all"] else methods
        )
        check_methods(methods, it.model)
        tested = features_of(it)
        log_prior = target_log_prior(it).to(it.device)
        chosen_on = tested
        if strength is None and validation is None:
            aside = set_aside(tested.label, share)
            if not aside.any():
                raise UserError(
                    "no class has two validation images, so none can be set aside: name a pack "
                    "with --validation"
                )
            chosen_on, tested = tested.take(aside), tested.take(~aside)
        elif strength is None:
            with opened(run, validation) as other:
                check_apart(other.pack.val, it.pack.val, str(validation))
                chosen_on = features_of(other)
        grouping = it.config.data.grouping
        plain = apply(None, 0, it.model, tested, log_prior)
        results = {"as trained": score(plain, it.space, grouping)}
        for name in methods:
            method = retrained(it) if name == RETRAIN else METHODS[name]
            best = choose(method, it.model, chosen_on, log_prior) if strength is None else strength
            results[name] = {
                "strength": best,
                **score(apply(method, best, it.model, tested, log_prior), it.space, grouping),
            }
        for result in results.values():
            result |= {
                "images": len(tested.label),
                "chosen_on": 0 if strength is not None else len(chosen_on.label),
            }
        return results


def check_apart(chosen_on: Split, scored: Split, place: str) -> None:
    """A strength that was chosen on the images that it is scored on would flatter.

    Bytes are read only of images of one size.
    """
    sizes = set(scored.size.tolist())
    if not sizes.intersection(chosen_on.size.tolist()):
        return
    known = {hashlib.sha256(scored.read(image)).digest() for image in range(len(scored))}
    alike = [image for image in range(len(chosen_on)) if int(chosen_on.size[image]) in sizes]
    shared = sum(hashlib.sha256(chosen_on.read(image)).digest() in known for image in alike)
    if shared:
        raise UserError(
            f"{shared:,} of the {len(chosen_on):,} validation images of {place} are those that are "
            "scored: name another pack with "
            "--validation, or set some aside with --share"
        )


def target_log_prior(it: Opened) -> Tensor:
    """Return the log prior of the targets, as they were sampled, (T,) float32."""
    stored = np.array(it.space.train_counts[: it.space.num_targets])
    return log_prior_of(
        torch.from_numpy(target_counts(stored, it.config.data.target_sampling)), 1.0
    )


def check_targets(names: list[str], pack: Pack) -> None:
    """Raise UserError where a pack has other targets than `names`."""
    if names != pack.space.target_names:
        raise UserError(
            f"the model was trained for other targets than those of {pack.path}: evaluate it on a "
            "pack of the same target classes"
        )


def run_config(run: Path) -> Config:
    """Return the configuration that a run was trained with."""
    if not (run / "config.toml").is_file():
        raise UserError(
            f"there is no run at {run}: it has no config.toml; train one with `fastlt train`"
        )
    return load_config(str(run / "config.toml"))
