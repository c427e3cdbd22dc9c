"""What a source hands to `fastlt pack`: classes, pairs, and where each image lies.

Free of torch, as packing workers import it.
"""

from dataclasses import dataclass, field
from typing import Any

from fastlt.decode.deep import Scale


@dataclass(frozen=True, slots=True)
class ImageRef:
    """Where the encoded bytes of one image lie."""

    key: str  # readable: "class/stem"
    label: int  # class id in the collection
    path: str
    offset: int = 0  # bytes
    size: int = -1  # bytes; -1: to the end of the file
    part: int = -1  # index within a CIFAR strip or archive; -1: not one of those
    column: str = ""  # of a table whose row `offset` holds the image


@dataclass
class Collection:
    """Targets have ids 0..T-1, auxiliaries T..C-1; `val` and `test` hold targets only."""

    target_names: list[str]
    train: list[ImageRef]
    val: list[ImageRef]
    auxiliary_names: list[str] = field(default_factory=list)
    pairs: list[tuple[int, int]] = field(default_factory=list)  # (target id, auxiliary id)
    # auxiliary name -> where its images came from
    origins: dict[str, str] = field(default_factory=dict)
    # the summary card of `fastlt curate`, if it made the auxiliaries
    curation: dict[str, Any] = field(default_factory=dict)
    # training images of targets that a task leaves out
    unused: list[ImageRef] = field(default_factory=list)
    display_names: dict[str, str] = field(default_factory=dict)  # in texts, by class
    descriptions: dict[str, str] = field(default_factory=dict)  # by class
    warnings: list[str] = field(default_factory=list)
    test: list[ImageRef] = field(default_factory=list)
    # of values of more than eight bits, where the images come from a pack that scaled them
    scale: Scale = field(default_factory=dict)
