"""Contact sheets: a page for each class with what was kept and what was dropped, and an index."""

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fastlt.curate.selection import Verdicts
from fastlt.packing.reader import Split
from fastlt.utils.files import whole_folder, write_text
from fastlt.utils.thumbnail import thumbnail

TEMPLATES = Path(__file__).parents[1] / "reports" / "templates"


def write_sheets(
    out: Path, split: Split, verdicts: Verdicts, categories: Sequence[dict[str, Any]], shown: int
) -> None:
    """Write OUT/sheet.html and OUT/sheets/0000.html, ...: every page is one file.

    shown: images kept, and dropped, of each class.
    """
    pages = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    rows = []
    with whole_folder(out / "sheets") as folder:
        for number, category in enumerate(categories):
            images = np.flatnonzero(split.label == number)
            if len(images):
                page = class_page(split, verdicts, images, shown)
                write_text(
                    folder / f"{number:04d}.html",
                    pages.get_template("sheet.html").render(category=category, **page),
                )
            dropped = [
                verdicts.reasons[image] for image in images.tolist() if verdicts.reasons[image]
            ]
            rows.append(
                {
                    "page": f"sheets/{number:04d}.html" if len(images) else "",
                    "name": category["name"],
                    "owners": category["owners"],
                    "kept": len(images) - len(dropped),
                    "dropped": Counter(dropped).most_common(),
                }
            )
        shutil.rmtree(out / "sheets", ignore_errors=True)  # of an earlier call
    write_text(
        out / "sheet.html",
        pages.get_template("sheets.html").render(
            rows=rows, images=len(split), kept=len(verdicts.kept)
        ),
    )


def class_page(split: Split, verdicts: Verdicts, images: np.ndarray, shown: int) -> dict[str, Any]:
    """Return what the page of a class shows.

    Kept images go from the least to the most like the class, as mistakes are at that end; dropped
    ones by reason.
    """
    by_likeness = images[np.argsort(verdicts.likeness[images], kind="stable")].tolist()
    kept = [image for image in by_likeness if not verdicts.reasons[image]]
    dropped = sorted(
        (image for image in by_likeness if verdicts.reasons[image]),
        key=lambda image: verdicts.reasons[image],
    )
    return {
        "kept": [picture(split, verdicts, image) for image in kept[:shown]],
        "num_kept": len(kept),
        "dropped": [picture(split, verdicts, image) for image in dropped[:shown]],
        "num_dropped": len(dropped),
    }


def picture(split: Split, verdicts: Verdicts, image: int) -> dict[str, Any]:
    """Return an image as the page shows it."""
    return {
        "uri": thumbnail(bytes(split.read(image))),
        "key": split.key(image),
        "likeness": float(verdicts.likeness[image]),
        "reason": verdicts.reasons[image],
        "of": verdicts.of[image],
    }
