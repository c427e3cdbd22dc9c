"""CIFAR-100 and the long-tailed tasks cut out of it.

Two forms are read: the official python archive (`train`, `test`, `meta`), and one lossless WebP per
class and split that holds the class's images one below the other (`train/00_apple.webp`, ..., with
`meta.json`).
"""

import io
import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastlt.decode.images import BadImage, decode
from fastlt.errors import UserError
from fastlt.packing.collection import Collection, ImageRef
from fastlt.utils.long_tail import long_tail

SIDE = 32
CLASSES, SUPERCLASSES = 100, 20
TASKS = ("cifar100-lt", "cifar100-siblings", "cifar100-deep", "cifar100-unrelated")
WITH_AUXILIARIES = ("cifar100-siblings", "cifar100-deep")
AUXILIARIES = ("siblings", "random", "none")
SEED = 0


@dataclass(frozen=True)
class Cifar:
    """Labels are the official ones: fine 0..99 and coarse 0..19, in the order of their names."""

    fine_names: list[str]
    coarse_names: list[str]
    coarse: list[int]  # superclass of each fine class
    train: list[list[tuple[str, int]]]  # (file, index in the file) of each image, by fine class
    test: list[list[tuple[str, int]]]

    def members(self, superclass: int) -> list[int]:
        """The fine classes of a superclass, in official order."""
        return [fine for fine in range(CLASSES) if self.coarse[fine] == superclass]

    def refs(
        self, split: str, fine: int, label: int, chosen: Sequence[int] | None = None
    ) -> list[ImageRef]:
        """All images of a class, or the chosen ones, under the given label."""
        stored = self.train[fine] if split == "train" else self.test[fine]
        places = stored if chosen is None else [stored[i] for i in chosen]
        return [
            ImageRef(f"{self.fine_names[fine]}/{split}_{part:05d}", label, path, part=part)
            for path, part in places
        ]


def read_cifar100(
    folder: Path, task: str, imbalance: float = 100, auxiliary: str | None = None
) -> Collection:
    """The collection of a task.

    `cifar100-lt`: the protocol of LDAM-DRW (arXiv 1906.07413), 100 targets, no auxiliaries.
    `cifar100-siblings`: 20 targets, the first 2 fine classes of superclasses 0..9; `auxiliary` says
    what is added: `siblings` (default), the other 3 fine classes of the same superclass; `random`,
    3 fine classes of superclass 10 + k for superclass k, as a control; or `none`.
    `cifar100-deep`: 20 targets, the first fine class of each superclass, with the first images of
    each; `siblings` are the other 4 of its superclass, `random` those of the next superclass.
    `cifar100-unrelated`: the 50 fine classes of superclasses 10..19 with all their images, to
    pretrain on. Raises UserError where the folder is not CIFAR-100 or the task does not exist.
    """
    auxiliary = auxiliary or ("siblings" if task in WITH_AUXILIARIES else "none")
    if task not in TASKS or auxiliary not in AUXILIARIES:
        raise UserError(
            f"there is no task '{task}' with auxiliaries '{auxiliary}': tasks are {TASKS}, "
            f"auxiliaries {AUXILIARIES}"
        )
    if task not in WITH_AUXILIARIES and auxiliary != "none":
        raise UserError(
            f"in {task} all classes are targets, so it has no '{auxiliary}' auxiliaries: use "
            "cifar100-siblings"
        )
    cifar = open_cifar(folder)
    if task == "cifar100-lt":
        return _long_tail(cifar, imbalance)
    if task == "cifar100-unrelated":
        return _unrelated(cifar)
    if task == "cifar100-deep":
        return _deep(cifar, imbalance, auxiliary)
    return _siblings(cifar, imbalance, auxiliary)


def tail_counts(largest: int, imbalance: float, classes: int) -> list[int]:
    """Return the images of each class. Raises UserError where the imbalance cannot be had."""
    if imbalance < 1:
        raise UserError(
            f"the imbalance is {imbalance}: it must be 1 or more, the largest class over the "
            "smallest"
        )
    counts = long_tail(largest, imbalance, classes)
    if counts[-1] < 1:
        raise UserError(
            f"an imbalance of {imbalance} leaves classes without images: it can be {largest} at "
            "most"
        )
    return counts


def _long_tail(cifar: Cifar, imbalance: float) -> Collection:
    classes = range(CLASSES)
    train, _ = _cut(cifar, classes, tail_counts(_largest(cifar), imbalance, CLASSES))
    return Collection(
        cifar.fine_names, train, [ref for fine in classes for ref in cifar.refs("test", fine, fine)]
    )


