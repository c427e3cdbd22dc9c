"""The images of `fastlt bench-data`, in every form that a contender takes.

They are chosen once, and are byte for byte the same.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection as Names
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.filesize import decimal

from fastlt.data.engines.ffcv.beton import write_beton
from fastlt.data.engines.ffcv.native import has_ffcv
from fastlt.decode.formats import EXTENSIONS
from fastlt.decode.images import BadImage, open_image
from fastlt.decode.region import has_transcoder
from fastlt.errors import UserError
from fastlt.packing.collection import Collection, ImageRef
from fastlt.packing.encode import read_bytes
from fastlt.packing.reader import Pack, Split, open_pack
from fastlt.packing.writer import PackOptions, write_pack
from fastlt.utils.pool import cores
from fastlt.utils.signals import exit_on_sigterm
from fastlt_benchmarks.loaders.limits import decodes, turbojpeg
from fastlt_benchmarks.loaders.photos import WORTH_A_PROCESS, write_photos

# the forms; the limits read the pack
PACK, TRANSCODED, STOCK, FILES = (
    "pack",
    "transcoded",
    "stock",
    "files",
)
LARGEST_SIDE = 2**16 - 1  # pixels, of FFCV's own field
PAGE = 8 * 2**20  # bytes; FFCV's default
QUIET = Console(quiet=True)


@dataclass(frozen=True)
class Choice:
    """The images that all can decode, and where they are from."""

    refs: list[ImageRef]
    source: str  # generated, pack or folder
    what: str  # for people


@dataclass(frozen=True)
class Images:
    """The images in every form; one that nobody takes, or that cannot be made, is missing."""

    source: str
    what: str
    pack: Pack
    transcoded: Pack | None = None
    stock: Path | None = None  # a .beton as FFCV's own decoders read it
    files: list[str] = field(default_factory=list)

    @property
    def split(self) -> Split:
        """The images as a split of a pack."""
        return self.pack.train


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """Yield a folder that is removed at the end, SIGTERM included.

    Raises UserError where there is no place for one.
    """
    try:
        folder = Path(tempfile.mkdtemp(prefix="fastlt-bench-data-"))
    except OSError as error:
        raise UserError(
            f"there is no folder for temporary files ({error.strerror}): name one with TMPDIR"
        ) from error
    with exit_on_sigterm():
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def choose_images(
    data: str | None, images: Path | None, most: int, generated: int, folder: Path
) -> Choice:
    """Return images of a pack's training split, of a folder, or new ones in `folder`.

    Of more than `most` they are evenly spaced.

    Raises UserError where there are none, or no JPEG is among them.
    """
    if data is not None and images is not None:
        raise UserError("--data and --images exclude each other: leave one out")
    if data is not None:
        (taken, count), kind, where = pack_refs(open_pack(data).train, most), "pack", data
    elif images is not None:
        (taken, count), kind, where = folder_refs(images, most), "folder", str(images)
    else:
        return Choice(
            write_photos(folder, generated), "generated", f"{generated:,} generated photos"
        )
    # here, as numba comes with it, which takes the thread that loads it for the one that may fork
    turbojpeg()
    with ThreadPoolExecutor(cores()) as pool:
        usable = [ref for ref, good in zip(taken, pool.map(is_usable, taken), strict=True) if good]
    if not usable:
        raise UserError(
            f"none of the {len(taken):,} images in {where} is a sound JPEG, grey or colour: name "
            "others"
        )
    left_out = (
        f", {len(taken) - len(usable):,} that are no sound JPEG left out"
        if len(usable) < len(taken)
        else ""
    )
    of_more = f" of {count:,}" if len(taken) < count else ""
    return Choice(usable, kind, f"{len(usable):,}{of_more} photos of the {kind} {where}{left_out}")


def spaced(count: int, most: int) -> list[int]:
    """Return evenly spaced indices, `most` at most."""
    return np.linspace(0, count - 1, min(most, count)).astype(int).tolist()


def pack_refs(split: Split, most: int) -> tuple[list[ImageRef], int]:
    """Return evenly spaced images, and how many there are.

    Of a remote pack the shards with these are fetched.
    """
    if not len(split):
        raise UserError(f"{split.folder} holds no images: name another pack with --data")
    taken = spaced(len(split), most)
    shards = {
        shard: str(split.fetched(shard)) for shard in dict.fromkeys(split.shard[taken].tolist())
    }
    places = zip(
        split.shard[taken].tolist(),
        split.offset[taken].tolist(),
        split.size[taken].tolist(),
        strict=True,
    )
    return [
        ImageRef(f"{i:06}", 0, shards[shard], offset, size)
        for i, (shard, offset, size) in enumerate(places)
    ], len(split)


def folder_refs(folder: Path, most: int) -> tuple[list[ImageRef], int]:
    """Return evenly spaced images below a folder, and how many there are."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: name one with images below it with --images")
    paths = sorted(
        path for path in folder.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file()
    )
    if not paths:
        raise UserError(f"there are no images below {folder}: name another folder with --images")
    return [
        ImageRef(f"{i:06}", 0, str(paths[place]))
        for i, place in enumerate(spaced(len(paths), most))
    ], len(paths)


