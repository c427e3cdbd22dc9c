"""What became of the images of a split: what the tables and the summary of a pack tell."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastlt.packing.reader import COLUMNS

WORDS = {"train": "training", "val": "validation", "test": "test"}


@dataclass
class Packed:
    """What became of one split."""

    rows: list[tuple[int, ...]] = field(default_factory=list)  # one per stored image, as COLUMNS
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # shard name -> size, sha256
    skipped: list[dict[str, str]] = field(default_factory=list)
    # images of which the first page or frame was taken
    first_frames: list[dict[str, Any]] = field(default_factory=list)
    leaks: list[dict[str, Any]] = field(default_factory=list)
    # images that are in the split before: in the same class, and in another one
    duplicates: list[dict[str, str]] = field(default_factory=list)
    conflicts: list[dict[str, Any]] = field(default_factory=list)
    # sha256 of the source -> key and label of the first such image
    digests: dict[bytes, tuple[str, int]] = field(default_factory=dict)

    def columns(self) -> dict[str, Any]:
        """Return the columns of the split's index."""
        table = np.asarray(self.rows, dtype=np.int64).reshape(-1, len(COLUMNS))
        return {name: table[:, i].astype(kind) for i, (name, kind) in enumerate(COLUMNS.items())}


def entries(splits: Mapping[str, Packed], name: str) -> list[dict[str, Any]]:
    """Return what all splits list under a name, such as `skipped`."""
    return [entry for packed in splits.values() for entry in getattr(packed, name)]


def described(skipped: Mapping[str, str]) -> str:
    """Return an image that was skipped, and why."""
    return f"{skipped['path']} ({skipped['key']}): {skipped['reason']}"