def _deep(cifar: Cifar, imbalance: float, auxiliary: str) -> Collection:
    targets = [cifar.members(k)[0] for k in range(SUPERCLASSES)]
    rank = np.random.RandomState(SEED).permutation(len(targets))
    tail = tail_counts(_largest(cifar), imbalance, len(targets))
    collection = Collection([cifar.fine_names[fine] for fine in targets], [], [])
    for label, fine in enumerate(targets):
        images = cifar.refs("train", fine, label)
        collection.train += images[: tail[rank[label]]]
        collection.unused += images[tail[rank[label]] :]
        collection.val += cifar.refs("test", fine, label)
    for k in range(SUPERCLASSES) if auxiliary != "none" else ():
        owner = k if auxiliary == "siblings" else (k - 1) % SUPERCLASSES
        _add_auxiliaries(collection, cifar, k, cifar.members(k)[1:], [owner])
    collection.pairs.sort()
    return collection


def _add_auxiliaries(
    collection: Collection, cifar: Cifar, superclass: int, added: Sequence[int], owners: list[int]
) -> None:
    """Add fine classes of a superclass with all their images, as neighbours of some targets."""
    for fine in added:
        label = len(collection.target_names) + len(collection.auxiliary_names)
        collection.auxiliary_names.append(cifar.fine_names[fine])
        collection.origins[cifar.fine_names[fine]] = (
            f"CIFAR-100, superclass {cifar.coarse_names[superclass]}"
        )
        collection.train += cifar.refs("train", fine, label)
        collection.pairs += [(owner, label) for owner in owners]


def _unrelated(cifar: Cifar) -> Collection:
    classes = [fine for k in range(10, SUPERCLASSES) for fine in cifar.members(k)]
    train, test = (
        [ref for label, fine in enumerate(classes) for ref in cifar.refs(split, fine, label)]
        for split in ("train", "test")
    )
    return Collection([cifar.fine_names[fine] for fine in classes], train, test)


def _siblings(cifar: Cifar, imbalance: float, auxiliary: str) -> Collection:
    targets = [fine for k in range(10) for fine in cifar.members(k)[:2]]
    rank = np.random.RandomState(SEED).permutation(len(targets))
    counts = tail_counts(_largest(cifar), imbalance, len(targets))
    train, unused = _cut(cifar, targets, [counts[place] for place in rank])
    collection = Collection(
        target_names=[cifar.fine_names[fine] for fine in targets],
        train=train,
        val=[ref for label, fine in enumerate(targets) for ref in cifar.refs("test", fine, label)],
        unused=unused,
    )
    for k in range(10) if auxiliary != "none" else ():
        superclass = k if auxiliary == "siblings" else 10 + k
        added = (
            cifar.members(superclass)[2:]
            if auxiliary == "siblings"
            else cifar.members(superclass)[:3]
        )
        _add_auxiliaries(collection, cifar, superclass, added, [2 * k, 2 * k + 1])
    collection.pairs.sort()
    return collection


def _largest(cifar: Cifar) -> int:
    return sum(map(len, cifar.train)) // CLASSES


def _cut(
    cifar: Cifar, classes: Sequence[int], counts: Sequence[int]
) -> tuple[list[ImageRef], list[ImageRef]]:
    """Return the images that are kept and those that are not.

    Which are kept is as in LDAM-DRW: numpy's legacy generator, seed 0, one shuffle per class in
    order.
    """
    rng = np.random.RandomState(SEED)
    kept, others = [], []
    for label, (fine, count) in enumerate(zip(classes, counts, strict=True)):
        order = np.arange(len(cifar.train[fine]))
        rng.shuffle(order)
        kept += cifar.refs("train", fine, label, order[:count].tolist())
        others += cifar.refs("train", fine, label, order[count:].tolist())
    return kept, others


def open_cifar(folder: Path) -> Cifar:
    """Return CIFAR-100 of a folder. Raises UserError where it holds neither form."""
    for place in (folder, folder / "cifar-100-python"):
        if all((place / name).is_file() for name in ("train", "test", "meta")):
            return _open_archive(place)
    if (folder / "meta.json").is_file():
        return _open_strips(folder)
    raise UserError(
        f"{folder} is not CIFAR-100: it must hold the files train, test and meta of the official "
        "python archive, "
        "or meta.json with the folders train and test of WebP strips"
    )


def png_bytes(path: str, part: int) -> bytes:
    """One image as PNG, the same bytes every time.

    Raises BadImage where the strip cannot be decoded.
    """
    pixels = _strip(path) if path.endswith(".webp") else _archive_pixels(path)
    buffer = io.BytesIO()
    Image.fromarray(pixels[part]).save(buffer, "PNG")
    return buffer.getvalue()


