"""A pack of some images of another one under other labels: tables of its own, and links to the
other's shards.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from fastlt.classes import ClassSpace
from fastlt.errors import UserError
from fastlt.packing.reader import COLUMNS, Pack
from fastlt.packing.writer import entry_of
from fastlt.utils.files import whole_file, whole_folder, write_text


@dataclass(frozen=True)
class Selection:
    """Images of a split, and the class that each is to have."""

    images: np.ndarray  # (n,) int64
    labels: np.ndarray  # (n,) int64


def derive_pack(
    pack: Pack,
    out: Path,
    names: list[str],
    train: Selection,
    val: Selection,
    auxiliary_names: Sequence[str] = (),
    pairs: Sequence[tuple[int, int]] = (),
) -> Path:
    """Write a pack of the targets `names`, and of auxiliaries where given, and return its folder.

    Labels of auxiliaries follow those of the targets. Raises UserError where the pack is at an
    address, whose shards are not on this machine.
    """
    if pack.train.remote is not None:
        raise UserError("a pack at an address cannot be relabelled: copy it to this machine first")
    classes = len(names) + len(auxiliary_names)
    space = ClassSpace(
        target_names=names,
        auxiliary_names=list(auxiliary_names),
        train_counts=np.bincount(train.labels, minlength=classes).tolist(),
        val_counts=np.bincount(val.labels, minlength=len(names)).tolist(),
        pairs=sorted(pairs),
        display_names=known_of(pack.space.display_names, [*names, *auxiliary_names]),
        descriptions=known_of(pack.space.descriptions, [*names, *auxiliary_names]),
    )
    with whole_folder(out) as folder:
        columns: dict[str, Any] = {}
        for split, chosen in ((pack.train, train), (pack.val, val)):
            (folder / split.name).mkdir()
            for shard in split.shards:
                (folder / split.name / shard).symlink_to(
                    os.path.relpath((split.folder / shard).resolve(), out.resolve() / split.name)
                )
            columns |= {
                f"{split.name}_{name}": getattr(split, name)[chosen.images]
                for name in COLUMNS
                if name != "label"
            }
            columns[f"{split.name}_label"] = chosen.labels.astype(COLUMNS["label"])
        space.save(folder / "classes.json")
        with whole_file(folder / "index.npz") as temporary, temporary.open("wb") as file:
            np.savez(file, **columns)
        shards = {split: pack.manifest["shards"][split] for split in ("train", "val")}
        files = {
            name: entry
            for name, entry in pack.manifest["files"].items()
            if name.partition("/")[0] in shards
        }
        files |= {name: entry_of(folder / name) for name in ("classes.json", "index.npz")}
        manifest = pack.manifest | {
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "derived_from": pack.id,
            "files": files,
            "shards": shards,
            "counts": {
                "train": len(train.images),
                "val": len(val.images),
                "targets": len(names),
                "auxiliaries": len(auxiliary_names),
                "pairs": len(pairs),
            },
            "skipped": [],
            "leaks": [],
        }
        write_text(folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    return out


def known_of(table: dict[str, str], names: Sequence[str]) -> dict[str, str]:
    """Return those entries of a table whose names are among some."""
    return {name: table[name] for name in names if name in table}
