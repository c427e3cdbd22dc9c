"""Images with their hashes and features, kept on the disk a shard at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from fastlt.curate.settings import FilterConfig
from fastlt.evaluation.features import Backbone, extract
from fastlt.packing.hashes import Hashes, concatenated, hashes_of
from fastlt.packing.reader import Split, identity
from fastlt.utils.files import whole_file
from fastlt.utils.pool import cores, ordered_map
from fastlt.utils.progress import rated_progress

HASHED_TOGETHER = 64  # images that a worker takes at a time
Advance = Callable[[int], None]


@dataclass(frozen=True)
class ImageIndex:
    """The images of a split with their hashes and features, in the order of the split."""

    split: Split
    hashes: Hashes
    features: np.ndarray  # (n, D) float16, of length 1

    def __len__(self) -> int:
        return len(self.split)


def build_index(
    folder: Path,
    split: Split,
    backbone: Backbone,
    settings: FilterConfig,
    what: str,
    console: Console,
) -> ImageIndex:
    """Return the index of a split; what is known is read, the rest made and kept.

    folder: where hashes and features are kept, by what they are of.
    """
    hashes: list[Hashes] = []
    features: list[np.ndarray] = []
    order: list[np.ndarray] = []
    with rated_progress(console, "images/s", transient=True) as bar:
        tasks = [
            bar.add_task(f"{doing} {what}", total=len(split)) for doing in ("hashing", "looking at")
        ]
        for images in by_shard(split):
            part = split.subset(images)
            order.append(images)
            hashes.append(stored_hashes(folder, part, partial(bar.advance, tasks[0])))
            features.append(
                stored_features(folder, part, backbone, settings, partial(bar.advance, tasks[1]))
            )
    back = np.argsort(np.concatenate(order), kind="stable")
    return ImageIndex(split, concatenated(hashes).take(back), np.concatenate(features)[back])


def by_shard(split: Split) -> Iterator[np.ndarray]:
    """Yield the indices of the images of each shard."""
    return (np.flatnonzero(split.shard == shard) for shard in np.unique(split.shard))


def stored_hashes(folder: Path, part: Split, advance: Advance) -> Hashes:
    """Return the hashes of a shard's images, from the disk where they are known."""
    path = folder / f"hashes-{identity(part)}.npz"
    found = read_arrays(path)
    if found is None:
        groups = [
            range(start, min(start + HASHED_TOGETHER, len(part)))
            for start in range(0, len(part), HASHED_TOGETHER)
        ]
        made = []
        with ordered_map(min(cores(), len(groups))) as apply:
            for group in apply(partial(hashes_of, part), groups):
                made.append(group)
                advance(len(group))
        whole = concatenated(made)
        exact = np.frombuffer(b"".join(whole.exact), np.uint8).reshape(-1, 32)
        write_arrays(
            path,
            {
                "exact": exact,
                "seen": whole.seen,
                "mirrored": whole.mirrored,
                "has_look": whole.has_look,
            },
        )
        return whole
    advance(len(part))
    return Hashes(
        [bytes(row) for row in found["exact"]], found["seen"], found["mirrored"], found["has_look"]
    )


def stored_features(
    folder: Path, part: Split, backbone: Backbone, settings: FilterConfig, advance: Advance
) -> np.ndarray:
    """Return the features of a shard's images, (n, D), from the disk where they are known."""
    path = folder / f"features-{identity(part)}-{backbone.key}.npz"
    found = read_arrays(path)
    if found is None:
        found = {"features": extract(backbone, part, settings.batch, settings.workers, advance)}
        write_arrays(path, found)
    else:
        advance(len(part))
    return found["features"]


def read_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """Return the arrays of a file; None where they are absent or damaged, to be made again."""
    try:
        with np.load(path) as file:
            return {name: file[name] for name in file.files}
    except Exception:  # numpy raises about anything on damaged files
        return None


def write_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """Write arrays to a file that is whole or not there."""
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)
