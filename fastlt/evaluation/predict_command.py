"""From images on the command line to predictions in a terminal, a table, lines of JSON, a page."""

import csv
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from rich.console import Console

from fastlt.decode.deep import Scale
from fastlt.decode.formats import is_image_file
from fastlt.errors import DataError, UserError
from fastlt.evaluation.predict import Answers, Model, Prediction, Unreadable
from fastlt.evaluation.prediction_sheet import open_sheet
from fastlt.evaluation.user_images import images_below
from fastlt.packing.tables import read_rows
from fastlt.utils.files import whole_file
from fastlt.utils.progress import rated_progress

STDIN = "-"
Write = Callable[[Prediction], None]


class PredictOptions(NamedTuple):
    """The options of the command."""

    answers: Answers
    batch: int
    csv: Path | None
    jsonl: Path | None
    sheet: Path | None


def predict_images(model: Model, named_places: list[str], options: PredictOptions) -> None:
    """Predict the images of all places and write what was found, in bounded memory.

    Images that cannot be read are listed on standard error. Raises UserError where a place does not
    exist or no image could be read.
    """
    total, images = images_of(named_places)
    done, unreadable = 0, 0
    errors = Console(stderr=True)
    with ExitStack() as stack:
        writers = [stack.enter_context(writer) for writer in opened_writers(options, model.scale)]
        bar = stack.enter_context(rated_progress(errors, "images/s", transient=True))
        task = bar.add_task("predicting", total=total)
        for found in model.stream(images, options.answers, options.batch):
            bar.advance(task)
            if isinstance(found, Unreadable):
                unreadable += 1
                bar.console.print(
                    f"left out: {found.reason}", markup=False, highlight=False, soft_wrap=True
                )
                continue
            done += 1
            for write in writers:
                write(found)
        if not done:
            raise UserError(
                f"no image could be read of {unreadable:,}"
                if unreadable
                else "there are no images in what was named"
            )
    left_out = f"; {unreadable:,} could not be read" if unreadable else ""
    places = [str(place) for place in (options.csv, options.jsonl, options.sheet) if place]
    named = [place for place in places if place != STDIN]
    where = f" -> {', '.join(named)}" if named else ""
    errors.print(f"{done:,} images{left_out}{where}", highlight=False, soft_wrap=True)


# --- images


def images_of(places: list[str]) -> tuple[int | None, Iterable[Path]]:
    """Return how many images the places name, None where that is not known yet, and the images.

    places: files, folders, patterns, and - for paths on standard input. Raises DataError for a
    place that names nothing.
    """
    if STDIN in places:
        return None, (path for place in places for path in of_place(place))
    found = [path for place in places for path in of_place(place)]
    return len(found), found


def of_place(place: str) -> Iterator[Path]:
    """Yield the images that a place names."""
    path = Path(place)
    if place == STDIN:
        lines = (line.rstrip("\r\n") for line in sys.stdin)
        yield from (Path(line) for line in lines if line)
    elif path.is_dir():
        yield from images_below(path)
    elif path.exists():
        yield path
    elif any(letter in place for letter in "*?["):
        pattern = str(path.relative_to(path.anchor))
        images = sorted(p for p in Path(path.anchor).glob(pattern) if is_image_file(p))
        if not images:
            raise DataError(f"no image matches {place}")
        yield from images
    else:
        raise DataError(f"there is no image or folder {place}")


# --- priors


def read_prior(path: Path) -> dict[str, float]:
    """Return the shares by class of a CSV with the columns class and share, which may be counts.

    Raises UserError that names the line where it is none.
    """
    rows = read_rows(path, ("class", "share"))
    shares = {row["class"]: number_of(row["share"], path, line) for line, row in rows}
    if len(shares) < len(rows):
        raise UserError(f"{path} names a class twice")
    if not sum(shares.values()) > 0:
        raise UserError(f"{path} has no share above 0")
    return shares


def number_of(text: str, path: Path, line: int) -> float:
    """Return a share of a table. UserError where it is no number of 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise UserError(f"{path}, line {line}: '{text}' is no share: write a number of 0 or more")
    return value


# --- what is written


def opened_writers(options: PredictOptions, scale: Scale) -> list[Any]:
    """Return a context manager for each form that is asked for, which gives its writer."""
    chosen = []
    if options.csv is not None:
        chosen.append(csv_writer(options.csv, options.answers.top))
    if options.jsonl is not None:
        chosen.append(jsonl_writer(options.jsonl))
    if options.sheet is not None:
        chosen.append(open_sheet(options.sheet, scale))
    return chosen or [line_writer()]


@contextmanager
def whole_text(path: Path) -> Iterator[IO[str]]:
    """Yield a text file that is whole or not there; standard output for `-`."""
    if str(path) == STDIN:
        yield sys.stdout
        return
    try:
        with whole_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as f:
            yield f
    except OSError as error:
        raise UserError(f"cannot write to {path} ({error.strerror}): name another file") from error


@contextmanager
def csv_writer(path: Path, top: int) -> Iterator[Write]:
    """Yield what writes a row an image: image, prediction, then class and probability `top` times.

    prediction is the first class, or `unsure`.
    """
    with whole_text(path) as file:
        table = csv.writer(file)
        pairs = [name for n in range(1, top + 1) for name in (f"class_{n}", f"probability_{n}")]
        table.writerow(["image", "prediction", *pairs])

        def write(found: Prediction) -> None:
            values = zip(found.names, found.probabilities, strict=True)
            cells = [cell for name, value in values for cell in (name, f"{value:.6f}")]
            table.writerow([found.path, found.name, *cells])

        yield write


@contextmanager
def jsonl_writer(path: Path) -> Iterator[Write]:
    """Yield what writes a line of JSON an image."""
    with whole_text(path) as file:

        def write(found: Prediction) -> None:
            row = {
                "image": str(found.path),
                "prediction": found.name,
                "classes": found.names,
                "probabilities": [round(value, 6) for value in found.probabilities],
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

        yield write


@contextmanager
def line_writer() -> Iterator[Write]:
    """Yield what prints a line an image, for people."""

    def write(found: Prediction) -> None:
        values = zip(found.names, found.probabilities, strict=True)
        named = ", ".join(f"{name} {100 * value:.1f} %" for name, value in values)
        unsure = "unsure: " if found.is_unsure else ""
        sys.stdout.write(f"{found.path}\t{unsure}{named}\n")

    yield write
