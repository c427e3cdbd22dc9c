"""`--holdout`: validation images that are taken out of the training images, class by class."""

import hashlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from fastlt.decode.images import BadImage
from fastlt.errors import UserError
from fastlt.packing.collection import Collection, ImageRef
from fastlt.packing.encode import read_bytes
from fastlt.utils.pool import cores


def hold_out(collection: Collection, share: float) -> None:
    """Move about `share` of each target class from `train` to `val`, which must be empty.

    A class with two images or more gives one at least and keeps one at least. Images with the same
    bytes stay together; where auxiliary images or those of another class are among them, they stay
    in `train`. The choice depends on the collection and the share only. Raises UserError where
    `share` is not between 0 and 1, or no class can give an image.
    """
    if not 0 < share < 1:
        raise UserError(f"--holdout is {share}: it must lie between 0 and 1, such as 0.1")
    targets = len(collection.target_names)
    members: defaultdict[bytes, list[int]] = defaultdict(list)
    with ThreadPoolExecutor(cores()) as pool:
        for image, digest in enumerate(pool.map(_digest, collection.train)):
            members[digest].append(image)
    sizes = Counter(ref.label for ref in collection.train)
    groups: defaultdict[int, list[list[int]]] = defaultdict(list)
    for group in members.values():
        labels = {collection.train[image].label for image in group}
        if len(labels) == 1 and min(labels) < targets:
            groups[labels.pop()].append(group)
    held = {
        image
        for label in sorted(groups)
        for image in _chosen(groups[label], sizes[label], share, label)
    }
    if not held:
        raise UserError(
            "--holdout finds no class with two different images, so nothing can be held out: name "
            "validation images with --val"
        )
    collection.val = [ref for image, ref in enumerate(collection.train) if image in held]
    collection.train = [ref for image, ref in enumerate(collection.train) if image not in held]


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


def _digest(ref: ImageRef) -> bytes:
    """Return the SHA-256 of the image's bytes; one that cannot be read is like no other."""
    try:
        return hashlib.sha256(read_bytes(ref)).digest()
    except BadImage:
        return f"{ref.path}:{ref.offset}:{ref.part}".encode()
