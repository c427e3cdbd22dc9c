"""`fastlt granularity`: how fine the classes of a pack are, told by features alone, without a training.

Of each class the medoid stands for it: the image nearest to all the others. A class is fine where other classes' medoids are as
near to its images as its own (ranking with medoids, after Cui et al. 2019, arXiv 1912.10154).
"""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastlt.classes import ClassSpace
from fastlt.curate.features import extract, open_backbone
from fastlt.curate.settings import FilterConfig
from fastlt.data.packed import open_pack
from fastlt.errors import UserError
from fastlt.files import write_text
from fastlt.progress import rated_progress

SHOWN = 12  # pairs of targets
BLOCK = 4096  # images whose distances are made together


class Score(NamedTuple):
    """Of a set of features under one labelling; distances are 1 - cosine."""

    classes: int
    granularity: float  # 0: every image is nearest to its own class' medoid; 0.5: labels say nothing
    within: float  # of an image to its class' medoid, mean over classes
    between: float  # of a class' medoid to the nearest other one, mean over classes

    @property
    def ratio(self) -> float:
        """Above 1 classes are wider than what lies between them."""
        return self.within / max(self.between, 1e-12)


class Between(NamedTuple):
    """Two targets that are near to each other, and the auxiliary that lies between them, if one does."""

    target: str
    nearest: str
    distance: float
    auxiliary: str
    to_both: tuple[float, float] | None


def score(features: np.ndarray, labels: np.ndarray) -> Score:
    """features (n, D) of length 1, labels (n,) int. Classes without images do not count."""
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
    return Score(count, of_classes[0], of_classes[1], float(apart.min(axis=1).mean()))


def medoids(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(classes, D) float32: of each class the image whose sum of cosines to the class is highest."""
    found = []
    for label in range(int(labels.max()) + 1):
        members = features[labels == label].astype(np.float32)
        found.append(members[int((members @ members.sum(axis=0)).argmax())])
    return np.stack(found)


def structure(features: np.ndarray, labels: np.ndarray, space: ClassSpace) -> list[Between]:
    """Of each target with images the nearest other one, the nearest pairs first; labels (n,) are ids of the class space."""
    present = np.unique(labels)
    centres = medoids(features, np.searchsorted(present, labels))
    is_target = present < space.num_targets
    targets, auxiliaries = np.flatnonzero(is_target), np.flatnonzero(~is_target)
    distance = 1 - centres @ centres.T
    found: dict[tuple[int, int], Between] = {}
    for target in targets.tolist():
        others = targets[targets != target]
        nearest = int(others[distance[target, others].argmin()])
        first, second = sorted((target, nearest))
        auxiliary, to_both = "", None
        if len(auxiliaries):
            worst = np.maximum(distance[first, auxiliaries], distance[second, auxiliaries])
            middle = int(auxiliaries[worst.argmin()])
            if worst.min() < distance[first, second]:  # nearer to both than they are to each other
                auxiliary = space.names[int(present[middle])]
                to_both = float(distance[first, middle]), float(distance[second, middle])
        one, other = (space.names[int(present[i])] for i in (first, second))
        found[first, second] = Between(one, other, float(distance[first, second]), auxiliary, to_both)
    return sorted(found.values(), key=lambda pair: pair.distance)


def read_hierarchy(file: Path, names: Sequence[str]) -> dict[str, str]:
    """Class -> what it belongs to, from a CSV with the columns class,parent. Raises UserError where a class has none."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            rows = list(csv.DictReader(lines))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read the hierarchy {file}: {error}") from error
    if not rows or not {"class", "parent"} <= rows[0].keys():
        raise UserError(f"{file}, line 1: the header must be class,parent")
    parents = {row["class"]: row["parent"] for row in rows}
    if missing := [name for name in names if not parents.get(name)]:
        raise UserError(f"{file} has no parent of '{missing[0]}', and of {len(missing) - 1} more classes")
    return parents


