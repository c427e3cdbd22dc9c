"""`fastlt probe`: how far a backbone's features go on a pack, without training it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastlt.classes import ClassSpace
from fastlt.config import Config, ModelConfig, as_override, load_config
from fastlt.errors import UserError
from fastlt.evaluation.metrics import Predictions, score
from fastlt.evaluation.probe import (
    Labelled,
    Probe,
    choose_neighbours,
    choose_strength,
    linear_probe,
    nearest_mean,
    nearest_neighbours,
    prototypes,
    standardised,
    with_one,
)
from fastlt.models.classifier import Classifier, build_model
from fastlt.models.device import find_device
from fastlt.models.preprocessing import with_preprocessing
from fastlt.models.start import class_vectors
from fastlt.packing.reader import Pack, open_pack
from fastlt.training.features import features_of
from fastlt.utils.files import write_text
from fastlt.utils.progress import rated_progress

SILENCE = 0.1
PROBE = "probe.json"
GROUPS = ("many", "medium", "few")


class ProbeOptions(NamedTuple):
    """The options of the command."""

    pack: str
    backbone: str
    weights: str = ""
    size: int = 0  # pixels; 0: as the weights have it
    split: str = "val"
    text: str = ""  # as `model.head_weights`: FILE.npz, FILE.npz:KEY or open-clip:MODEL/WEIGHTS
    out: Path | None = None
    device: str = "auto"
    templates: tuple[str, ...] = ModelConfig.model_fields["templates"].default
    settings: tuple[str, ...] = ()  # further ones, of how the backbone is built and images are cut


class Row(NamedTuple):
    """A classifier and its figures."""

    name: str
    figures: dict[str, Any]


def run_probe(options: ProbeOptions, console: Console) -> list[Row]:
    """Compute the features of a pack once, print how classifiers of them do, and return the rows.

    Strengths and numbers of neighbours are chosen on training images alone. Raises UserError where
    the pack has no such split, or there are no weights.
    """
    pack = open_pack(options.pack)
    split = getattr(pack, options.split)
    if split is None:
        raise UserError(f"{options.pack} has no {options.split} images: pack it with --test")
    config, said = with_preprocessing(probed_config(options))
    for note in said:
        console.print(f"[yellow]note:[/] {note}", highlight=False, soft_wrap=True)
    model = build_model(config.model, 1, config.data.size)
    train, tested = (
        labelled(model, pack, config, name, options, console) for name in ("train", options.split)
    )
    rows = []
    with rated_progress(console, "probes/s", transient=True) as progress:
        probes = list(classifiers(pack.space, options))
        for name, scores_of in progress.track(probes, description="probing"):
            scores = scores_of(train, tested)
            rows.append(Row(*scored(name, scores, tested.labels, pack.space)))
    console.print(table_of(rows, options))
    if options.out is not None:
        write_rows(options.out, rows, options, config)
    return rows


def probed_config(options: ProbeOptions) -> Config:
    """Return the configuration that names backbone, weights and pack."""
    overrides = [
        as_override("model.name", options.backbone),
        as_override("model.weights", options.weights),
        f"model.pretrained={json.dumps(not options.weights)}",
        as_override("data.pack", options.pack),
    ]
    if options.size:
        overrides.append(f"data.size={options.size}")
    if options.text and "clip" in options.backbone:
        overrides.append("model.projection=true")  # into the space of the texts
    return load_config("fit", [*overrides, *options.settings])


def labelled(
    model: Classifier,
    pack: Pack,
    config: Config,
    split: str,
    options: ProbeOptions,
    console: Console,
) -> Labelled:
    """Return the features of a split, from the disk where they are, with its labels."""
    device = find_device(options.device)
    model.to(device)
    folder = options.out or Path.home() / ".cache" / "fastlt"
    features = features_of(model, pack, config, device, folder, console, split)
    labels = torch.from_numpy(getattr(pack, split).label.astype("int64"))
    return Labelled(features.float(), labels)


# --- classifiers

Scores = Callable[[Labelled, Labelled], tuple[str, Tensor]]


def classifiers(space: ClassSpace, options: ProbeOptions) -> Iterator[tuple[str, Scores]]:
    """Yield the name of each classifier, and what gives a remark and scores (n, T) of features."""
    targets = space.num_targets

    def of_targets(train: Labelled) -> Labelled:
        return train.take(train.labels < targets)

    if options.text:
        vectors = class_vectors(options.text, space.targets_only(), options.templates)
        yield "zero-shot, text", lambda train, tested: ("", cosine(tested.features, vectors))
    yield (
        "nearest class mean",
        lambda train, tested: ("", nearest_mean(of_targets(train), tested.features, targets)),
    )
    yield (
        "prototypes, cosine",
        lambda train, tested: ("", prototypes(of_targets(train), tested.features, targets)),
    )

    def neighbours(train: Labelled, tested: Labelled) -> tuple[str, Tensor]:
        own = of_targets(train)
        k = choose_neighbours(own, targets)
        return f"k = {k}", nearest_neighbours(own, tested.features, targets, k)

    yield "nearest neighbours", neighbours
    yield "linear, cross entropy", linear(space, has_prior=False)
    yield "linear, balanced softmax", linear(space)
    if space.num_auxiliaries:
        yield "linear, with auxiliaries", linear(space, has_auxiliaries=True)
        if space.pairs:
            yield (
                f"linear, silenced {SILENCE:g}",
                linear(space, has_auxiliaries=True, silence=SILENCE),
            )


def linear(
    space: ClassSpace,
    has_prior: bool = True,
    has_auxiliaries: bool = False,
    silence: float = 1.0,
) -> Scores:
    """Return what trains a linear probe, of which the targets' rows predict."""
    targets = space.num_targets
    classes = space.num_classes if has_auxiliaries else targets
    counts = torch.tensor(space.train_counts[:classes], dtype=torch.float32)
    prior = (counts / counts.sum()).log() if has_prior else None
    graph = space.graph() if silence < 1 else None
    probe = Probe(classes, prior, graph, silence)

    def scores(train: Labelled, tested: Labelled) -> tuple[str, Tensor]:
        own = train.take(train.labels < classes)
        seen, held = standardised(own.features, [tested.features])
        own = own._replace(features=seen)
        strength = choose_strength(own, probe, targets)
        start = torch.zeros(classes, seen.shape[1] + 1)
        weights = linear_probe(own, probe, strength, start)
        return f"L2 {strength:g}", with_one(held) @ weights[:targets].T

    return scores


