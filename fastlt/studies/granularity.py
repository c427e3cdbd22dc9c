"""`fastlt granularity score`: how fine the classes of a pack are, by features alone.

Of each class the medoid stands for it: the image nearest to all the others. A class is fine where
other classes' medoids are as near to its images as its own (ranking with medoids, after Cui et al.
2019, arXiv 1912.10154: 0 is the finest, 1 the coarsest).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastlt.classes import ClassSpace
from fastlt.errors import UserError
from fastlt.evaluation.feature_settings import FeatureSettings
from fastlt.evaluation.features import extract, open_backbone
from fastlt.packing.reader import open_pack
from fastlt.studies.hierarchy import Level, read_hierarchy
from fastlt.utils.files import write_text
from fastlt.utils.progress import rated_progress

SHOWN = 12  # pairs of targets
BLOCK = 4096  # images whose distances are made together


class Score(NamedTuple):
    """The granularity of features under one labelling; distances are 1 - cosine."""

    classes: int
    # 1, the coarsest: every image is nearest to its own class' medoid; 0.5: labels say nothing; 0,
    # the finest
    granularity: float
    within: float  # of an image to its class' medoid, mean over classes
    between: float  # of a class' medoid to the nearest other one, mean over classes

    @property
    def ratio(self) -> float:
        """The width of classes over the distance between them; above 1 they overlap."""
        return self.within / max(self.between, 1e-12)


class Between(NamedTuple):
    """Two targets that are near to each other, and the auxiliary between them, if there is one."""

    target: str
    nearest: str
    distance: float  # of their medoids
    # share of their images that are nearer to the other's medoid than to their own, mean over the
    # two
    confused: float
    auxiliary: str
    to_both: tuple[float, float] | None


def score(features: np.ndarray, labels: np.ndarray) -> Score:
    """Return the granularity of features (n, D) of length 1 under labels (n,) int.

    Classes without images do not count. Raises UserError for fewer than two classes.
    """
    labels = np.unique(labels, return_inverse=True)[1]
    centres = medoids(features, labels)
    count = len(centres)
    if count < 2:
        raise UserError("granularity needs two classes with images at least")
    ranks, own = np.zeros(len(labels)), np.zeros(len(labels))
    for start in range(0, len(labels), BLOCK):
        part = slice(start, start + BLOCK)
        distance = 1 - features[part].astype(np.float32) @ centres.T
        own[part] = np.take_along_axis(distance, labels[part, None], axis=1)[:, 0]
        ranks[part] = (distance < own[part, None]).sum(axis=1) / (count - 1)
    sizes = np.bincount(labels)
    apart = 1 - centres @ centres.T
    np.fill_diagonal(apart, np.inf)
    of_classes = [float((np.bincount(labels, values) / sizes).mean()) for values in (ranks, own)]
    return Score(count, 1 - of_classes[0], of_classes[1], float(apart.min(axis=1).mean()))


def medoids(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return the image of each class with the highest sum of cosines, (classes, D) float32."""
    found = []
    for label in range(int(labels.max()) + 1):
        members = features[labels == label].astype(np.float32)
        found.append(members[int((members @ members.sum(axis=0)).argmax())])
    return np.stack(found)


def structure(features: np.ndarray, labels: np.ndarray, space: ClassSpace) -> list[Between]:
    """Return each target with images beside its nearest one, the nearest pairs first.

    labels (n,) are ids of the class space.
    """
    present = np.unique(labels)
    centres = medoids(features, np.searchsorted(present, labels))
    targets = np.flatnonzero(present < space.num_targets)
    distance = 1 - centres @ centres.T
    pairs = set()
    for target in targets.tolist():
        others = targets[targets != target]
        pairs.add(tuple(sorted((target, int(others[distance[target, others].argmin()])))))
    found = []
    for first, second in sorted(pairs):
        strayed = [
            nearer(features[labels == present[a]], centres[a], centres[b])
            for a, b in ((first, second), (second, first))
        ]
        between = in_the_middle(distance, first, second, len(targets))
        auxiliary, to_both = (
            ("", None) if between is None else (space.names[int(present[between[0]])], between[1])
        )
        one, other = (space.names[int(present[i])] for i in (first, second))
        found.append(
            Between(
                one, other, float(distance[first, second]), sum(strayed) / 2, auxiliary, to_both
            )
        )
    return sorted(found, key=lambda pair: pair.distance)


def nearer(features: np.ndarray, own: np.ndarray, other: np.ndarray) -> float:
    """Return the share of images (n, D) that are nearer to the other medoid than to their own.

    Medoids are (D,).
    """
    return float((features.astype(np.float32) @ (other - own) > 0).mean())


