"""Tables with image bytes as a source: parquet files, and folders that the `datasets` library
saved. Read with pyarrow; images stay in their files until they are packed.
"""

import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from fastlt.decode.images import BadImage
from fastlt.errors import DataError, MissingExtra
from fastlt.packing.collection import ImageRef
from fastlt.packing.labels import check_single
from fastlt.packing.listing import Listing, Reading, by_name, in_range, relabelled
from fastlt.packing.lists import INTEGER, LABEL_COLUMNS

SAVED, SEVERAL = "state.json", "dataset_dict.json"  # as `datasets` writes them
ROWS_AT_ONCE = 16  # of which a worker holds the bytes
OPEN_AT_ONCE = 4  # files, of each worker


def is_saved(folder: Path) -> bool:
    """Return whether `datasets` saved a data set, or several splits of one, in a folder."""
    return (folder / SAVED).is_file() or (folder / SEVERAL).is_file()


def list_saved(folder: Path, reading: Reading) -> Listing:
    """Return the images of a folder of `Dataset.save_to_disk`."""
    if (folder / SEVERAL).is_file():
        splits = sorted(child.name for child in folder.iterdir() if (child / SAVED).is_file())
        raise DataError(
            f"{folder} holds several splits, {', '.join(splits)}: name one, such as "
            f"{folder / (splits or ['train'])[0]}"
        )
    try:
        state = json.loads((folder / SAVED).read_text(encoding="utf-8"))
        files = [folder / entry["filename"] for entry in state["_data_files"]]
        is_whole = state.get("_indices_files") is None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder} is damaged: {SAVED} cannot be read ({error!r})") from error
    if not is_whole:
        raise DataError(
            f"{folder} keeps a selection of rows apart: save it after flatten_indices()"
        )
    return list_tables(folder, files, reading)


def list_tables(where: Path, files: Sequence[Path], reading: Reading) -> Listing:
    """Return the images of parquet or Arrow files of one form.

    The image is a column of bytes, or of structs with `bytes` as `datasets` has them; the label an
    integer, with names where the file has them, or a name. Raises DataError where a column must be
    named or a file cannot be read, MissingExtra without pyarrow.
    """
    pa = arrow()
    schema = schema_of(files[0])
    image = image_column(where, schema, reading.image_key)
    label = label_column(where, schema, reading.label_key)
    keyed: list[tuple[ImageRef, Any]] = []
    for file in files:
        try:
            values = [one for column in columns_of(file, label) for one in column.to_pylist()]
        except (OSError, pa.ArrowException, KeyError) as error:
            raise DataError(f"cannot read {file}: {error}") from error
        for row, value in enumerate(values):
            ref = ImageRef(f"{file.stem}/{row:07}", 0, str(file), row, column=image)
            keyed.append((ref, value))
    if not keyed:
        raise DataError(f"{where} holds no images")
    return labelled(where, keyed, class_names(schema, label), reading)


def labelled(
    where: Path, keyed: list[tuple[ImageRef, Any]], names: list[str], reading: Reading
) -> Listing:
    """Return rows with the values of their labels as a listing."""
    for ref, value in keyed:
        place = f"{ref.path}, row {ref.offset}"
        if isinstance(value, list | dict | float | bool) or value is None or not str(value).strip():
            raise DataError(f"{place}: the label is {value!r}, which is no class")
        check_single(str(value), place)
    texts = [str(value).strip() for _, value in keyed]
    if not all(INTEGER.fullmatch(text) for text in texts):
        return by_name(where, [(ref, text) for (ref, _), text in zip(keyed, texts, strict=True)])
    limit = len(names) or reading.limit
    refs = [
        relabelled(ref, in_range(int(text), f"{ref.path}, row {ref.offset}", limit))
        for (ref, _), text in zip(keyed, texts, strict=True)
    ]
    if not names:
        return Listing(where, refs, {}, numbered=True)
    return by_name(where, [(ref, names[ref.label]) for ref in refs])


# --- columns


def image_column(where: Path, schema: Any, given: str) -> str:
    """Return the column of images: that which the user names, or the only one that holds bytes."""
    pa = arrow()
    columns = [
        column.name
        for column in schema
        if holds_bytes(pa, column.type) and (not given or column.name == given)
    ]
    if len(columns) == 1:
        return columns[0]
    problem = "several columns of bytes" if columns else "no column of bytes"
    problem = f"no column '{given}' of bytes" if given else problem
    raise DataError(
        f"{where} has {problem}: its columns are {', '.join(schema.names)}; name that of the "
        "images with --image-key"
    )


