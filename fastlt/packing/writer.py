"""`fastlt pack`: a collection of images becomes the one folder that every loader reads; reader.py
is the other end.

The shards depend on the collection and the options alone, not on the number of workers.
"""

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from fastlt.classes import ClassSpace
from fastlt.decode.deep import Scale, limits_of
from fastlt.decode.images import MAX_PIXELS
from fastlt.decode.region import check_transcoder
from fastlt.errors import UserError
from fastlt.packing.collection import Collection, ImageRef
from fastlt.packing.conflicts import without_conflicts
from fastlt.packing.depth import AUTO, check_range, find_scale
from fastlt.packing.encode import ImageSettings, Stored, store_batch
from fastlt.packing.packed import WORDS, Packed, described, entries
from fastlt.packing.reader import FORMAT_VERSION, Split, check_sizes, read_manifest
from fastlt.packing.shards import ShardWriter, member_keys
from fastlt.packing.summary import print_summary
from fastlt.utils.files import sha256_of, whole_file, write_text
from fastlt.utils.output import whole_output
from fastlt.utils.pool import OrderedMap, cores, ordered_map
from fastlt.utils.progress import rated_progress

# what the manifest tells of single images
LISTED = ("skipped", "first_frames", "leaks", "duplicates", "conflicts")
BATCH = 16  # images that travel to a worker at a time


@dataclass(frozen=True)
class PackOptions:
    """The options of `fastlt pack` that do not say which images are packed."""

    out: Path
    workers: int = 0  # processes; 0: one per core
    max_side: int = 0  # pixels; larger images are shrunk and stored as JPEG; 0: none
    # of JPEG; without max_side every image is stored so; 0: images stay as they are
    quality: int = 0
    # rewrite JPEGs losslessly, with restart markers: crops of them are decoded faster
    transcode: bool = False
    strict: bool = False  # stop at the first image that cannot be used
    drop_leaks: bool = False  # leave out training images that are in val or test as well
    drop_conflicts: bool = False  # leave out training images that stand under several classes
    max_pixels: int = MAX_PIXELS  # of one image
    shard_size: int = 256 * 2**20  # bytes
    # of values of more than eight bits, which become black to white: auto, full or LOW,HIGH
    range: str = AUTO

    def images(self, scale: Scale) -> ImageSettings:
        """The options that change what is stored of an image."""
        return ImageSettings(self.max_side, self.quality, self.max_pixels, self.transcode, scale)


# (split, path, workers, advance): writes another file of the images of a split
WriteBeton = Callable[[Split, Path, int, Callable[[int], None]], None]


def write_pack(
    collection: Collection,
    options: PackOptions,
    console: Console,
    write_beton: WriteBeton | None = None,
) -> Path:
    """Write the pack, print a summary, and return the pack's folder.

    A pack is whole or not there. `write_beton` writes the FFCV file of a split, where that is
    wanted.

    Raises UserError where the output exists, the disk is full, a class or all of val has no usable
    image left, a worker dies, or, with `strict`, an image cannot be used.
    """
    _check(collection, options)
    start = time.perf_counter()
    with whole_output(options.out) as folder:
        space, splits, images = _write_images(collection, options, folder, console)
        _write_tables(options, images, folder, space, splits, console, write_beton)
    seconds = time.perf_counter() - start
    print_summary(collection, space, splits, f"pack {options.out}", seconds, console)
    return options.out


def verify_pack(path: Path, console: Console | None = None) -> int:
    """Read every byte of the pack, compare it with the manifest, and return the number of files.

    Raises UserError that names a file whose bytes are not those of the manifest.
    """
    manifest = read_manifest(path)
    check_sizes(path, manifest, manifest["files"])
    files = manifest["files"]
    with rated_progress(console, "MB/s", scale=1e-6) as progress:
        task = progress.add_task("verifying", total=sum(entry["size"] for entry in files.values()))
        for name, entry in files.items():
            try:
                matches = sha256_of(path / name) == entry["sha256"]
            except OSError as error:
                raise UserError(
                    f"cannot read {path / name}: {error.strerror}; copy the pack again or pack "
                    "again"
                ) from error
            if not matches:
                raise UserError(
                    f"{path / name} is damaged: its bytes do not match the manifest; copy the pack "
                    "again or pack again"
                )
            progress.advance(task, entry["size"])
    return len(files)


