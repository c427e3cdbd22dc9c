"""`fastlt curate filter`: the selection of retrieved images, and the auxiliary set.

The latter is what `fastlt pack` takes.

CURATED/features/       hashes and features of each shard, which are not computed again
CURATED/filtered.jsonl  a row an image: whether it is kept, why not, how like its class it is
CURATED/auxiliary/      shards of what is kept, with key.cls and key.json, and card.json, a summary
CURATED/pairs.csv       target,auxiliary of the classes that are left
CURATED/sheet.html      the contact sheets: kept and dropped images of each class
"""

import csv
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastlt.classes import ClassSpace
from fastlt.curate.candidates import licence_accepted
from fastlt.curate.image_index import ImageIndex, build_index
from fastlt.curate.retrieve import PROPOSED_BY, tried
from fastlt.curate.selection import SAME_FEATURES, Verdicts, give_up_small_classes, select_images
from fastlt.curate.settings import CurateConfig, FilterConfig, keep_settings
from fastlt.curate.sheet import write_sheets
from fastlt.curate.table import read_table, write_table
from fastlt.decode.formats import FORMATS
from fastlt.errors import UserError
from fastlt.evaluation.features import open_backbone
from fastlt.packing.reader import COLUMNS, Pack, Split, open_pack
from fastlt.packing.shards import ShardWriter, member_keys
from fastlt.utils.files import whole_file, whole_folder, write_text
from fastlt.utils.lock import alone_in
from fastlt.utils.names import normalised

SHARD_BYTES = 10**9
SUSPICIOUS = 0.2  # share of the images that leak by their features alone
RETRIEVED_BY = "fastlt curate retrieve"


def run_filter(place: str, out: Path, config: CurateConfig, console: Console) -> None:
    """Select images, and write the auxiliary set. place: the pack of the targets.

    Raises UserError where nothing was retrieved, or nothing is kept.
    """
    with alone_in(out, "another step"):
        filter_images(place, out, config, console)


