"""Packs with the class counts of the large long-tailed sets, whose images are all the same few."""

import hashlib
import json
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console

from fastlt.classes import ClassSpace
from fastlt.packing.sources import read_collection
from fastlt.packing.writer import PackOptions, write_pack

AUXILIARIES_OF_IMAGENET_LT, PAIRS_OF_IMAGENET_LT = 5012, 6851  # arXiv 2410.15980


def true_counts(name: str, labels: Path) -> list[int]:
    """Training images of each target."""
    if name == "imagenet-lt":
        counts = json.loads((labels / "ImageNet_LT_train_class_counts.json").read_text())
        return list(counts.values()) if isinstance(counts, dict) else counts
    if name == "places-lt":
        lines = (labels / "Places_LT_train.txt").read_text().splitlines()
        return np.bincount([int(line.split()[1]) for line in lines]).tolist()
    classes = len(
        {line.split()[1] for line in (labels / "iNaturalist18_val.txt").read_text().splitlines()}
    )
    # its training list is not at hand, but its ends are known
    return np.geomspace(1000, 2, classes).astype(int).tolist()


def class_space(counts: list[int], auxiliaries: int, pairs: int) -> ClassSpace:
    rng = np.random.default_rng(0)
    once = {(int(rng.integers(len(counts))), len(counts) + a) for a in range(auxiliaries)}
    while len(once) < pairs:
        once.add((int(rng.integers(len(counts))), len(counts) + int(rng.integers(auxiliaries))))
    return ClassSpace(
        target_names=[f"t{i}" for i in range(len(counts))],
        auxiliary_names=[f"a{i}" for i in range(auxiliaries)],
        train_counts=[*counts, *[50] * auxiliaries],
        val_counts=[1] * len(counts),
        pairs=sorted(once),
    )


def counted_pack(folder: Path, space: ClassSpace) -> Path:
    """Every entry of the index is one of six photos-like JPEGs."""
    rng = np.random.default_rng(1)
    for split, count in (("target", 6), ("val", 1)):
        (folder / split / "only").mkdir(parents=True)
        for i in range(count):
            pixels = np.repeat(
                np.repeat(rng.integers(0, 256, (30, 40, 3), np.uint8), 8, axis=0), 8, axis=1
            )
            Image.fromarray(pixels).save(folder / split / "only" / f"{i}.jpg")
    collection = read_collection(folder / "target", None, folder / "val", None, None, None)
    pack = write_pack(collection, PackOptions(out=folder / "pack", workers=1), Console(quiet=True))
    with np.load(pack / "index.npz") as index:
        columns = dict(index)
    for split, label in (
        ("train", np.repeat(np.arange(space.num_classes), space.train_counts)),
        ("val", np.arange(space.num_targets)),
    ):
        stored = np.arange(len(label)) % len(columns[f"{split}_label"])
        columns |= {
            name: values[stored] for name, values in columns.items() if name.startswith(f"{split}_")
        }
        columns[f"{split}_label"] = label.astype(np.int32)
    np.savez(pack / "index.npz", **columns)
    space.save(pack / "classes.json")
    manifest = json.loads((pack / "manifest.json").read_text())
    for name in ("index.npz", "classes.json"):
        data = (pack / name).read_bytes()
        manifest["files"][name] = {
            **manifest["files"][name],
            "size": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
    (pack / "manifest.json").write_text(json.dumps(manifest))
    return pack
