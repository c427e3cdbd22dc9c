"""A page of images with what was predicted: one file that needs nothing else."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from fastlt.decode.deep import Scale
from fastlt.decode.formats import kind_of
from fastlt.errors import UserError
from fastlt.evaluation.predict import Prediction
from fastlt.evaluation.user_images import opened
from fastlt.utils.files import write_text
from fastlt.utils.thumbnail import thumbnail, thumbnail_of

TEMPLATES = Path(__file__).parents[1] / "reports" / "templates"
MOST = 2000  # images that are shown: a page of 10 MB


@contextmanager
def open_sheet(path: Path, scale: Scale) -> Iterator[Callable[[Prediction], None]]:
    """Yield what adds an image to the page, which is written if the block ends well."""
    shown: list[dict[str, Any]] = []
    total = 0

    def add(found: Prediction) -> None:
        nonlocal total
        total += 1
        if len(shown) < MOST and found.path is not None:
            shown.append(card(found, found.path, scale))

    yield add
    pages = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    classes = sorted({one["prediction"] for one in shown})
    text = pages.get_template("predictions.html").render(
        images=shown, total=total, classes=classes, unsure=sum(one["unsure"] for one in shown)
    )
    try:
        write_text(path, text)
    except OSError as error:
        raise UserError(f"cannot write to {path} ({error.strerror}): name another file") from error


def shown_small(path: Path, scale: Scale) -> str:
    """Return a data URI of an image that could be read a moment ago."""
    data = path.read_bytes()
    # other kinds need not be such as a browser shows
    return thumbnail(data) if kind_of(data) == "JPEG" else thumbnail_of(opened(path, scale))


def card(found: Prediction, path: Path, scale: Scale) -> dict[str, Any]:
    """Return what the page shows of an image."""
    others = zip(found.names[1:], found.probabilities[1:], strict=True)
    return {
        "uri": shown_small(path, scale),
        "name": path.name,
        "place": str(path),
        "prediction": found.name,
        "class": found.names[0],
        "percent": f"{100 * found.probabilities[0]:.1f}",
        "others": [f"{name} {100 * value:.1f} %" for name, value in others],
        "unsure": found.is_unsure,
    }