def is_usable(ref: ImageRef) -> bool:
    """Return whether all contenders decode a JPEG.

    It is not CMYK, not damaged, and not too large for FFCV's own format.
    """
    try:
        data = read_bytes(ref)
        opened = open_image(data)
    except BadImage:
        return False
    small = max(opened.size) <= LARGEST_SIDE
    return (
        opened.format == "JPEG"
        and opened.mode in ("L", "RGB")
        and small
        and decodes(data, *opened.size)
    )


# ---- the forms


def write_forms(choice: Choice, forms: Names[str], folder: Path, console: Console) -> Images:
    """Return the images in `folder`, in the forms that are asked for."""
    check_space(choice, forms, folder)
    count = len(choice.refs)
    with console.status(f"packing {count:,} images"):
        pack = pack_in(folder / PACK, choice.refs, transcode=False)
        transcoded = (
            pack_in(folder / TRANSCODED, choice.refs, transcode=True)
            if TRANSCODED in forms and has_transcoder()
            else None
        )
    with console.status(f"writing {count:,} images for the others"):
        stock = (
            write_stock_beton(pack.train, folder / "stock.beton")
            if STOCK in forms and has_ffcv()
            else None
        )
        files = write_files(pack.train, folder / FILES) if FILES in forms else []
    return Images(choice.source, choice.what, pack, transcoded, stock, files)


def check_space(choice: Choice, forms: Names[str], folder: Path) -> None:
    """Raise UserError where the disk has no room for the forms."""
    copies = sum({PACK: 2, TRANSCODED: 2}.get(form, 1) for form in {PACK, *forms})
    needed = copies * sum(
        ref.size if ref.size >= 0 else Path(ref.path).stat().st_size for ref in choice.refs
    )
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"the temporary files need {decimal(needed)}, {folder.parent} has {decimal(free)} "
            "left: name another folder with TMPDIR"
        )


def pack_in(folder: Path, refs: list[ImageRef], transcode: bool) -> Pack:
    """Return a pack of the images, all as one class.

    Validation is not loaded, but has to hold something.
    """
    workers = min(cores(), 1 + len(refs) // WORTH_A_PROCESS)
    options = PackOptions(folder, workers, transcode=transcode)
    beton = write_beton if has_ffcv() else None
    return open_pack(write_pack(Collection(["images"], refs, refs[:1]), options, QUIET, beton))


def write_files(split: Split, folder: Path) -> list[str]:
    """Write each image as a file, and return their paths."""
    folder.mkdir()
    paths = [folder / f"{image:06}.jpg" for image in range(len(split))]
    for image, path in enumerate(paths):
        path.write_bytes(split.read(image))
    return [str(path) for path in paths]


def write_stock_beton(split: Split, path: Path) -> Path:
    """Write FFCV's own format, its RGBImageField in `jpg` mode with the bytes as they are.

    The field itself would encode anew.
    """
    from ffcv.fields.rgb_image import IMAGE_MODES, RGBImageField
    from ffcv.types import (
        ALLOC_TABLE_TYPE,
        CURRENT_VERSION,
        TYPE_ID_HANDLER,
        FieldDescType,
        HeaderType,
        get_metadata_type,
    )

    sizes = split.size.astype(np.int64)
    page = max(PAGE, 1 << (int(sizes.max()) - 1).bit_length())
    header, description = np.zeros(1, HeaderType), np.zeros(1, FieldDescType)
    records, places = (
        np.zeros(len(split), get_metadata_type([RGBImageField()])),
        np.zeros(len(split), ALLOC_TABLE_TYPE),
    )
    starts = in_pages(header.nbytes + description.nbytes + records.nbytes, sizes, page)
    places["sample_id"], places["ptr"], places["size"] = np.arange(len(split)), starts, sizes
    fields = records["f0"]
    fields["mode"], fields["data_ptr"] = IMAGE_MODES["jpg"], starts
    name = np.frombuffer(b"image".ljust(16, b"\0"), np.uint8)
    kind = next(number for number, handler in TYPE_ID_HANDLER.items() if handler is RGBImageField)
    description[0] = (kind, name, RGBImageField().to_binary()[0])
    header[0] = (CURRENT_VERSION, 1, page, len(split), int(starts[-1] + sizes[-1]))
    with path.open("wb") as file:
        for image, start in enumerate(starts.tolist()):
            data = split.read(image)
            fields["width"][image], fields["height"][image] = open_image(
                data
            ).size  # as stored, not upright
            file.seek(start)
            file.write(data)
        file.write(places.tobytes())
        file.seek(0)
        for part in (header, description, records):
            file.write(part.tobytes())
    return path


def in_pages(start: int, sizes: np.ndarray, page: int) -> np.ndarray:
    """Return where each image begins, (n,) int64.

    They follow one another from `start`, none across the end of a page.
    """
    starts = np.empty(len(sizes), np.int64)
    for i, size in enumerate(sizes.tolist()):
        left_in_page = -start % page
        start += left_in_page if size > left_in_page else 0
        starts[i] = start
        start += size
    return starts
