"""Reading a pack: random access to every stored image, without a copy."""

import hashlib
import json
import mmap
import sys
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastlt.classes import ClassSpace
from fastlt.decode.deep import Scale, scale_of
from fastlt.decode.images import BadImage, decode_pil
from fastlt.errors import DataError
from fastlt.packing.remote import TABLES, Remote, fetch_tables, is_remote

FORMAT_VERSION = 1
SPLITS = ("train", "val", "test")
MAPPED_AT_ONCE = 4  # shards of a remote pack
ATTEMPTS = 5
COLUMNS = {
    "shard": np.int32,
    "offset": np.int64,
    "size": np.int32,
    "label": np.int32,
    "height": np.int32,
    "width": np.int32,
}


@dataclass(frozen=True)
class Split:
    """The images of `train`, `val` or `test`.

    Every column has one entry per image; height and width are those of the upright image.
    """

    name: str
    folder: Path
    shards: tuple[str, ...]  # file names inside `folder`
    shard: np.ndarray  # (n,) int32, index into shards
    offset: np.ndarray  # (n,) int64, bytes
    size: np.ndarray  # (n,) int32, bytes
    label: np.ndarray  # (n,) int32
    height: np.ndarray  # (n,) int32, pixels
    width: np.ndarray  # (n,) int32, pixels
    # where the shards come from, if they are not in `folder` from the start
    remote: Remote | None = None
    _maps: dict[int, mmap.mmap] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.label)

    def subset(self, images: np.ndarray) -> "Split":
        """The split of these images (n,) int alone."""
        return replace(self, **{name: getattr(self, name)[images] for name in COLUMNS}, _maps={})

    def read(self, image: int) -> memoryview:
        """The encoded bytes of one image: a view of the mapped shard, no copy."""
        offset = int(self.offset[image])
        return memoryview(self._map(int(self.shard[image])))[
            offset : offset + int(self.size[image])
        ]

    def addresses(self, images: np.ndarray) -> tuple[np.ndarray, list[mmap.mmap]]:
        """Where the encoded bytes of images (n,) lie in memory, (n,) uint64, for as long as the
        second result lives.
        """
        maps = {int(shard): self._map(int(shard)) for shard in np.unique(self.shard[images])}
        starts = {
            shard: int(np.frombuffer(mapped, np.uint8).ctypes.data)
            for shard, mapped in maps.items()
        }
        first = np.array([starts[shard] for shard in self.shard[images].tolist()], np.uint64)
        return first + self.offset[images].astype(np.uint64), list(maps.values())

    def key(self, image: int) -> str:
        """The image's key in its shard, as `tar tf` lists it: read from the tar header that stands
        before the bytes.
        """
        header = memoryview(self._map(int(self.shard[image])))
        start = int(self.offset[image]) - 512
        return bytes(header[start : start + 100]).split(b"\0", 1)[0].decode("utf-8", "replace")

    def where(self, image: int) -> str:
        """For messages: shard and key of an image."""
        folder = self.folder if self.remote is None else f"{self.remote.url}/{self.name}"
        return f"{folder}/{self.shards[int(self.shard[image])]}:{self.key(image)}"

    def fetched(self, shard: int) -> Path:
        """The shard's local file. Raises DataError where it cannot be had."""
        name = self.shards[shard]
        return (
            self.folder / name if self.remote is None else self.remote.fetch(f"{self.name}/{name}")
        )

    def _map(self, shard: int) -> mmap.mmap:
        if shard not in self._maps:
            self._maps[shard] = self._mapped(shard)
            if (
                self.remote is not None and len(self._maps) > MAPPED_AT_ONCE
            ):  # a mapped file takes its space until then
                del self._maps[next(iter(self._maps))]
        return self._maps[shard]

    def _mapped(self, shard: int) -> mmap.mmap:
        for _ in range(ATTEMPTS):
            path = self.fetched(shard)
            try:
                with path.open("rb") as file:
                    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except FileNotFoundError:
                if self.remote is None:
                    break
                continue  # another process made room in the cache just now
        raise DataError(
            f"{path} has vanished from the pack: copy the pack again, or raise data.cache_gb"
        )

    def __getstate__(self) -> dict[str, Any]:
        # a mapping cannot travel to a worker process; it is made anew there
        return {
            **self.__dict__,
            "_maps": {},
        }


@dataclass(frozen=True)
class Pack:
    """An opened pack: its classes, and the images of each split."""

    path: Path
    manifest: dict[str, Any]
    space: ClassSpace
    train: Split
    val: Split
    test: Split | None = None  # images that training never reads
    # the classes whose images are drawn, where they are not those that are trained
    drawn: ClassSpace | None = None

    @property
    def id(self) -> str:
        """An identifier that changes with the classes, the pairs, and what is stored where."""
        files = self.manifest["files"]
        return "-".join(files[name]["sha256"][:16] for name in ("classes.json", "index.npz"))

    @property
    def scale(self) -> Scale:
        """What became black and white of images of more than eight bits."""
        images = self.manifest.get("images")
        return scale_of(images.get("scale")) if isinstance(images, dict) else {}

    def betons(self, split: str) -> tuple[Path, ...]:
        """The FFCV file of a split, if the pack has it."""
        path = self.path / f"{split}.beton"
        return (path,) if path.is_file() else ()


