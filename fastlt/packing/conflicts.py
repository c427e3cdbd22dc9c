"""`--drop-conflicts`: training images that stand under several classes, found before packing."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from fastlt.decode.images import BadImage
from fastlt.errors import UserError
from fastlt.packing.collection import ImageRef
from fastlt.packing.encode import read_bytes
from fastlt.utils.pool import OrderedMap

BATCH = 64  # images that travel to a worker at a time


def without_conflicts(
    refs: Sequence[ImageRef], names: Sequence[str], apply: OrderedMap
) -> tuple[list[ImageRef], list[dict[str, Any]]]:
    """Return the images without those whose bytes stand under several classes, and what the
    manifest says of each of these.

    None of them is kept: which of its labels is right is not known. Raises UserError where a class
    would have no image left.
    """
    digests = [digest for part in apply(_digests, _batches(refs)) for digest in part]
    labels: defaultdict[bytes, set[int]] = defaultdict(set)
    for ref, digest in zip(refs, digests, strict=True):
        if digest:
            labels[digest].add(ref.label)
    kept, dropped = [], []
    for ref, digest in zip(refs, digests, strict=True):
        if len(found := labels.get(digest, ())) < 2:
            kept.append(ref)
            continue
        entry = {"split": "train", "key": ref.key, "path": ref.path, "dropped": True}
        dropped.append({**entry, "classes": [names[label] for label in sorted(found)]})
    left = Counter(ref.label for ref in kept)
    if empty := [names[ref.label] for ref in refs if not left[ref.label]]:
        raise UserError(
            f"all training images of class '{empty[0]}' stand under other classes too: correct "
            "their labels, or leave out --drop-conflicts"
        )
    return kept, dropped


def _digests(refs: list[ImageRef]) -> list[bytes]:
    return [_digest(ref) for ref in refs]


def _digest(ref: ImageRef) -> bytes:
    """SHA-256 of the source bytes; empty where they cannot be read, as packing tells."""
    try:
        return hashlib.sha256(read_bytes(ref)).digest()
    except BadImage:
        return b""


def _batches(refs: Sequence[ImageRef]) -> Iterator[Sequence[ImageRef]]:
    return (list(refs[start : start + BATCH]) for start in range(0, len(refs), BATCH))