def _check(collection: Collection, options: PackOptions) -> None:
    if not collection.train or not collection.val:
        raise UserError(
            f"there are no images to pack: {len(collection.train)} for training, "
            f"{len(collection.val)} for validation"
        )
    for name, least in (
        ("workers", 0),
        ("max_side", 0),
        ("quality", 0),
        ("max_pixels", 1),
        ("shard_size", 1),
    ):
        if getattr(options, name) < least:
            raise UserError(
                f"--{name.replace('_', '-')} is {getattr(options, name)}: it must be {least} or "
                "more"
            )
    if options.quality > 100:
        raise UserError(
            f"--quality is {options.quality}: it must be 1 to 100, or 0 to leave images as they are"
        )
    check_range(options.range)
    if options.transcode:
        check_transcoder("--transcode")


def _write_images(
    collection: Collection, options: PackOptions, folder: Path, console: Console
) -> tuple[ClassSpace, dict[str, Packed], ImageSettings]:
    """Write val and test first, so that train can be compared with them."""
    names = collection.target_names + collection.auxiliary_names
    done: dict[str, Packed] = {}
    dropped: list[dict[str, Any]] = []
    with (
        ordered_map(options.workers or cores()) as apply,
        rated_progress(console, "images/s") as progress,
    ):
        if options.drop_conflicts:
            collection.train, dropped = without_conflicts(collection.train, names, apply)
        refs = {"train": collection.train, "val": collection.val}
        refs |= {"test": collection.test} if collection.test else {}
        every_key = iter(member_keys(ref.key for part in refs.values() for ref in part))
        keys = {name: list(islice(every_key, len(part))) for name, part in refs.items()}
        images = _image_settings(collection, options, apply)
        task = progress.add_task("packing", total=sum(map(len, refs.values())))
        for name in sorted(refs, key=("val", "test", "train").index):
            results = _results(refs[name], images, apply, partial(progress.advance, task))
            done[name] = _write_split(
                folder / name, refs[name], keys[name], results, options, names, done
            )
            if not done[name].rows:
                raise UserError(
                    f"none of the {WORDS[name]} images can be used; the first, "
                    f"{described(done[name].skipped[0])}"
                )
    done["train"].conflicts = dropped + done["train"].conflicts
    splits = {name: done[name] for name in refs}
    return _class_space(collection, splits["train"], splits["val"]), splits, images


def _image_settings(
    collection: Collection, options: PackOptions, apply: OrderedMap
) -> ImageSettings:
    """The options that change what is stored of an image, with the range of what has more than
    eight bits, which the collection's warnings say.
    """
    others = [*collection.val, *collection.test]
    found, sentences = find_scale(options.range, collection.train, others, apply)
    collection.warnings += sentences
    return options.images({**collection.scale, **found})


def _results(
    refs: list[ImageRef], images: ImageSettings, apply: OrderedMap, advance: Callable[[int], None]
) -> Iterator[Stored | str]:
    batches = (refs[start : start + BATCH] for start in range(0, len(refs), BATCH))
    for batch in apply(partial(store_batch, settings=images), batches):
        advance(len(batch))
        yield from batch


def _write_split(
    folder: Path,
    refs: list[ImageRef],
    keys: list[str],
    results: Iterator[Stored | str],
    options: PackOptions,
    names: list[str],
    done: dict[str, Packed],
) -> Packed:
    """Write the shards of a split; its images are compared with those of the splits in `done`.

    Every class of train must keep an image.
    """
    packed = Packed()
    is_train = folder.name == "train"
    left = Counter(ref.label for ref in refs)
    with ShardWriter(folder, options.shard_size) as shards:
        for ref, key, result in zip(refs, keys, results, strict=True):
            if isinstance(result, str):
                cause = result
                packed.skipped.append(
                    {"split": folder.name, "key": key, "path": ref.path, "reason": result}
                )
                if options.strict:
                    raise UserError(
                        f"{described(packed.skipped[-1])}; mend or remove it, or pack without "
                        "--strict to skip it"
                    )
            elif leaked := _leaks_into(folder.name, key, result, packed, done, options):
                cause = f"it is a {leaked} image too"
            else:
                _note_repeated(packed, folder.name, key, ref, result, names)
                if result.frames > 1:
                    packed.first_frames.append(
                        {"split": folder.name, "key": key, "path": ref.path}
                        | {"frames": result.frames}
                    )
                shard, offset = shards.add(key, result.extension, result.data, ref.label)
                packed.rows.append(
                    (shard, offset, len(result.data), ref.label, result.height, result.width)
                )
                continue
            left[ref.label] -= 1
            if is_train and not left[ref.label]:
                raise UserError(
                    f"no training image of class '{names[ref.label]}' can be used; the last, "
                    f"{ref.path}: {cause}"
                )
    packed.files = shards.files
    return packed


