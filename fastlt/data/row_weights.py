"""What images count in the loss: by class, by image, and of the rows of a batch.

An image weighs its class's weight times its own. A step's loss is the mean of its images' losses by
these weights, over the batches and ranks that share the step.
"""

import csv
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastlt.config import DataConfig, did_you_mean
from fastlt.data.plan import Plan
from fastlt.errors import ConfigError
from fastlt.packing.concat import MixedSplit
from fastlt.packing.reader import Pack, Split
from fastlt.packing.shards import clean_key

SHOWN = 60  # characters of a line that is wrong


class RowWeights:
    """The weight of each training image, (n,) float64, and the rows of batches by them."""

    def __init__(self, of_image: np.ndarray) -> None:
        self.of_image = of_image
        self._known: tuple[Plan, int, np.ndarray] | None = None

    @property
    def id(self) -> str:
        """A string that changes with any weight."""
        return hashlib.sha256(self.of_image.tobytes()).hexdigest()[:16]

    def of_rows(
        self, images: np.ndarray, plan: Plan, epoch: int, step: int, accumulate: int
    ) -> Tensor:
        """Return the weights of a batch's images (n,), over the mean weight of its step, (n,)
        float32.

        The step is that of the optimiser, with all its batches of all ranks: the plan tells what
        these are, so that no rank has to ask another. Where all of a step weigh 0, so do its rows.
        """
        start = step // accumulate * accumulate
        mean = self._means(plan, epoch)[start : start + accumulate].mean()
        weights = self.of_image[images]
        return torch.from_numpy(weights / mean if mean > 0 else weights).float()

    def _means(self, plan: Plan, epoch: int) -> np.ndarray:
        """Return the mean weight of each batch of an epoch over all ranks, (steps,) float64."""
        if self._known is None or self._known[0] is not plan or self._known[1] != epoch:
            batches = plan.whole_batches(epoch)
            means = np.array([self.of_image[images].mean() for images in batches])
            self._known = plan, epoch, means
        return self._known[2]


def mixed_weights(weights: Tensor, mix: Tensor | None) -> Tensor:
    """Return the weights of rows (N,), mixed with those of the mirrored places as images are."""
    return weights if mix is None else mix * weights + (1 - mix) * weights.flip(0)


def row_weights(data: DataConfig, pack: Pack, plan: Plan) -> RowWeights | None:
    """Return the weights that the settings ask for; None where they ask for none.

    Raises ConfigError where a file cannot be read, or names what the pack has not.
    """
    if not data.class_weights and not data.sample_weights:
        return None
    labels = plan.labels_of(np.arange(len(pack.train)))
    weights = class_weights(data.class_weights, pack.space.names)[labels]
    if data.sample_weights:
        weights = weights * sample_weights(Path(data.sample_weights), pack.train)
    if not weights.any():
        raise ConfigError("all training images weigh 0: give some of them a weight above 0")
    return RowWeights(weights)


def class_weights(given: Mapping[str, float] | str, names: Sequence[str]) -> np.ndarray:
    """Return the weights of the classes, (C,) float64; those that are not named weigh 1.

    given: weights by name, or the path of a CSV with the columns class,weight.
    """
    where = f"data.class_weights={given}" if isinstance(given, str) else "data.class_weights"
    weights = read_weights(Path(given), "class") if isinstance(given, str) else given
    if zeros := [name for name, weight in weights.items() if weight == 0]:
        raise ConfigError(
            f"{where} gives '{zeros[0]}' a weight of 0: a class's weight must be above 0"
        )
    places = {name: number for number, name in enumerate(names)}
    if unknown := [name for name in weights if name not in places]:
        raise ConfigError(
            f"{where} names {not_there(unknown, 'class', 'classes')} in the pack"
            f"{did_you_mean(unknown[0], list(names))}"
        )
    found = np.ones(len(names))
    for name, weight in weights.items():
        found[places[name]] = weight
    return found


def sample_weights(file: Path, split: Split) -> np.ndarray:
    """Return the weights of the images of a split, (n,) float64; those not named weigh 1.

    The CSV has the columns image,weight. An image goes by its name in the shards, as `tar tf` lists
    it, or by its path within the folder that was packed, with or without the ending.
    """
    if split.remote is not None:
        raise ConfigError(
            "data.sample_weights looks for images by their names in the shards, but those are at "
            f"{split.remote.url}: copy the pack to this machine first"
        )
    places = image_places(split)
    found, unknown, named = np.ones(len(split)), [], np.zeros(len(split), bool)
    for name, weight in read_weights(file, "image").items():
        images = places.get(name) or places.get(clean_key(without_ending(name)))
        if images is None:
            unknown.append(name)
            continue
        if named[images].any():
            raise ConfigError(f"{file} names the image '{name}' a second time: keep one line of it")
        found[images], named[images] = weight, True
    if unknown:
        known = split.key(0) if len(split) else ""
        raise ConfigError(
            f"{file} names {not_there(unknown, 'image', 'images')} among the training images of "
            f"the pack, whose names are like '{known}'"
        )
    return found


def image_places(split: Split) -> dict[str, list[int]]:
    """Return the images of each name in the shards, with its ending and without.

    Of several packs that are mixed, images may share a name; within a pack they do not.
    """
    parts = split.parts if isinstance(split, MixedSplit) else (split,)
    places: dict[str, list[int]] = {}
    first = 0
    for part in parts:
        for image in range(len(part)):
            key = part.key(image)
            for name in {key, without_ending(key)}:
                places.setdefault(name, []).append(first + image)
        first += len(part)
    return places


def without_ending(name: str) -> str:
    """Return a name without what follows the last dot of its last part."""
    folder, slash, last = name.rpartition("/")
    stem = last.rpartition(".")[0] or last
    return f"{folder}{slash}{stem}"


def read_weights(file: Path, kind: str) -> dict[str, float]:
    """Return the weights by name of a CSV with the columns `kind`,weight.

    Raises ConfigError that names the file and the line.
    """
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines)
            rows = [(reader.line_num, row) for row in reader]
            header = reader.fieldnames or []
    except UnicodeDecodeError as error:
        raise ConfigError(f"the weights {file} are not UTF-8: save the file as such") from error
    except OSError as error:
        raise ConfigError(f"cannot read the weights {file}: {error.strerror}") from error
    except csv.Error as error:
        raise ConfigError(f"the weights {file} are no CSV file: {error}") from error
    if not {kind, "weight"} <= set(header):
        raise ConfigError(f"{file}, line 1: the header must be {kind},weight")
    found: dict[str, float] = {}
    for line, row in rows:
        name = (row[kind] or "").strip()
        weight = as_weight(row["weight"])
        if not name or weight is None:
            text = ",".join(str(cell) for cell in row.values())[:SHOWN]
            raise ConfigError(
                f"{file}, line {line}: '{text}' must be a name and a weight, a finite number of 0 "
                "or more"
            )
        if name in found:
            raise ConfigError(f"{file}, line {line}: '{name}' is named a second time")
        found[name] = weight
    return found


def as_weight(text: str | None) -> float | None:
    """Return the number that a text holds; None where it is no weight."""
    try:
        weight = float(text or "")
    except ValueError:
        return None
    return weight if 0 <= weight < math.inf else None


def not_there(unknown: Sequence[str], one: str, several: str) -> str:
    """Return in words that some names are not there: the first, and how many they are."""
    if len(unknown) == 1:
        return f"the {one} '{unknown[0]}', which is not"
    return f"{len(unknown):,} {several}, '{unknown[0]}' first, which are not"
