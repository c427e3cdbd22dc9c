"""The long-tailed task cut out of the Grocery Store data set (WACV 2019), photographs of products.

DIR holds train, val and test with a folder of images for each class, and `task.csv`, which says the
role of each class: a target, with how many training images it keeps; the auxiliary of some targets;
or one of the random classes that take the auxiliaries' place as a control.
"""

import csv
from pathlib import Path
from typing import NamedTuple

from fastlt.errors import DataError, UserError
from fastlt.packing.collection import Collection, ImageRef

TASK, TARGET = "grocery", "target"
ROLES = {"siblings": "auxiliary", "random": "random", "none": None}  # --auxiliary -> role
SPLITS = ("train", "val", "test")
COLUMNS = ["class", "role", "train_images", "targets"]


class Listed(NamedTuple):
    """A line of task.csv."""

    name: str
    role: str
    images: int  # for training, of a target
    owners: list[str]  # targets, of an auxiliary class


def read_grocery(folder: Path, auxiliary: str | None = None) -> Collection:
    """Return the collection of the task.

    Targets keep their first images by file name, so many as `task.csv` says. What is left of their
    training images is for validation, beside those of val. auxiliary: siblings (default), random or
    none. Raises UserError where the folder does not hold the data set.
    """
    auxiliary = auxiliary or "siblings"
    if auxiliary not in ROLES:
        raise UserError(f"--auxiliary {auxiliary}: for grocery it is one of {', '.join(ROLES)}")
    listed = read_task(folder)
    targets = [one for one in listed if one.role == TARGET]
    collection = Collection([one.name for one in targets], [], [])
    for label, one in enumerate(targets):
        images = photographs(folder, "train", one.name, label)
        collection.train += images[: one.images]
        collection.unused += images[one.images :]
        collection.val += images[one.images :] + photographs(folder, "val", one.name, label)
        collection.test += photographs(folder, "test", one.name, label)
    places = {name: label for label, name in enumerate(collection.target_names)}
    for label, one in enumerate(
        (one for one in listed if one.role == ROLES[auxiliary]), start=len(targets)
    ):
        collection.auxiliary_names.append(one.name)
        collection.origins[one.name] = "Grocery Store data set"
        collection.train += photographs(folder, "train", one.name, label)
        collection.pairs += [(places[owner], label) for owner in one.owners]
    collection.pairs.sort()
    return collection


def read_task(folder: Path) -> list[Listed]:
    """Return the lines of task.csv. Raises UserError where there is none, or it is damaged."""
    path = folder / "task.csv"
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(
            f"cannot read {path} ({error}): grocery:DIR names a folder with train, val, test and "
            "task.csv, which lists the role of each class"
        ) from error
    if not rows or list(rows[0]) != COLUMNS:
        raise DataError(f"{path}: its columns must be {','.join(COLUMNS)}")
    listed = [_listed(path, line, row) for line, row in enumerate(rows, start=2)]
    targets = {one.name for one in listed if one.role == TARGET}
    if not targets:
        raise DataError(f"{path} names no target")
    for line, one in enumerate(listed, start=2):
        if strange := [owner for owner in one.owners if owner not in targets]:
            raise DataError(f"{path}, line {line}: '{strange[0]}' is no target")
    return listed


def _listed(path: Path, line: int, row: dict[str, str]) -> Listed:
    name, role, images, owners = (row[column] or "" for column in COLUMNS)
    if role not in (TARGET, *ROLES.values()) or not name or not images.isdecimal():
        raise DataError(
            f"{path}, line {line}: a class needs a name, a role (target, auxiliary or random) and "
            "a number of training images"
        )
    return Listed(name, role, int(images), [owner for owner in owners.split("|") if owner])


def photographs(folder: Path, split: str, name: str, label: int) -> list[ImageRef]:
    """Return the images of a class in a split, by file name; of val, which lacks some, none."""
    place = folder / split / name
    if not place.is_dir() and split == "val":
        return []
    found = sorted(place.glob("*.jpg"))
    if not found:
        raise DataError(f"{place} holds no photographs (.jpg) of '{name}'")
    return [ImageRef(f"{name}/{path.stem}", label, str(path)) for path in found]