def filter_images(place: str, out: Path, config: CurateConfig, console: Console) -> None:
    """Select images within the locked folder of the curation."""
    settings = config.filter
    categories = read_table(out / "categories.jsonl", PROPOSED_BY)
    rows = retrieved_rows(out, categories)
    pack = open_pack(place)
    owners = owner_ids(pack.space, categories, place)
    splits = splits_of(pack, settings)
    backbone = open_backbone(settings)
    keep_settings(out, config)
    if not settings.test:
        console.print(
            "[yellow]note:[/] images are held against those of the pack alone; name a pack of test "
            "images with filter.test",
            highlight=False,
            soft_wrap=True,
        )
    known = {
        name: build_index(out / "features", split, backbone, settings, f"{name} images", console)
        for name, split in splits.items()
    }
    index = build_index(
        out / "features",
        retrieved_split(out, rows, categories),
        backbone,
        settings,
        "retrieved images",
        console,
    )
    refused = [
        image
        for image, row in enumerate(rows)
        if not licence_accepted(row["licence"], config.retrieve.licences)
    ]
    verdicts = select_images(index, known, owners, settings, backbone.device, refused)
    give_up_small_classes(verdicts, index.split.label, settings.min_images)
    write_table(
        out / "filtered.jsonl",
        map(verdict_row, rows, verdicts.reasons, verdicts.of, verdicts.likeness.tolist()),
    )
    show(verdicts, categories, index.split.label, console)
    report_suspicious(verdicts, console)
    if settings.sheet:
        write_sheets(out, index.split, verdicts, categories, settings.sheet)
        console.print(f"contact sheets: {out / 'sheet.html'}", highlight=False, soft_wrap=True)
    if not len(verdicts.kept):
        remove_set(out)  # an earlier one is no longer what filtered.jsonl says
        raise UserError(
            f"no image is left: see {out / 'filtered.jsonl'}, filter.gamma1, filter.gamma2 and "
            "filter.min_images"
        )
    write_auxiliary(out, rows, index, verdicts, categories, settings)
    console.print(
        f"now: fastlt pack --target {place} --auxiliary {out / 'auxiliary'} --pairs "
        f"{out / 'pairs.csv'} --out PACK",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


# --- what there is


def retrieved_rows(out: Path, categories: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows of retrieved images, in the order they were fetched.

    Those of categories that are no longer proposed are left out.
    """
    names = {normalised(category["name"]) for category in categories}
    rows = [
        row for row in tried(out / "raw") if row["fetched"] and normalised(row["category"]) in names
    ]
    if not rows:
        raise UserError(f"{out} has no image of any category: fetch some with `{RETRIEVED_BY}`")
    return rows


def retrieved_split(
    out: Path, rows: Sequence[dict[str, Any]], categories: Sequence[dict[str, Any]]
) -> Split:
    """Return the retrieved images as a split; a label is the number of a category."""
    numbers = {normalised(category["name"]): number for number, category in enumerate(categories)}
    shards = sorted({row["shard"] for row in rows})
    places = {shard: number for number, shard in enumerate(shards)}
    values = {
        "shard": [places[row["shard"]] for row in rows],
        "label": [numbers[normalised(row["category"])] for row in rows],
        **{name: [row[name] for row in rows] for name in ("offset", "size", "height", "width")},
    }
    columns: dict[str, Any] = {
        name: np.array(values[name], dtype) for name, dtype in COLUMNS.items()
    }
    return Split("raw", out / "raw", tuple(shards), **columns)


def splits_of(pack: Pack, settings: FilterConfig) -> dict[str, Split]:
    """Return the images that no auxiliary may show, by what they are."""
    found = {"training": of_targets(pack.train, pack.space), "validation": pack.val}
    if settings.test:
        test = open_pack(settings.test)
        found |= {"test": test.val, "test pack's training": of_targets(test.train, test.space)}
    return {name: split for name, split in found.items() if len(split)}


def of_targets(split: Split, space: ClassSpace) -> Split:
    """Return the images of a split that belong to targets."""
    return split.subset(np.flatnonzero(split.label < space.num_targets))


def owner_ids(
    space: ClassSpace, categories: Sequence[dict[str, Any]], place: str
) -> list[list[int]]:
    """Return the target ids that own each category."""
    ids = {name: target for target, name in enumerate(space.target_names)}
    for category in categories:
        if unknown := [owner for owner in category["owners"] if owner not in ids]:
            raise UserError(
                f"'{category['name']}' was proposed for '{unknown[0]}', which is no target of "
                f"{place}"
            )
    return [[ids[owner] for owner in category["owners"]] for category in categories]


# --- what is written


def verdict_row(row: dict[str, Any], reason: str, of: str, likeness: float) -> dict[str, Any]:
    """Return a row of the table of verdicts."""
    about = {
        name: row[name]
        for name in ("category", "place", "shard", "key", "sha256", "licence", "author", "source")
    }
    return {**about, "kept": not reason, "reason": reason, "of": of, "likeness": round(likeness, 4)}


def write_auxiliary(
    out: Path,
    rows: Sequence[dict[str, Any]],
    index: ImageIndex,
    verdicts: Verdicts,
    categories: Sequence[dict[str, Any]],
    settings: FilterConfig,
) -> None:
    """Write the auxiliary set: shards of the kept images with their sources, and its card."""
    kept = verdicts.kept.tolist()
    left = sorted({int(index.split.label[image]) for image in kept})
    names = [categories[int(index.split.label[image])]["name"] for image in kept]
    keys = member_keys(
        f"{name}/{rows[image]['key']}" for name, image in zip(names, kept, strict=True)
    )
    with whole_folder(out / "auxiliary") as folder:
        with ShardWriter(folder, SHARD_BYTES, "auxiliary") as shards:
            for image, name, key in zip(kept, names, keys, strict=True):
                about = json.dumps(
                    {**rows[image], "likeness": round(float(verdicts.likeness[image]), 4)},
                    ensure_ascii=False,
                )
                shards.add(
                    key,
                    extension_of(index.split, image),
                    bytes(index.split.read(image)),
                    name,
                    about.encode(),
                )
        card = summary(
            rows, verdicts, [categories[number] for number in left], settings, refusals(out)
        )
        write_text(folder / "card.json", json.dumps(card, ensure_ascii=False, indent=1) + "\n")
        remove_set(out)  # of an earlier call
    with (
        whole_file(out / "pairs.csv") as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        pairs = csv.writer(file)
        pairs.writerow(["target", "auxiliary"])
        pairs.writerows(
            [owner, categories[number]["name"]]
            for number in left
            for owner in categories[number]["owners"]
        )


def refusals(out: Path) -> Counter[str]:
    """Return how many candidates were not retrieved, by reason."""
    last = {(row["category"], row["place"]): row for row in tried(out / "raw")}
    return Counter(row["reason"] for row in last.values() if not row["fetched"])


def extension_of(split: Split, image: int) -> str:
    """Return the extension that an image has in its shard."""
    extension = Path(split.key(image)).suffix
    return extension if extension in FORMATS.values() else ".jpg"


def summary(
    rows: Sequence[dict[str, Any]],
    verdicts: Verdicts,
    left: Sequence[dict[str, Any]],
    settings: FilterConfig,
    not_fetched: Counter[str],
) -> dict[str, Any]:
    """Return the card: what the auxiliary set is, where it came from, and what was dropped."""
    kept = [rows[image] for image in verdicts.kept.tolist()]
    dropped = Counter(reason for reason in verdicts.reasons if reason)
    drawn = any(category.get("provider") == "random" for category in left)
    return {
        "kind": "random control" if drawn else "neighbours",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "classes": len(left),
        "pairs": sum(len(category["owners"]) for category in left),
        "owners": len({owner for category in left for owner in category["owners"]}),
        "images": len(kept),
        "licences": dict(Counter(row["licence"] or "unknown" for row in kept).most_common()),
        "sources": dict(Counter(row["source"] for row in kept).most_common()),
        "dropped": dict(dropped.most_common()),
        "not_retrieved": dict(not_fetched.most_common()),
        "backbone": settings.weights or settings.backbone,
        "gamma1": settings.gamma1,
        "gamma2": settings.gamma2,
        "origins": {
            category["name"]: f"{category.get('provider', '')} {category.get('key', '')}".strip()
            for category in left
        },
    }


def report_suspicious(verdicts: Verdicts, console: Console) -> None:
    """Warn where so many images are leaks that the features cannot tell classes apart."""
    by_features = sum(SAME_FEATURES in reason for reason in verdicts.reasons)
    if by_features > SUSPICIOUS * len(verdicts.reasons):
        console.print(
            f"[yellow]note:[/] {by_features:,} images are as good as the same as a target's by "
            "their features: are those of this "
            "backbone good enough? filter.gamma2 says how near that is",
            highlight=False,
            soft_wrap=True,
        )


def remove_set(out: Path) -> None:
    """Remove the auxiliary set, which is made anew from what was retrieved."""
    shutil.rmtree(out / "auxiliary", ignore_errors=True)
    (out / "pairs.csv").unlink(missing_ok=True)


def show(
    verdicts: Verdicts, categories: Sequence[dict[str, Any]], labels: np.ndarray, console: Console
) -> None:
    """Print what was kept and dropped, by category and by reason."""
    table = Table("images", "", title=f"{len(labels):,} retrieved images", title_justify="left")
    table.add_row(f"{len(verdicts.kept):,}", "kept", style="bold")
    for reason, times in Counter(reason for reason in verdicts.reasons if reason).most_common():
        table.add_row(f"{times:,}", escape(reason))
    console.print(table)
    counts = np.bincount(labels[verdicts.kept], minlength=len(categories))
    none = [
        category["name"] for category, count in zip(categories, counts, strict=True) if not count
    ]
    median = int(np.median(counts[counts > 0])) if (counts > 0).any() else 0
    lost = f"; given up: {', '.join(none[:5])}{', ...' if len(none) > 5 else ''}" if none else ""
    console.print(
        f"{int((counts > 0).sum()):,} of {len(categories):,} classes are left, with {median:,} "
        f"images each (median){lost}",
        highlight=False,
        markup=False,
    )