def _note_repeated(
    packed: Packed, split: str, key: str, ref: ImageRef, stored: Stored, names: list[str]
) -> None:
    """Note where the image was in the split before, under its class or another one."""
    first, label = packed.digests.setdefault(stored.digest, (key, ref.label))
    if first == key:
        return
    entry = {"split": split, "key": key, "first": first}
    if label == ref.label:
        packed.duplicates.append(entry)
    else:
        classes = [names[label], names[ref.label]]
        packed.conflicts.append({**entry, "path": ref.path, "classes": classes, "dropped": False})


def _leaks_into(
    split: str,
    key: str,
    stored: Stored,
    packed: Packed,
    done: dict[str, Packed],
    options: PackOptions,
) -> str | None:
    """Note where the image is in a split that was written before.

    Return the word for that split where the image is to be left out for it.
    """
    found = [name for name, other in done.items() if stored.digest in other.digests]
    dropped = options.drop_leaks and split == "train"
    for name in found:
        packed.leaks.append(
            {split: key, name: done[name].digests[stored.digest][0], "dropped": dropped}
        )
    return WORDS[found[0]] if found and dropped else None


def _class_space(collection: Collection, train: Packed, val: Packed) -> ClassSpace:
    targets = len(collection.target_names)
    return ClassSpace(
        target_names=collection.target_names,
        auxiliary_names=collection.auxiliary_names,
        train_counts=np.bincount(
            train.columns()["label"], minlength=targets + len(collection.auxiliary_names)
        ).tolist(),
        val_counts=np.bincount(val.columns()["label"], minlength=targets).tolist(),
        pairs=collection.pairs,
        origins=collection.origins,
        curation=collection.curation,
        display_names=collection.display_names,
        descriptions=collection.descriptions,
    )


def _write_tables(
    options: PackOptions,
    images: ImageSettings,
    folder: Path,
    space: ClassSpace,
    splits: dict[str, Packed],
    console: Console,
    write_beton: WriteBeton | None,
) -> None:
    """Write classes.json, index.npz, the FFCV files where wanted, and the manifest last."""
    space.save(folder / "classes.json")
    columns: dict[str, Any] = {
        f"{name}_{column}": values
        for name, packed in splits.items()
        for column, values in packed.columns().items()
    }
    with whole_file(folder / "index.npz") as temporary, temporary.open("wb") as file:
        np.savez(file, **columns)
    if write_beton is not None:
        _write_betons(options, folder, splits, console, write_beton)
    files = {
        f"{name}/{shard}": entry
        for name, packed in splits.items()
        for shard, entry in packed.files.items()
    }
    files |= {path.name: entry_of(path) for path in sorted(folder.iterdir()) if path.is_file()}
    write_text(
        folder / "manifest.json",
        json.dumps(_manifest(images, space, splits, files), indent=1) + "\n",
    )


def _write_betons(
    options: PackOptions,
    folder: Path,
    splits: dict[str, Packed],
    console: Console,
    write_beton: WriteBeton,
) -> None:
    with rated_progress(console, "images/s") as progress:
        task = progress.add_task(
            "writing .beton", total=sum(len(packed.rows) for packed in splits.values())
        )
        for name, packed in splits.items():
            split = Split(name, folder / name, tuple(packed.files), **packed.columns())
            write_beton(
                split,
                folder / f"{name}.beton",
                options.workers or cores(),
                partial(progress.advance, task),
            )


def _manifest(
    images: ImageSettings, space: ClassSpace, splits: dict[str, Packed], files: dict[str, Any]
) -> dict[str, Any]:
    counts = {
        "targets": space.num_targets,
        "auxiliaries": space.num_auxiliaries,
        "pairs": len(space.pairs),
    }
    return {
        "format_version": FORMAT_VERSION,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "fastlt": version("fastlt"),
        "counts": {name: len(packed.rows) for name, packed in splits.items()} | counts,
        "images": {**asdict(images), "scale": limits_of(images.scale)},
        "files": files,
        "shards": {name: list(packed.files) for name, packed in splits.items()},
        **{name: entries(splits, name) for name in LISTED},
    }


def entry_of(path: Path) -> dict[str, Any]:
    """Return the size and the SHA-256 of a file, as the manifest lists them."""
    return {"size": path.stat().st_size, "sha256": sha256_of(path)}
