"""What `fastlt pack` prints at its end."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastlt.classes import ClassSpace
from fastlt.packing.collection import Collection
from fastlt.packing.packed import WORDS, Packed, described, entries

SHOWN = 3  # examples, on screen; the manifest holds all


def print_summary(
    collection: Collection,
    space: ClassSpace,
    splits: Mapping[str, Packed],
    title: str,
    seconds: float,
    console: Console,
) -> None:
    """Print how many images of which classes a pack holds, and notes about those of its source."""
    images = sum(len(packed.rows) for packed in splits.values())
    files = [entry for packed in splits.values() for entry in packed.files.values()]
    megabytes = sum(entry["size"] for entry in files) / 1e6
    table = Table(title=escape(title), show_header=False, title_justify="left")
    for name, packed in splits.items():
        table.add_row(f"{WORDS[name]} images", f"{len(packed.rows):,}")
    table.add_row("target classes", f"{space.num_targets:,}: " + _groups(space))
    pairs = f"{space.num_auxiliaries:,} in {len(space.pairs):,} pairs"
    table.add_row("auxiliary classes", pairs if space.num_auxiliaries else "none")
    table.add_row("skipped images", f"{len(entries(splits, 'skipped')):,}")
    for one, other in combinations(splits, 2):
        both = [leak for leak in entries(splits, "leaks") if one in leak and other in leak]
        left_out = " (left out of train)" if any(leak["dropped"] for leak in both) else ""
        table.add_row(f"in {one} and {other}", f"{len(both):,}{left_out}")
    for word, kind in (("twice in a class", "duplicates"), ("under several classes", "conflicts")):
        if found := entries(splits, kind):
            table.add_row(word, f"{len(found):,}")
    table.add_row("shards", f"{len(files)}, {megabytes:,.1f} MB")
    table.add_row("time", f"{seconds:,.1f} s, {images / seconds:,.0f} images/s")
    console.print(table)
    # those that were written first
    splits = dict(sorted(splits.items(), key=lambda item: item[0] == "train"))
    for note in (*collection.warnings, *_notes(space, splits)):
        # a file name need not be UTF-8, a terminal wants it
        text = note.encode("utf-8", "replace").decode()
        console.print(f"[yellow]note:[/] {escape(text)}", highlight=False, soft_wrap=True)


def _groups(space: ClassSpace) -> str:
    return ", ".join(f"{len(classes) or 'no'} {group}" for group, classes in space.groups().items())


def _notes(space: ClassSpace, splits: Mapping[str, Packed]) -> Iterator[str]:
    yield from _of_classes(space)
    if several := entries(splits, "first_frames"):
        yield (
            f"{len(several)} images have several pages or frames, of which the first was taken: "
            f"{_some([entry['path'] for entry in several])}"
        )
    if skipped := entries(splits, "skipped"):
        yield (
            f"{len(skipped)} images were skipped (all are in manifest.json): "
            f"{_some([described(entry) for entry in skipped], '; ')}"
        )
    yield from _leaked(entries(splits, "leaks"))
    yield from _repeated(entries(splits, "duplicates"), entries(splits, "conflicts"))


def _of_classes(space: ClassSpace) -> Iterator[str]:
    if unseen := [
        name for name, count in zip(space.target_names, space.val_counts, strict=True) if not count
    ]:
        yield f"{len(unseen)} target classes have no validation images: {_some(unseen)}"
    paired = {auxiliary for _, auxiliary in space.pairs}
    if alone := [
        name for i, name in enumerate(space.auxiliary_names, space.num_targets) if i not in paired
    ]:
        yield f"{len(alone)} auxiliary classes neighbour no target: {_some(alone)}"


def _leaked(leaks: Sequence[dict[str, Any]]) -> Iterator[str]:
    for one, other in (("train", "val"), ("train", "test"), ("test", "val")):
        both = [e for e in leaks if one in e and other in e and not e["dropped"]]
        pairs = _some([f"{leak[one]} = {leak[other]}" for leak in both])
        advice = " (--drop-leaks leaves them out)" if one == "train" else ""
        if both:
            yield (
                f"{len(both)} {WORDS[one]} images are {WORDS[other]} images too{advice}: {pairs}"
            )


def _repeated(
    duplicates: Sequence[dict[str, Any]], conflicts: Sequence[dict[str, Any]]
) -> Iterator[str]:
    if duplicates:
        pairs = _some([f"{entry['key']} = {entry['first']}" for entry in duplicates])
        yield f"{len(duplicates)} images stand twice in their class: {pairs}"
    for are_dropped, advice in (
        (True, " and were left out"),
        (False, " (--drop-conflicts leaves those of training out)"),
    ):
        found = [entry for entry in conflicts if entry["dropped"] == are_dropped]
        named = _some([f"{e['path']} ({' and '.join(e['classes'])})" for e in found])
        if found:
            yield f"{len(found)} images stand under several classes{advice}: {named}"


def _some(items: Sequence[str], separator: str = ", ") -> str:
    return separator.join(items[:SHOWN]) + (f"{separator}..." if len(items) > SHOWN else "")
