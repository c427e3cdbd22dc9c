"""The images of the page of a run: samples of classes, and what was taken for what."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from fastlt.packing.reader import Pack, Split
from fastlt.reports.content import Relation, Run
from fastlt.utils.thumbnail import thumbnail

SHOWN_ERRORS, SHOWN_IMAGES, SHOWN_NEIGHBOURS = 18, 6, 4
SHOWN_PAIRS, SHOWN_MISTAKEN = 8, 3


def samples(run: Run, relation: Relation, pack: Pack | None) -> list[dict[str, Any]]:
    """Return the worst, the rarest and the most common classes with images.

    They are some of their training images and of their neighbours'.
    """
    if pack is None:
        return []
    ranked = sorted(
        (value, target) for target, value in enumerate(run.per_class) if value is not None
    )
    picks = {target: "worst" for _, target in ranked[:3]}
    for target in run.by_frequency[:-4:-1]:
        picks.setdefault(target, "rarest")
    for target in run.by_frequency[:2]:
        picks.setdefault(target, "most common")
    return [_sample(run, relation, pack, target, why) for target, why in picks.items()]


def _sample(run: Run, relation: Relation, pack: Pack, target: int, why: str) -> dict[str, Any]:
    # The run's graph and the pack's may differ (another subset of auxiliaries): names are what they
    # have in common.
    ids = {name: i for i, name in enumerate(pack.space.names)}
    trained_on = relation.neighbours[target][:SHOWN_NEIGHBOURS] if run.space.pairs else []
    neighbours = [relation.space.names[auxiliary] for auxiliary in trained_on]
    return {
        "name": run.space.target_names[target],
        "why": why,
        "group": run.groups[target],
        "count": run.space.train_counts[target],
        "accuracy": run.per_class[target],
        "images": thumbnails(
            pack.train, _spread_over(np.flatnonzero(pack.train.label == target), SHOWN_IMAGES)
        ),
        "neighbours": [
            (name, uri)
            for name in neighbours
            if name in ids
            for uri in thumbnails(pack.train, np.flatnonzero(pack.train.label == ids[name])[:1])
        ],
    }


def _spread_over(values: np.ndarray, most: int) -> np.ndarray:
    return (
        values[np.unique(np.linspace(0, len(values) - 1, min(most, len(values))).astype(int))]
        if len(values)
        else values
    )


def mistakes(run: Run, relation: Relation, pack: Pack | None) -> list[dict[str, Any]]:
    """Return the most confident errors, one for each kind of confusion."""
    found = run.predictions
    if pack is None or not found or not _same_images(found, pack.val):
        return []
    wrong = np.flatnonzero(found["label"] != found["predicted"])
    chosen: dict[tuple[int, int], int] = {}
    for i in wrong[np.argsort(-found["confidence"][wrong], kind="stable")]:
        chosen.setdefault((int(found["label"][i]), int(found["predicted"][i])), int(i))
        if len(chosen) == SHOWN_ERRORS:
            break
    names = run.space.target_names
    return [
        {
            "true": names[true],
            "predicted": names[predicted],
            "confidence": 100 * float(found["confidence"][i]),
            "sibling": (true, predicted) in relation.siblings,
            "image": uri,
        }
        for (true, predicted), i in chosen.items()
        for uri in thumbnails(pack.val, [int(found["image"][i])])
    ]


def confused(run: Run, pack: Pack | None) -> list[dict[str, Any]]:
    """Return the most frequent confusions with images.

    Each has one of the class it is, one of the class it was taken for, both from the training
    images, and the mistaken ones of which the model was most sure.
    """
    found = run.predictions
    if pack is None or not found or not _same_images(found, pack.val):
        return []
    return [_confused(run, pack, *entry) for entry in run.confusion[:SHOWN_PAIRS]]


def _confused(run: Run, pack: Pack, true: int, predicted: int, count: int) -> dict[str, Any]:
    found, names = run.predictions, run.space.target_names
    mistaken = np.flatnonzero((found["label"] == true) & (found["predicted"] == predicted))
    surest = mistaken[np.argsort(-found["confidence"][mistaken], kind="stable")][:SHOWN_MISTAKEN]
    return {
        "count": count,
        "true": names[true],
        "predicted": names[predicted],
        "true_group": run.groups[true],
        "predicted_group": run.groups[predicted],
        "true_image": _example(pack, true),
        "predicted_image": _example(pack, predicted),
        "mistaken": [
            (100 * float(found["confidence"][i]), uri)
            for i in surest
            for uri in thumbnails(pack.val, [int(found["image"][i])])
        ],
    }


def _example(pack: Pack, target: int) -> str:
    """Return the first training image of a class that can be decoded; empty where there is none."""
    for image in np.flatnonzero(pack.train.label == target):
        if uri := thumbnail(bytes(pack.train.read(int(image)))):
            return uri
    return ""


def _same_images(predictions: dict[str, np.ndarray], split: Split) -> bool:
    """Return whether the predictions were made on this split: its labels are those of them."""
    image = predictions["image"]
    return (
        len(image) > 0
        and int(image.max()) < len(split)
        and bool((split.label[image] == predictions["label"]).all())
    )


def thumbnails(split: Split, images: Iterable[int]) -> list[str]:
    """Return data URIs of small JPEGs; an image that cannot be decoded is left out."""
    return [uri for image in images if (uri := thumbnail(bytes(split.read(int(image)))))]