def open_pack(path: Path | str, cache_bytes: int = 100 * 10**9) -> Pack:
    """Open what `fastlt pack` wrote; path may be an address, of whose shards cache_bytes at most
    are kept here.

    Raises DataError where it is no pack or one of another version, and where a file is missing or
    truncated.
    """
    url = str(path).rstrip("/") if is_remote(str(path)) else ""
    path = fetch_tables(url) if url else Path(path)
    manifest = read_manifest(path)
    check_sizes(path, manifest, TABLES if url else manifest["files"])
    names = [name for name in SPLITS if name in ("train", "val") or name in manifest["shards"]]
    columns = _read_index(path / "index.npz", names)
    remote = Remote(url, path, cache_bytes, manifest["files"]) if url else None
    splits = {name: _split(path, name, manifest, columns, remote) for name in names}
    space = ClassSpace.load(path / "classes.json")
    return Pack(path, manifest, space, splits["train"], splits["val"], splits.get("test"))


def read_manifest(path: Path) -> dict[str, Any]:
    """Return manifest.json. Raises DataError where it is missing, damaged or too new."""
    if not path.is_dir():
        raise DataError(f"there is no pack at {path}: make one with `fastlt pack`")
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} is not a pack: it has no readable manifest.json; make one with `fastlt pack`"
        ) from error
    if not isinstance(manifest, dict) or "format_version" not in manifest:
        raise DataError(
            f"{path} is not a pack: its manifest.json is of something else; make one with `fastlt "
            "pack`"
        )
    if manifest["format_version"] != FORMAT_VERSION:
        raise DataError(
            f"{path} has pack format {manifest['format_version']}, this version reads "
            f"{FORMAT_VERSION}: pack again"
        )
    if not all(isinstance(manifest.get(part), dict) for part in ("files", "shards")):
        raise DataError(
            f"{path} is damaged: its manifest.json lists no files or shards; copy the pack again "
            "or pack again"
        )
    return manifest


def _read_index(file: Path, splits: list[str]) -> dict[str, np.ndarray]:
    try:
        with np.load(file) as index:
            columns = {name: index[name] for name in index.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(f"{file} is damaged ({error}): pack again, or copy it again") from error
    if missing := [
        name for split in splits for name in COLUMNS if f"{split}_{name}" not in columns
    ]:
        raise DataError(
            f"{file} is damaged: it has no column {missing[0]}; pack again, or copy it again"
        )
    return columns


def check_sizes(path: Path, manifest: dict[str, Any], names: Iterable[str]) -> None:
    """The files are there with their full length: cheap enough for every start, and it finds
    truncation.
    """
    for name, entry in manifest["files"].items():
        if name not in names:
            continue
        file = path / name
        if not file.is_file():
            raise DataError(f"{file} is missing from the pack: pack again, or copy it again")
        if file.stat().st_size != entry["size"]:
            found, wanted = file.stat().st_size, entry["size"]
            raise DataError(
                f"{file} is damaged: it has {found} bytes, the manifest says {wanted}; copy it "
                "again"
            )


def identity(split: Split) -> str:
    """Of the very images and their order, whatever their labels, as long as nobody writes others of
    the same sizes there.
    """
    used, shard = np.unique(split.shard, return_inverse=True)
    digest = hashlib.sha256(
        json.dumps(
            [str(split.folder.resolve()), *(split.shards[i] for i in used.tolist())]
        ).encode()
    )
    for column in (shard.astype(np.int32), split.offset, split.size):
        digest.update(column.tobytes())
    return digest.hexdigest()[:24]


def check_shards(split: Split) -> None:
    """The shards are there and long enough for the index: for engines, which may be given a split
    that no manifest covers.
    """
    if split.remote is not None:  # each is checked when it comes
        return
    ends = np.zeros(len(split.shards), np.int64)
    np.maximum.at(ends, split.shard, split.offset + split.size)
    for name, end in zip(split.shards, ends.tolist(), strict=True):
        file = split.folder / name
        if not file.is_file():
            raise DataError(f"{file} is missing from the pack: pack again, or copy it again")
        if file.stat().st_size < end:
            raise DataError(
                f"{file} is damaged: it has {file.stat().st_size} bytes, the index needs {end}; "
                "copy it again"
            )


def picture(split: Split, image: int, is_sound: bool = False) -> Image.Image:
    """One image, upright RGB.

    Raises DataError that names shard and key where it cannot be decoded. is_sound: as in
    decode_pil.
    """
    try:
        # what is too large was left out by packing
        found = decode_pil(split.read(image), sys.maxsize, is_sound)
    except (BadImage, OSError, ValueError) as error:
        raise DataError(
            f"{split.where(image)}: {error}; the pack is damaged: copy it again or pack again"
        ) from error
    if found.size != (split.width[image], split.height[image]):
        wanted = f"{split.width[image]} x {split.height[image]}"
        raise DataError(
            f"{split.where(image)}: {found.width} x {found.height} pixels, the index says "
            f"{wanted}: pack again"
        )
    return found


def _split(
    path: Path, name: str, manifest: dict[str, Any], columns: dict[str, Any], remote: Remote | None
) -> Split:
    values = {column: columns[f"{name}_{column}"] for column in COLUMNS}
    return Split(name, path / name, tuple(manifest["shards"][name]), remote=remote, **values)
