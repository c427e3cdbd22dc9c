"""PACK/train.beton and val.beton: the images of a split in FFCV's file format.

Written here and not by FFCV's DatasetWriter, which waits for ever where a worker fails. Layout:
header, description of the one field, a record per image, the images in order, and the table of what
lies where.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from fastlt.data.engines.ffcv.native import import_ffcv
from fastlt.decode.images import BadImage, open_image, orientation
from fastlt.errors import UserError
from fastlt.packing.reader import Split, check_shards, picture
from fastlt.utils.files import whole_file
from fastlt.utils.pool import ordered_map

if TYPE_CHECKING:
    from fastlt.data.engines.ffcv.parts import StoredImage

PIECE = 64  # images that a worker takes at once
PAGE, MAX_PAGE = 8 * 2**20, 2**31  # bytes; FFCV's default, and what its header can say


def write_beton(
    split: Split, path: Path, workers: int, advance: Callable[[int], None] = lambda images: None
) -> None:
    """Sample i of `path` is image i of `split`.

    JPEG bytes are stored as they are, other images as pixels.

    Every JPEG is decoded once by what will decode it in training; one that only Pillow can decode
    is stored as pixels, too. `advance` gets the number of images written since its last call.
    Raises UserError where FFCV is missing, an image cannot be decoded, or a worker process dies.
    """
    parts, _ = import_ffcv()
    check_shards(split)
    with whole_file(path) as temporary, temporary.open("wb") as file, ordered_map(workers) as apply:
        beton = BetonFile(file, len(split), _page_size(split))
        field = parts.ImageField()
        for images in apply(_stored_images, _pieces(split)):
            for image in images:
                field.encode(beton.next_record(), image, beton.malloc)
            advance(len(images))
        beton.finish(parts.FIELD, field)


def _page_size(split: Split) -> int:
    """A power of two that holds the largest image, whichever way it is stored."""
    pixels = 3 * split.height.astype(np.int64) * split.width
    largest = max(PAGE, int(split.size.max(initial=0)), int(pixels.max(initial=0)))
    if largest > MAX_PAGE:
        raise UserError(
            f"an image of {split.folder} is larger than FFCV's file format can hold: pack with "
            "--max-side"
        )
    return 1 << (largest - 1).bit_length()


def _pieces(split: Split) -> Iterator[Split]:
    columns = ("shard", "offset", "size", "label", "height", "width")
    for start in range(0, len(split), PIECE):
        yield replace(
            split,
            _maps={},
            **{name: getattr(split, name)[start : start + PIECE] for name in columns},
        )


def _stored_images(piece: Split) -> "list[StoredImage]":
    return [_stored_image(piece, i) for i in range(len(piece))]


def _stored_image(split: Split, image: int) -> "StoredImage":
    parts, jit = import_ffcv()
    data = np.frombuffer(split.read(image), np.uint8)
    if header := _jpeg_header(split, image):
        height, width, turn = header
        if jit.decode_jpeg(data, np.empty((height, width, 3), np.uint8)) == jit.SOUND:
            return parts.StoredImage(jit.JPEG, turn, height, width, data)
    pixels = np.asarray(picture(split, image))
    return parts.StoredImage(jit.RAW, 1, *pixels.shape[:2], pixels.reshape(-1))


def _jpeg_header(split: Split, image: int) -> tuple[int, int, int] | None:
    """(height, width, EXIF orientation) of a grey or colour JPEG; None for what must be stored as
    pixels.
    """
    try:
        opened = open_image(split.read(image), max_pixels=sys.maxsize)
    except BadImage:
        return None  # `picture` says what is wrong
    if opened.format != "JPEG" or opened.mode not in ("L", "RGB"):
        return None
    return opened.height, opened.width, orientation(opened)


class BetonFile:
    """Places data behind the room for the records.

    Nothing straddles a page: FFCV may read page by page.
    """

    def __init__(self, file: BinaryIO, count: int, page_size: int) -> None:
        from ffcv.types import ALLOC_TABLE_TYPE, FieldDescType, HeaderType, get_metadata_type

        parts, _ = import_ffcv()
        self.file, self.page_size = file, page_size
        self.header = np.zeros(1, HeaderType)
        self.description = np.zeros(1, FieldDescType)
        self.records = np.zeros(count, get_metadata_type([parts.ImageField()]))
        self.places = np.zeros(count, ALLOC_TABLE_TYPE)
        self.written = 0
        self.position = self.header.nbytes + self.description.nbytes + self.records.nbytes
        self.buffer: np.ndarray | None = None
        file.seek(self.position)

    def next_record(self) -> Any:
        """The record of the next image, to be filled; the one before is done."""
        self._flush()
        self.written += 1
        return self.records["f0"][self.written - 1 : self.written]

    def malloc(self, size: int) -> tuple[int, np.ndarray]:
        """(position in the file, buffer to fill), as FFCV's fields ask for it."""
        left_in_page = -self.position % self.page_size
        if size > left_in_page:
            self.position += left_in_page
            self.file.seek(self.position)
        self.places[self.written - 1] = (self.written - 1, self.position, size)
        self.buffer = np.empty(size, np.uint8)
        return self.position, self.buffer

    def _flush(self) -> None:
        if self.buffer is not None:
            self.file.write(self.buffer.data)
            self.position += self.buffer.size
            self.buffer = None

    def finish(self, name: str, field: Any) -> None:
        """Write the tables and the header, which complete the file."""
        from ffcv.types import CURRENT_VERSION

        self._flush()
        self.file.write(self.places.tobytes())
        self.header[0] = (CURRENT_VERSION, 1, self.page_size, len(self.records), self.position)
        custom = 255  # the type of a field that FFCV does not bring itself
        letters = np.zeros(16, np.uint8)
        letters[: len(name)] = np.frombuffer(name.encode(), np.uint8)
        self.description[0] = (custom, letters, field.to_binary()[0])
        self.file.seek(0)
        for part in (self.header, self.description, self.records):
            self.file.write(part.tobytes())


def check_beton(path: Path, split: Split) -> None:
    """Raise UserError where the file is cut short or does not hold the images of this split."""
    parts, jit = import_ffcv()
    from ffcv.reader import Reader

    try:
        reader = Reader(str(path), {parts.FIELD: parts.ImageField})
        images = reader.metadata["f0"]
        end = int((images["data_ptr"] + images["size"]).max(initial=0))
        pixels = 3 * images["height"].astype(np.int64) * images["width"]
        whole = (
            len(images) == reader.num_samples == len(reader.alloc_table)
            and end <= path.stat().st_size
        )
        whole &= bool((pixels == images["size"])[images["mode"] == jit.RAW].all())
    except (OSError, ValueError, IndexError, KeyError, AssertionError, MemoryError) as error:
        raise UserError(
            f"{path} is damaged: FFCV cannot read it ({error}); copy it again or pack again"
        ) from error
    if not whole:
        raise UserError(
            f"{path} is damaged: it does not hold what its header says; copy it again or pack again"
        )
    quarter = images["turn"] >= 5
    height, width = (
        np.where(quarter, images[a], images[b])
        for a, b in (("width", "height"), ("height", "width"))
    )
    if len(images) != len(split) or (height != split.height).any() or (width != split.width).any():
        raise UserError(f"{path} does not hold the images of {split.folder}: pack again")


def beton_writer() -> Callable[[Split, Path, int, Callable[[int], None]], None]:
    """Return the function that writes FFCV files.

    Raises UserError now, and not after an hour of packing, where FFCV is missing.
    """
    import_ffcv()
    return write_beton