def cosine(features: Tensor, vectors: Tensor) -> Tensor:
    """Return the cosines (n, T). UserError where the two are of different width."""
    if features.shape[1] != vectors.shape[1]:
        raise UserError(
            f"the vectors of --text have {vectors.shape[1]} numbers, the features "
            f"{features.shape[1]}: both must be of one model, such as CLIP's"
        )
    unit = torch.nn.functional.normalize
    return unit(features) @ unit(vectors).T


# --- what is shown


def scored(
    name: str, found: tuple[str, Tensor], labels: Tensor, space: ClassSpace
) -> tuple[str, dict[str, Any]]:
    """Return the name of a classifier with its remark, and its figures."""
    remark, scores = found
    confidence, predicted = scores.softmax(dim=1).max(dim=1)
    number = torch.arange(len(labels)).numpy()
    predictions = Predictions(
        number,
        labels.numpy().astype("int32"),
        predicted.numpy().astype("int32"),
        confidence.numpy(),
    )
    figures = score(predictions, space)
    kept = {key: figures[key] for key in ("top1", "balanced_accuracy", *GROUPS)}
    return (f"{name} ({remark})" if remark else name), kept


def table_of(rows: list[Row], options: ProbeOptions) -> Table:
    """Return the table of all rows, the best balanced accuracy in bold."""
    table = Table(
        title=f"{options.backbone} on {options.split}, features that stand still, in percent",
        title_justify="left",
    )
    table.add_column("classifier")
    for column in ("top-1", "balanced", *GROUPS):
        table.add_column(column, justify="right")
    best = max(row.figures["balanced_accuracy"] for row in rows)
    for row in rows:
        style = "bold" if row.figures["balanced_accuracy"] == best else ""
        values = ["-" if value is None else f"{value:.1f}" for value in row.figures.values()]
        table.add_row(row.name, *values, style=style)
    return table


def write_rows(out: Path, rows: list[Row], options: ProbeOptions, config: Config) -> None:
    """Write OUT/probe.json."""
    out.mkdir(parents=True, exist_ok=True)
    found = {
        "pack": options.pack,
        "backbone": options.backbone,
        "weights": options.weights,
        "size": config.data.size,
        "split": options.split,
        "rows": [{"classifier": row.name, **row.figures} for row in rows],
    }
    write_text(out / PROBE, json.dumps(found, indent=1) + "\n")
