"""Class folders as a source: a sub-folder of images for each class."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from fastlt.decode.formats import is_image_file
from fastlt.errors import DataError
from fastlt.packing.collection import ImageRef
from fastlt.packing.listing import Listing, Reading, cannot_list

# folders that systems and programs make, in lower case
OF_SYSTEMS = frozenset(
    {
        *("__macosx", "@eadir", "lost+found", "$recycle.bin", "system volume information"),
        *("#recycle", "@recycle", "@tmp", "#snapshot", "__pycache__"),
    }
)


def is_of_a_system(name: str) -> bool:
    """Return whether a folder is hidden, or one that systems make beside the user's."""
    return name.startswith(".") or name.lower() in OF_SYSTEMS


def list_class_folders(path: Path, folders: list[Path], reading: Reading) -> Listing:
    """Return the images of class folders; those of systems are no classes.

    Raises DataError where a folder's name is not UTF-8, or one holds no images.
    """
    classes = [folder for folder in folders if not is_of_a_system(folder.name)]
    refs: list[ImageRef] = []
    left_out: Counter[str] = Counter()
    for label, folder in enumerate(classes):
        if not is_text(folder.name):
            raise DataError(
                f"{path}: the name of class folder {folder.name!a} is not valid UTF-8: rename it"
            )
        before = len(refs)
        for relative in files_below(folder):
            if is_image_file(f"{folder}/{relative}"):
                stem = relative.rpartition(".")[0] or relative
                refs.append(ImageRef(f"{folder.name}/{stem}", label, f"{folder}/{relative}"))
            else:
                left_out[Path(relative).suffix or "without extension"] += 1
        if len(refs) == before and not reading.may_be_empty:
            raise DataError(f"the class folder {folder} holds no images: add some or remove it")
    notes = []
    if others := [folder.name for folder in folders if folder.name.lower() in OF_SYSTEMS]:
        notes.append(f"{path}: no classes, as systems make such folders: {', '.join(others)}")
    names = {label: folder.name for label, folder in enumerate(classes)}
    return Listing(path, refs, names, left_out=left_out, notes=notes)


def files_below(folder: Path) -> Iterator[str]:
    """Yield paths relative to `folder`, sorted, without what is hidden or of a system."""
    start = len(str(folder)) + 1
    for parent, folders, files in os.walk(folder, onerror=cannot_list):
        folders[:] = sorted(name for name in folders if not is_of_a_system(name))
        yield from (
            f"{parent}/{name}"[start:] for name in sorted(files) if not name.startswith(".")
        )


def is_text(name: str) -> bool:
    """Return whether the name of a file is UTF-8."""
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:  # a surrogate: the bytes of the file name are no UTF-8
        return False
    return True
