"""Shards of WebDataset as a source: tar files in which an image and its label share a key."""

import json
import re
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from fastlt.decode.formats import EXTENSIONS
from fastlt.errors import DataError
from fastlt.packing.collection import ImageRef
from fastlt.packing.labels import check_single
from fastlt.packing.listing import Listing, Reading, by_name, in_range

LABEL_KEY = "cls"
LONGEST_LABEL = 2**20  # bytes of what holds one: JSON may hold more
SHOWN = 6  # kinds of members that a message names
NUMBER = re.compile(r"-?[0-9]+")


@dataclass
class Samples:
    """What a shard holds."""

    images: dict[str, tarfile.TarInfo] = field(default_factory=dict)  # by key
    labels: dict[str, str] = field(default_factory=dict)
    endings: Counter[str] = field(default_factory=Counter)  # of all members


def list_shards(where: Path, shards: list[Path], reading: Reading) -> Listing:
    """Return the images of shards; pixels are not read.

    An image is a member with an image's extension, or with the ending `image_key`; its label is
    the text of the member of the same key that ends in cls, or in `label_key`, an integer or a
    name; `json:FIELD` is a field of a member in JSON. Raises DataError where a shard is damaged,
    or an image has no label.
    """
    found = []
    endings: Counter[str] = Counter()
    for shard in shards:
        samples = read_shard(shard, reading)
        endings += samples.endings
        for key, image in samples.images.items():
            found.append((shard, key, image, samples.labels[key]))
    if not found:
        raise DataError(f"{where} holds no images{seen(endings, reading.image_key)}")
    ending = (reading.label_key or LABEL_KEY).partition(":")[0]
    for shard, key, _, text in found:
        check_single(text, f"{shard}, {key}.{ending}")
    refs = [
        ImageRef(key, 0, str(shard), image.offset_data, image.size)
        for shard, key, image, _ in found
    ]
    labels = [text for *_, text in found]
    if not all(NUMBER.fullmatch(text) for text in labels):
        return by_name(where, list(zip(refs, labels, strict=True)))
    numbered = [
        ImageRef(
            ref.key,
            in_range(int(text), f"{ref.path}, {ref.key}.{ending}", reading.limit),
            ref.path,
            ref.offset,
            ref.size,
        )
        for ref, text in zip(refs, labels, strict=True)
    ]
    return Listing(where, numbered, {}, numbered=True)


def read_shard(shard: Path, reading: Reading) -> Samples:
    """Return the images of a shard, in its order, with their labels."""
    samples = Samples()
    label_ending, _, label_field = (reading.label_key or LABEL_KEY).partition(":")
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, slash, name = member.name.rpartition("/")
                stem, _, ending = name.partition(".")
                key = folder + slash + stem
                if not member.isfile():
                    continue
                samples.endings[ending] += 1
                if is_image(ending, reading.image_key):
                    samples.images.setdefault(key, member)
                elif ending.lower() == label_ending.lower():
                    samples.labels[key] = label_of(tar, member, shard, label_field)
            end = tar.offset
        with shard.open("rb") as file:  # tarfile takes a cut-off or damaged header for the end
            file.seek(end)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError("it is cut off or damaged")
    except (OSError, tarfile.TarError) as error:
        raise DataError(
            f"cannot read the shard {shard} ({error}): it must be a whole, uncompressed tar file"
        ) from error
    if unlabelled := next((key for key in samples.images if key not in samples.labels), None):
        raise DataError(
            f"{shard}: the image {unlabelled} has no {unlabelled}.{label_ending} that names its "
            f"class{seen(samples.endings, '', '--label-key')}"
        )
    return samples


def is_image(ending: str, image_key: str) -> bool:
    """Return whether what follows a key is that of an image."""
    if image_key:
        return ending.lower() == image_key.lower().lstrip(".")
    return f".{ending.lower()}" in EXTENSIONS


def seen(endings: Counter[str], image_key: str, option: str = "--image-key") -> str:
    """Return what the members end in, and the option that names one of them."""
    if not endings:
        return ": it is empty"
    most = endings.most_common(SHOWN)
    kinds = ", ".join(f"{times} x {ending or 'nothing'}" for ending, times in most)
    wanted = f" that end in {image_key}" if image_key else ""
    example = (
        "input.jpg"
        if option == "--image-key"
        else "label.cls, txt, or json:FIELD for a field of JSON"
    )
    return f"{wanted}; what follows the keys is {kinds}: name it with {option}, such as {example}"


def label_of(tar: tarfile.TarFile, member: tarfile.TarInfo, shard: Path, name: str) -> str:
    """Return the text of a label, or where `name` is one that field of it, read as JSON."""
    content = tar.extractfile(member)
    data = content.read(LONGEST_LABEL) if content else b""
    try:
        text = data.decode("utf-8").strip()
    except UnicodeDecodeError:
        text = ""
    if name:
        return field_of(text, name, f"{shard}: {member.name}")
    if not text or not text.isprintable():
        raise DataError(
            f"{shard}: {member.name} must hold a class as text, an integer or a name, not "
            f"{data[:16]!r}"
        )
    return text


def field_of(text: str, name: str, place: str) -> str:
    """Return a field of JSON as a label. DataError where it has none."""
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place} is no JSON: {error}") from error
    found = fields.get(name) if isinstance(fields, dict) else None
    if isinstance(found, bool) or not isinstance(found, str | int) or not str(found).strip():
        known = ", ".join(map(str, fields)) if isinstance(fields, dict) else "none"
        raise DataError(
            f"{place} has no class in the field '{name}'; its fields are {known}: name another "
            "with --label-key json:FIELD"
        )
    return str(found).strip()
