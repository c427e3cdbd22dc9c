"""What every kind of source gives: references to images, with labels of its own, and how files and
folders of the user are read.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from fastlt.errors import DataError
from fastlt.packing.collection import ImageRef


@dataclass(frozen=True)
class Reading:
    """The options that say how a source is read."""

    root: Path | None = None  # the folder that the paths of lists start from
    limit: int | None = None  # integer labels must be below it
    may_be_empty: bool = False  # a class folder without images is allowed
    image_key: str = ""  # of shards what follows an image's key, of tables the column
    label_key: str = ""


@dataclass(frozen=True)
class Listing:
    """One of --target, --auxiliary, --val and --test as it stands, its labels still its own."""

    where: Path
    refs: list[ImageRef]
    names: dict[int, str]  # by label; empty where the source names none
    numbered: bool = False  # labels are integers that the user chose, so target and val share them
    # files that are no images, by extension
    left_out: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def warnings(self) -> list[str]:
        """Return what is to be said of the source."""
        if not self.left_out:
            return self.notes
        kinds = ", ".join(f"{times} x {kind}" for kind, times in self.left_out.most_common(3))
        total = self.left_out.total()
        return [*self.notes, f"{self.where}: {total} files left out that are no images ({kinds})"]


def by_name(where: Path, keyed: Sequence[tuple[ImageRef, str]]) -> Listing:
    """Return images, each with the name of its class, as a listing; classes are sorted."""
    names = sorted({name for _, name in keyed})
    ids = {name: label for label, name in enumerate(names)}
    refs = [relabelled(ref, ids[name]) for ref, name in keyed]
    return Listing(where, refs, dict(enumerate(names)))


def relabelled(ref: ImageRef, label: int) -> ImageRef:
    """Return an image with another label; faster than dataclasses.replace for many."""
    return ImageRef(ref.key, label, ref.path, ref.offset, ref.size, ref.part, ref.column)


def in_range(label: int, place: str, limit: int | None) -> int:
    """Return an integer label. DataError where it is negative, or `limit` or more."""
    if label < 0:
        raise DataError(f"{place}: label {label} is out of range: labels start at 0")
    if limit is not None and label >= limit:
        raise DataError(
            f"{place}: label {label} is out of range: there are {limit} target classes, 0 to "
            f"{limit - 1}"
        )
    return label


def read_text(file: Path) -> str:
    """Return a text file. DataError where it cannot be read, or is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from error


def children(folder: Path) -> list[Path]:
    """Return what lies in a folder. DataError where it cannot be listed."""
    try:
        return list(folder.iterdir())
    except OSError as error:
        cannot_list(error)


def cannot_list(error: OSError) -> NoReturn:
    """Raise DataError of a folder that cannot be read."""
    raise DataError(f"cannot read the folder {error.filename}: {error.strerror}") from error


def first_missing(refs: Sequence[ImageRef]) -> tuple[int, str] | None:
    """Return the first image that is not there, its place in the list and its path.

    One directory listing per folder instead of one question per file: much faster on network
    storage.
    """
    present: dict[str, set[str]] = {}
    for index, ref in enumerate(refs):
        parent, _, name = ref.path.rpartition("/")
        if parent not in present:
            folder = Path(parent or "/")
            found = children(folder) if folder.is_dir() else []
            present[parent] = {child.name for child in found}
        if name not in present[parent]:
            return index, ref.path
    return None


def within(relative: str, place: str) -> str:
    """Return a path of a list. DataError where it leaves the root folder."""
    if relative.startswith("/") or ".." in relative.split("/"):
        raise DataError(
            f"{place}: {relative} leaves the root folder: paths must be relative and stay below "
            "--root"
        )
    return relative