def in_the_middle(
    distance: np.ndarray, first: int, second: int, targets: int
) -> tuple[int, tuple[float, float]] | None:
    """Return the auxiliary that is nearest to both of two targets, and its distances.

    None where it is not nearer to each than they are to each other. distance (classes, classes),
    targets first.
    """
    worst = np.maximum(distance[first, targets:], distance[second, targets:])
    if not len(worst) or worst.min() >= distance[first, second]:
        return None
    middle = targets + int(worst.argmin())
    return middle, (float(distance[first, middle]), float(distance[second, middle]))


def labellings(
    labels: np.ndarray, space: ClassSpace, levels: Mapping[str, Level]
) -> dict[str, np.ndarray]:
    """Return labellings of the targets' images: labels (n,) of the pack, then of each level."""
    found = {"targets": labels}
    for name, level in levels.items():
        ids = {group: i for i, group in enumerate(sorted(set(level.values())))}
        found[name] = np.array([ids[level[target]] for target in space.target_names])[labels]
    return found


def run_granularity(
    place: str, settings: FeatureSettings, hierarchy: str, out: Path | None, console: Console
) -> None:
    """Print the scores of a pack, and the nearest targets; write them to `out`. Raises UserError.

    place: a pack, of whose training images the features are made; hierarchy: as read_hierarchy
    takes it, or "".
    """
    pack = open_pack(place)
    space, split = pack.space, pack.train
    levels = read_hierarchy(hierarchy, space.target_names) if hierarchy else {}
    try:
        backbone = open_backbone(settings)
    except UserError as error:
        raise UserError(
            str(error).replace("filter.weights=", "--weights ").replace("filter.", "--")
        ) from error
    with rated_progress(console, "images/s", transient=True) as bar:
        task = bar.add_task("looking at images", total=len(split))
        features = extract(
            backbone, split, settings.batch, settings.workers, lambda done: bar.advance(task, done)
        )
    of_targets = split.label < space.num_targets
    scores = {
        name: score(features[of_targets], of)
        for name, of in labellings(split.label[of_targets], space, levels).items()
    }
    if space.num_auxiliaries:
        scores["targets and auxiliaries"] = score(features, split.label)
    pairs = structure(features, split.label, space)
    show(scores, pairs, space, console)
    if out is not None:
        write_text(
            out,
            json.dumps(as_json(scores, pairs, backbone.name), ensure_ascii=False, indent=1) + "\n",
        )
        console.print(f"written to {out}", highlight=False, soft_wrap=True)


def as_json(scores: Mapping[str, Score], pairs: Sequence[Between], backbone: str) -> dict[str, Any]:
    """Return the figures as a JSON object."""
    entries = {name: {**of._asdict(), "ratio": of.ratio} for name, of in scores.items()}
    return {"backbone": backbone, "scores": entries, "nearest": [pair._asdict() for pair in pairs]}


def show(
    scores: Mapping[str, Score], pairs: Sequence[Between], space: ClassSpace, console: Console
) -> None:
    """Print the scores and the nearest targets."""
    table = Table(
        "classes",
        "",
        "granularity",
        "within",
        "between",
        "within / between",
        title_justify="left",
        title="how fine the classes are (distances are 1 - cosine)",
    )
    for name, of in scores.items():
        table.add_row(
            name,
            f"{of.classes:,}",
            f"{of.granularity:.4f}",
            f"{of.within:.3f}",
            f"{of.between:.3f}",
            f"{of.ratio:.2f}",
        )
    console.print(table)
    console.print(reading(scores), highlight=False, soft_wrap=True)
    near = Table(
        "target",
        "nearest target",
        "distance",
        "confused",
        "between them",
        title="the nearest targets",
        title_justify="left",
    )
    for pair in pairs[:SHOWN]:
        between = (
            f"{escape(pair.auxiliary)} ({pair.to_both[0]:.3f}, {pair.to_both[1]:.3f})"
            if pair.to_both
            else "-"
        )
        near.add_row(
            escape(pair.target),
            escape(pair.nearest),
            f"{pair.distance:.3f}",
            f"{pair.confused:.1%}",
            between,
        )
    console.print(near)
    if space.num_auxiliaries:
        filled = sum(pair.to_both is not None for pair in pairs)
        console.print(
            f"an auxiliary class lies between {filled:,} of {len(pairs):,} pairs of nearest "
            "targets",
            highlight=False,
        )


def reading(scores: Mapping[str, Score]) -> str:
    """Return what the figures mean for auxiliaries."""
    own, wide = scores["targets"], scores.get("targets and auxiliaries")
    text = (
        f"An image has {1 - own.granularity:.1%} of the other classes' medoids nearer than its "
        "own. Granularity is 1 where classes "
        "lie well apart, 0.5 where labels say nothing: the coarser, the more there is to gain from "
        "auxiliaries. It is by these "
        "features: compare packs by one backbone, and none that was trained on either."
    )
    if wide is None:
        return text
    change = "finer" if wide.granularity < own.granularity else "no finer"
    return (
        f"{text} With the pack's auxiliaries the label space is {change}: {own.granularity:.4f} "
        f"-> {wide.granularity:.4f}."
    )