def levels(labels: np.ndarray, space: ClassSpace, parents: Mapping[str, str] | None) -> dict[str, np.ndarray]:
    """Labellings of the targets' images, the pack's own first."""
    if parents is None:
        return {"targets": labels}
    coarse = {name: i for i, name in enumerate(sorted({parents[name] for name in space.target_names}))}
    table = np.array([coarse[parents[name]] for name in space.target_names])
    return {"targets": labels, "their parents": table[labels]}


def run_granularity(place: str, settings: FilterConfig, hierarchy: Path | None, out: Path | None, console: Console) -> None:
    """place: a pack, of whose training images the features are made. Raises UserError."""
    pack = open_pack(place)
    space, split = pack.space, pack.train
    parents = read_hierarchy(hierarchy, space.target_names) if hierarchy else None
    backbone = open_backbone(settings)
    with rated_progress(console, "images/s", transient=True) as bar:
        task = bar.add_task("looking at images", total=len(split))
        features = extract(backbone, split, settings.batch, settings.workers, lambda done: bar.advance(task, done))
    of_targets = split.label < space.num_targets
    scores = {name: score(features[of_targets], of) for name, of in levels(split.label[of_targets], space, parents).items()}
    if space.num_auxiliaries:
        scores["targets and auxiliaries"] = score(features, split.label)
    pairs = structure(features, split.label, space)
    show(scores, pairs, space, console)
    if out is not None:
        write_text(out, json.dumps(as_json(scores, pairs, backbone.name), ensure_ascii=False, indent=1) + "\n")
        console.print(f"written to {out}", highlight=False, soft_wrap=True)


def as_json(scores: Mapping[str, Score], pairs: Sequence[Between], backbone: str) -> dict[str, Any]:
    told = {name: {**of._asdict(), "ratio": of.ratio} for name, of in scores.items()}
    return {"backbone": backbone, "scores": told, "nearest": [pair._asdict() for pair in pairs]}


def show(scores: Mapping[str, Score], pairs: Sequence[Between], space: ClassSpace, console: Console) -> None:
    table = Table("classes", "", "granularity", "within", "between", "within / between", title_justify="left",
                  title="how fine the classes are (distances are 1 - cosine)")  # fmt: skip
    for name, of in scores.items():
        table.add_row(name, f"{of.classes:,}", f"{of.granularity:.4f}", f"{of.within:.3f}", f"{of.between:.3f}", f"{of.ratio:.2f}")
    console.print(table)
    console.print(reading(scores), highlight=False, soft_wrap=True)
    near = Table("target", "nearest target", "distance", "between them", title="the nearest targets", title_justify="left")
    for pair in pairs[:SHOWN]:
        between = f"{escape(pair.auxiliary)} ({pair.to_both[0]:.3f}, {pair.to_both[1]:.3f})" if pair.to_both else "-"
        near.add_row(escape(pair.target), escape(pair.nearest), f"{pair.distance:.3f}", between)
    console.print(near)
    if space.num_auxiliaries:
        filled = sum(pair.to_both is not None for pair in pairs)
        console.print(f"an auxiliary class lies between {filled:,} of {len(pairs):,} pairs of nearest targets", highlight=False)


def reading(scores: Mapping[str, Score]) -> str:
    """What the figures mean for auxiliaries."""
    own, wide = scores["targets"], scores.get("targets and auxiliaries")
    told = (
        f"An image has {own.granularity:.1%} of the other classes' medoids nearer than its own: 0 where classes lie well apart, 50 "
        "where labels say nothing. It is by these features: compare packs by one backbone, and none that was trained on either."
    )
    if wide is None:
        return told
    change = "finer" if wide.granularity > own.granularity else "no finer"
    return f"{told} With the pack's auxiliaries the label space is {change}: {own.granularity:.4f} -> {wide.granularity:.4f}."
