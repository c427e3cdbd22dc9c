"""`--holdout`: validation images that are taken out of the training images, class by class."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastlt.decode.images import BadImage, open_image
from fastlt.errors import UserError
from fastlt.packing.collection import Collection, ImageRef
from fastlt.packing.encode import read_bytes
from fastlt.packing.hashes import Row, from_rows, look_row, same_look, small_grey
from fastlt.packing.tables import read_rows
from fastlt.utils.pool import cores

NEAR = 4  # bits in which the looks of two images may differ, of 64, as `fastlt curate` has it


class Together(NamedTuple):
    """Which images must lie on one side, besides those of the same bytes."""

    groups: Path | None = None
    """A CSV with the columns image,group: of one patient, specimen or location."""
    near: bool = False
    """Images that look the same, resized or compressed anew."""


def hold_out(collection: Collection, share: float, together: Together | None = None) -> None:
    """Move about `share` of each target class from `train` to `val`, which must be empty.

    A class with two images or more gives one at least and keeps one at least. Images with the same
    bytes stay together, and those that `together` names; what cannot be read stays in `train` and
    does not count. Where auxiliary images, or unless they are
    of a named group those of another class, are among them, they stay in `train`. The choice
    depends on the collection, the share and the groups only. Raises UserError where `share` is not
    between 0 and 1, or no class can give an image.
    """
    if not 0 < share < 1:
        raise UserError(f"--holdout is {share}: it must lie between 0 and 1, such as 0.1")
    targets, together = len(collection.target_names), together or Together()
    members = members_of(collection, together)
    sizes = Counter(collection.train[image].label for group in members for image in group)
    groups: defaultdict[int, list[list[int]]] = defaultdict(list)
    mixed: list[list[int]] = []
    for group in members:
        labels = {collection.train[image].label for image in group}
        if len(labels) == 1 and min(labels) < targets:
            groups[labels.pop()].append(group)
        elif together.groups is not None and max(labels) < targets:
            mixed.append(group)
    held = {
        image
        for label in sorted(groups)
        for image in _chosen(groups[label], sizes[label], share, label)
    }
    held |= _chosen_mixed(collection, mixed, sizes, share, held)
    if not held:
        raise UserError(
            "--holdout finds no class with two different images, so nothing can be held out: name "
            "validation images with --val"
        )
    collection.val = [ref for image, ref in enumerate(collection.train) if image in held]
    collection.train = [ref for image, ref in enumerate(collection.train) if image not in held]


def members_of(collection: Collection, together: Together) -> list[list[int]]:
    """Return the images of `train` by what must stay together.

    Each is in one of the lists, but for those that cannot be read, which are in none.
    """
    count = len(collection.train)
    parents = list(range(count))

    def first(image: int) -> int:
        while parents[image] != image:
            parents[image] = parents[parents[image]]
            image = parents[image]
        return image

    def join(images: Iterable[int]) -> None:
        roots = {first(image) for image in images}
        for root in roots:
            parents[root] = min(roots)

    with ThreadPoolExecutor(cores()) as pool:
        rows = list(pool.map(partial(_hashed, near=together.near), collection.train))
    by_digest: defaultdict[bytes, list[int]] = defaultdict(list)
    for image, (digest, *_) in enumerate(rows):
        by_digest[digest].append(image)
    for images in by_digest.values():
        join(images)
    if together.near:
        hashes = from_rows([row for _, row, _ in rows])
        for pair in same_look(hashes, hashes, NEAR).tolist():
            join(pair)
    if together.groups is not None:
        for images in named_groups(together.groups, collection):
            join(images)
    members: defaultdict[int, list[int]] = defaultdict(list)
    for image, (*_, is_sound) in enumerate(rows):
        if is_sound:
            members[first(image)].append(image)
    return list(members.values())


def named_groups(path: Path, collection: Collection) -> list[list[int]]:
    """Return the images of each group of a CSV with the columns image and group.

    An image is named by its path, or by the end of it from a folder on. Raises UserError where a
    name is of no image, or of several.
    """
    rows = read_rows(path, ("image", "group"))
    places: defaultdict[str, list[int]] = defaultdict(list)
    for number, ref in enumerate(collection.train):
        is_file = ref.part < 0 and ref.size < 0 and not ref.column
        parts = Path(ref.path if is_file else ref.key).parts
        for start in range(len(parts)):
            places["/".join(parts[start:])].append(number)
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for line, row in rows:
        found = places.get("/".join(Path(row["image"]).parts), [])
        if len(found) != 1:
            many = f"{len(found)} training images" if found else "no training image"
            raise UserError(f"{path}, line {line}: '{row['image']}' names {many}")
        groups[row["group"]].append(found[0])
    return list(groups.values())


def _chosen(groups: list[list[int]], size: int, share: float, label: int) -> list[int]:
    """Return the images of a class of `size` images that are held out."""
    wanted = max(1, round(share * size))
    drawn = [groups[i] for i in np.random.default_rng([0, label]).permutation(len(groups))]
    chosen: list[int] = []
    for group in drawn:
        if len(chosen) + len(group) <= min(wanted, size - 1):
            chosen += group
    smallest = min(drawn, key=len)
    return chosen or (smallest if len(smallest) < size else [])


def _chosen_mixed(
    collection: Collection,
    groups: list[list[int]],
    sizes: Mapping[int, int],
    share: float,
    held: set[int],
) -> set[int]:
    """Return the images of groups of several classes that are held out, besides those that are."""
    have = Counter(collection.train[image].label for image in held)
    chosen: set[int] = set()
    for number in np.random.default_rng(0).permutation(len(groups)):
        own = Counter(collection.train[image].label for image in groups[number])
        lacks = any(have[label] < max(1, round(share * sizes[label])) for label in own)
        spares = all(
            have[label] + count <= min(sizes[label] - 1, max(1, round(2 * share * sizes[label])))
            for label, count in own.items()
        )
        if lacks and spares:
            have += own
            chosen |= set(groups[number])
    return chosen


def _hashed(ref: ImageRef, near: bool) -> tuple[bytes, Row, bool]:
    """Return the SHA-256 of an image's bytes, its hashes where `near`, and whether it can be read.

    One that cannot is like no other.
    """
    try:
        data = read_bytes(ref)
    except BadImage:
        nothing = f"{ref.path}:{ref.offset}:{ref.part}".encode()
        return nothing, (nothing, 0, 0, False), False
    digest = hashlib.sha256(data).digest()
    unseen: Row = digest, 0, 0, False
    try:
        if near:
            return digest, look_row(digest, small_grey(data)), True
        open_image(data)
    except BadImage:
        return digest, unseen, False
    return digest, unseen, True