def holds_bytes(pa: Any, kind: Any) -> bool:
    """Return whether a column is of bytes, or of structs with a field `bytes`."""
    if pa.types.is_struct(kind):
        place = kind.get_field_index("bytes")
        return place >= 0 and holds_bytes(pa, kind.field(place).type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def label_column(where: Path, schema: Any, given: str) -> str:
    """Return the column of labels: that which the user names, the only one with names of classes,
    or the likeliest by its name.
    """
    if given in schema.names:
        return given
    named = [name for name in schema.names if class_names(schema, name)]
    likely = [name for name in LABEL_COLUMNS if name in schema.names]
    if not given and (len(named) == 1 or likely):
        return named[0] if len(named) == 1 else likely[0]
    problem = f"no column '{given}'" if given else "no column that is known to hold labels"
    raise DataError(
        f"{where} has {problem}: its columns are {', '.join(schema.names)}; name that of the "
        "labels with --label-key"
    )


def class_names(schema: Any, column: str) -> list[str]:
    """Return the names of classes that `datasets` keeps of a column; none where it has none."""
    try:
        described = json.loads((schema.metadata or {})[b"huggingface"])
        found = described["info"]["features"][column]["names"]
        return [str(name) for name in found] if isinstance(found, list) else []
    except (KeyError, ValueError, TypeError):
        return []


# --- files


def arrow() -> Any:
    """Return pyarrow. MissingExtra where it is not installed."""
    try:
        import pyarrow
    except ImportError as error:
        raise MissingExtra(
            'parquet files and data sets of `datasets` need pyarrow: pip install "fastlt[parquet]"'
        ) from error
    return pyarrow


def schema_of(file: Path) -> Any:
    """Return the columns of a file. DataError where it is none of parquet or Arrow."""
    pa = arrow()
    try:
        if is_parquet(file):
            import pyarrow.parquet as pq

            return pq.read_schema(file)
        with pa.memory_map(str(file)) as mapped:
            return pa.ipc.open_stream(mapped).schema
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {file}: {error}") from error


def columns_of(file: Path, name: str) -> Iterator[Any]:
    """Yield the parts of a column, in bounded memory."""
    pa = arrow()
    if is_parquet(file):
        import pyarrow.parquet as pq

        for batch in pq.ParquetFile(file).iter_batches(columns=[name]):
            yield batch.column(0)
        return
    with pa.memory_map(str(file)) as mapped:
        for batch in pa.ipc.open_stream(mapped):
            yield batch.column(name)


def is_parquet(file: Path) -> bool:
    """Return whether a file is parquet by its name; else it is a stream of Arrow."""
    return file.suffix.lower() == ".parquet"


def row_bytes(path: str, column: str, row: int) -> bytes:
    """Return the encoded image in a row of a file. BadImage where it holds none."""
    pa = arrow()
    try:
        found = opened(path, column).value(row)
    except (OSError, pa.ArrowException, DataError, StopIteration, IndexError) as error:
        raise BadImage(f"its row cannot be read: {error}") from error
    value = found.get("bytes") if isinstance(found, dict) else found
    if not value:
        raise BadImage("its row holds no bytes")
    return bytes(value)


@lru_cache(OPEN_AT_ONCE)
def opened(path: str, column: str) -> "Rows":
    """Return the rows of a column of a file, opened once in each process."""
    return Rows(Path(path), column)


class Rows:
    """A column of a file, read from front to back; going back starts again."""

    def __init__(self, file: Path, column: str) -> None:
        self._file, self._column = file, column
        self._rewind()

    def _rewind(self) -> None:
        self._first, self._part = 0, None
        self._parts = self._read()

    def _read(self) -> Iterator[Any]:
        if not is_parquet(self._file):
            yield from columns_of(self._file, self._column)
            return
        import pyarrow.parquet as pq

        with pq.ParquetFile(self._file, pre_buffer=False) as file:
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=[self._column]):
                yield batch.column(0)

    def value(self, row: int) -> Any:
        """Return the value of a row. StopIteration where the file has fewer."""
        if row < self._first:
            self._rewind()
        while self._part is None or row >= self._first + len(self._part):
            self._first += 0 if self._part is None else len(self._part)
            self._part = next(self._parts)
        return self._part[row - self._first].as_py()
