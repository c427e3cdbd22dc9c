"""Which values of images of more than eight bits become black and white: looked up in the data
themselves, before they are packed.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastlt.decode.deep import KINDS, Range, Scale, deep_values, is_deep
from fastlt.decode.formats import EXTENSIONS, JPEG_EXTENSIONS, kind_of
from fastlt.decode.images import FAILURES, BadImage, open_image
from fastlt.errors import UserError
from fastlt.packing.collection import ImageRef
from fastlt.packing.encode import head_bytes, read_bytes
from fastlt.utils.pool import OrderedMap

AUTO, FULL = "auto", "full"
MARGIN = 0.1  # percent of the values that `auto` lets become black, and as many white
# above this share of what a kind can hold, the values are taken to fill it
FILLS = 0.5
MEASURED = 256  # images of more than eight bits whose values are looked at
VALUES = 10_000  # of each
CONTAINED = 1000  # images of shards that are looked at: their names do not say what they are
BATCH = 64  # images that travel to a worker at a time


@dataclass(frozen=True)
class Values:
    """Some of the values of an image."""

    kind: str
    sample: np.ndarray  # (n,) float64


def check_range(option: str) -> str | Range:
    """Return what `--range` says: auto, full, or a range. Raises UserError for anything else."""
    if option in (AUTO, FULL):
        return option
    try:
        low, high = (float(part) for part in option.split(","))
    except ValueError:
        low = high = 0.0
    if not -np.inf < low < high < np.inf:
        raise UserError(
            f"--range is '{option}': it must be auto, full, or two numbers LOW,HIGH of which the "
            "first becomes black and the second white, such as 0,4095"
        )
    return Range(low, high)


def named_scale(option: str) -> Scale:
    """Return the same range, `full` or LOW,HIGH, for every kind of value. UserError for others."""
    chosen = check_range(option)
    if option == AUTO:
        raise UserError("--range auto is for packing: name full or LOW,HIGH")
    return {
        kind: chosen if isinstance(chosen, Range) else Range(0, most)
        for kind, most in KINDS.items()
    }


def find_scale(
    option: str, train: Sequence[ImageRef], others: Sequence[ImageRef], apply: OrderedMap
) -> tuple[Scale, list[str]]:
    """Return the range of each kind of value of more than eight bits that occurs, and a sentence
    about each.

    The ranges are those of the training images, or where none of these is deep of the others.
    """
    chosen = check_range(option)
    if isinstance(chosen, Range):
        return named_scale(option), []
    deep = _deep_refs(train, apply) or _deep_refs(others, apply)
    by_kind: dict[str, list[np.ndarray]] = defaultdict(list)
    for values in _measured(_spread(deep, MEASURED), apply):
        by_kind[values.kind].append(values.sample)
    scale = {
        kind: _range_of(kind, np.concatenate(found), chosen) for kind, found in by_kind.items()
    }
    return scale, [_sentence(kind, scale[kind], len(by_kind[kind]), chosen) for kind in scale]


def _range_of(kind: str, values: np.ndarray, option: str) -> Range:
    full = Range(0, KINDS[kind])
    if option == FULL or not values.size:
        return full
    low, high = np.percentile(values, [MARGIN, 100 - MARGIN]).tolist()
    if low >= 0 and FILLS * full.high <= high <= full.high:
        return full
    return Range(low, high if high > low else low + 1)


def _sentence(kind: str, chosen: Range, images: int, option: str) -> str:
    how = f"percentiles {MARGIN:g} and {100 - MARGIN:g} of {images} images"
    if option == FULL:
        how = "the whole range"
    elif chosen == Range(0, KINDS[kind]):
        how = f"the whole range, which {images} images fill"
    return (
        f"{kind} images: values from {chosen} become black to white ({how}); --range LOW,HIGH sets "
        "others"
    )


def _deep_refs(refs: Sequence[ImageRef], apply: OrderedMap) -> list[ImageRef]:
    """Those of more than eight bits; of what lies in shards, only some are looked at."""
    suffixes = [Path(ref.path).suffix.lower() for ref in refs]
    named = [
        ref
        for ref, suffix in zip(refs, suffixes, strict=True)
        if suffix in EXTENSIONS and suffix not in JPEG_EXTENSIONS and ref.part < 0
    ]
    unnamed = [
        ref
        for ref, suffix in zip(refs, suffixes, strict=True)
        if suffix not in EXTENSIONS and ref.part < 0
    ]
    looked_at = named + _spread(unnamed, CONTAINED)
    verdicts = (each for part in apply(_are_deep, _batches(looked_at)) for each in part)
    return [ref for ref, deep in zip(looked_at, verdicts, strict=True) if deep]


def _are_deep(refs: list[ImageRef]) -> list[bool]:
    return [_ref_is_deep(ref) for ref in refs]


def _ref_is_deep(ref: ImageRef) -> bool:
    try:
        head = head_bytes(ref)
        kind = kind_of(head)
        if kind == "PNG":
            return head[24] == 16  # the bit depth in IHDR, which always comes first
        # of the others, these alone have more than eight bits
        return kind in ("TIFF", "PPM") and is_deep(open_image(read_bytes(ref)))
    except (BadImage, IndexError):  # packing tells why
        return False


def _measured(refs: list[ImageRef], apply: OrderedMap) -> Iterator[Values]:
    for part in apply(_values_of, _batches(refs)):
        yield from part


def _values_of(refs: list[ImageRef]) -> list[Values]:
    return [values for ref in refs if (values := _sampled(ref)) is not None]


def _sampled(ref: ImageRef) -> Values | None:
    try:
        data = read_bytes(ref)
        found = deep_values(open_image(data), data)
    except (BadImage, *FAILURES):
        return None
    values = found.values.reshape(-1)
    values = values[:: max(1, values.size // VALUES)].astype(np.float64)
    return Values(found.kind, values[np.isfinite(values)])


def _spread(refs: list[ImageRef], count: int) -> list[ImageRef]:
    """`count` of them, evenly spread."""
    if len(refs) <= count:
        return refs
    return [refs[i] for i in np.linspace(0, len(refs) - 1, count).astype(int)]


def _batches(refs: list[ImageRef]) -> Iterator[list[ImageRef]]:
    return (refs[start : start + BATCH] for start in range(0, len(refs), BATCH))