def _open_strips(folder: Path) -> Cifar:
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        fine, coarse, table = meta["fine_names"], meta["coarse_names"], meta["fine_to_coarse"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / 'meta.json'} must hold fine_names, coarse_names and fine_to_coarse: "
            f"{error!r}"
        ) from error
    _check_tables(folder, fine, coarse, table)
    strips = {
        split: [
            [(str(strip), part) for part in range(_images_in(strip))]
            for strip in _strip_paths(folder / split, fine)
        ]
        for split in ("train", "test")
    }
    return Cifar(fine, coarse, table, strips["train"], strips["test"])


def _strip_paths(folder: Path, names: list[str]) -> list[Path]:
    return [folder / f"{label:02d}_{name}.webp" for label, name in enumerate(names)]


def _images_in(strip: Path) -> int:
    try:
        with Image.open(strip) as image:
            width, height = image.size
    except OSError as error:
        raise UserError(f"cannot read the CIFAR-100 strip {strip}: {error}") from error
    if width != SIDE or height % SIDE:
        raise UserError(
            f"the CIFAR-100 strip {strip} has {width} x {height} pixels: it must be 32 wide and a "
            "multiple of 32 high"
        )
    return height // SIDE


@lru_cache(maxsize=2)
def _strip(path: str) -> np.ndarray:
    """(n, 32, 32, 3) uint8."""
    try:
        return decode(Path(path).read_bytes()).reshape(-1, SIDE, SIDE, 3)
    except OSError as error:
        raise BadImage(f"cannot be read: {error.strerror}") from error


def _open_archive(folder: Path) -> Cifar:
    meta, train, test = (_unpickle(folder / name) for name in ("meta", "train", "test"))
    try:
        fine, coarse = _texts(meta["fine_label_names"]), _texts(meta["coarse_label_names"])
        fine_labels, coarse_labels = (
            np.asarray(train["fine_labels"]),
            np.asarray(train["coarse_labels"]),
        )
        table = [
            int(coarse_labels[np.flatnonzero(fine_labels == label)[0]]) for label in range(CLASSES)
        ]
        images = {
            name: [
                [
                    (str(folder / name), int(part))
                    for part in np.flatnonzero(np.asarray(content["fine_labels"]) == label)
                ]
                for label in range(CLASSES)
            ]
            for name, content in (("train", train), ("test", test))
        }
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{folder} does not hold the official CIFAR-100 archive: {error!r}"
        ) from error
    _check_tables(folder, fine, coarse, table)
    for name in ("train", "test"):
        _check_pixels(
            folder / name,
            (train if name == "train" else test).get("data"),
            sum(map(len, images[name])),
        )
    return Cifar(fine, coarse, table, images["train"], images["test"])


def _texts(names: list[str | bytes]) -> list[str]:
    return [name.decode() if isinstance(name, bytes) else name for name in names]


def _check_tables(folder: Path, fine: Any, coarse: Any, table: Any) -> None:
    sizes_fit = len(fine) == len(table) == CLASSES and len(coarse) == SUPERCLASSES
    if not sizes_fit or any(table.count(k) != CLASSES // SUPERCLASSES for k in range(SUPERCLASSES)):
        raise UserError(
            f"{folder} is not CIFAR-100: it must have 100 fine classes, 5 in each of 20 "
            "superclasses"
        )


def _check_pixels(file: Path, pixels: Any, images: int) -> None:
    if (
        not isinstance(pixels, np.ndarray)
        or pixels.dtype != np.uint8
        or pixels.shape != (images, 3 * SIDE * SIDE)
    ):
        raise UserError(
            f"{file} does not hold CIFAR-100 images: its data must be {images} rows of "
            f"{3 * SIDE * SIDE} bytes"
        )


@lru_cache(maxsize=1)
def _archive_pixels(path: str) -> np.ndarray:
    """(n, 32, 32, 3) uint8; stored as planes."""
    return np.ascontiguousarray(
        _unpickle(Path(path))["data"].reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    )


class _ArrayUnpickler(pickle.Unpickler):
    """Builds plain values and numpy arrays alone, so a forged archive cannot run code."""

    ALLOWED = (("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode"))

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        if (module, name) in self.ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no plain data")


def _unpickle(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = _ArrayUnpickler(file, encoding="bytes").load()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # a damaged pickle raises about anything
        raise UserError(
            f"{path} is not a file of the official CIFAR-100 archive: {error}"
        ) from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path} is not a file of the official CIFAR-100 archive: it holds no dictionary"
        )
    return {
        key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()
    }
