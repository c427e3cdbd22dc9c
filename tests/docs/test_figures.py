"""Every measured number in the README and in tables of results stands in a CSV of measurements."""

import bisect
import csv
import itertools
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers.doc_pages import ROOT

RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "docs" / "results.md", *sorted((ROOT / "docs" / "studies").glob("*.md"))]
NUMBER = re.compile(r"(?<![\w.-])[+-]?\d[\d,]*(?:\.\d+)?(?![\w]*\d)")
# columns of what was not measured here, and of rates that were not kept
GIVEN = re.compile(r"published|^seeds?$|^time$")
SCALES = (1, 100, 1e-3, 1e-6, 1e-9)  # shares as percent; bytes and counts as KB, MB and GB
REPEATED = {"seed", "draw", "date", "command", "settings", "run", "commit", "machine", "torch"}


class Table(NamedTuple):
    """A table of a page, and the files that its section links above it."""

    page: str
    files: tuple[Path, ...]
    head: list[str]
    rows: list[list[str]]


def tables(page: Path) -> Iterator[Table]:
    """Yield the tables of a page whose section links a CSV."""
    files: tuple[Path, ...] = ()
    lines = page.read_text(encoding="utf-8").splitlines()
    for is_table, block in itertools.groupby(lines, key=lambda line: line.startswith("|")):
        if is_table:
            head, _, *rows = (
                [cell.strip() for cell in line.strip("|").split("|")] for line in block
            )
            if files:
                yield Table(page.name, files, head, rows)
            continue
        for line in block:
            if line.startswith("## "):
                files = ()
            files += tuple(RESULTS / name for name in re.findall(r"results/([\w-]+\.csv)", line))


def numbers_of(table: Table) -> Iterator[str]:
    """Yield the numbers of a table but those of its first column and of what was not measured."""
    for row in table.rows:
        for head, cell in zip(table.head[1:], row[1:], strict=True):
            if not GIVEN.search(head):
                yield from NUMBER.findall(cell)


@cache
def measured(files: tuple[Path, ...]) -> list[float]:
    """Return what stands in files, in order: numbers, their means and standard deviations over
    repetitions, and their ratios to others of the row and of the first row.
    """
    found: list[float] = []
    for file in files:
        with file.open(newline="", encoding="utf-8") as opened:
            rows = list(csv.DictReader(opened))
        figures = [numeric(row) for row in rows]
        found += gaps(rows, figures)
        for one in figures:
            found += one.values()
        found += over_repetitions(rows, figures)
        found += ratios(figures)
    return sorted(value * scale for value in found for scale in SCALES)


def numeric(row: dict[str, str]) -> dict[str, float]:
    found = {}
    for name, value in row.items():
        try:
            found[name] = float(value)
        except ValueError:
            continue
    return found


def over_repetitions(
    rows: list[dict[str, str]], figures: list[dict[str, float]]
) -> Iterator[float]:
    """Yield means and standard deviations over rows whose words are the same, and those whose
    whole numbers are the same, too: sizes, neighbours, silence.
    """
    groups = defaultdict(list)
    for row, numbers in zip(rows, figures, strict=True):
        words = tuple(v for k, v in row.items() if k not in numbers and k not in REPEATED)
        for axis in ((), ("neighbours",), ("silence",), ("epochs",), ("control", "seed")):
            groups[(words, axis, tuple(row.get(name) for name in axis))].append(numbers)
    for group in groups.values():
        for name in group[0]:
            values = [one[name] for one in group if name in one]
            yield statistics.mean(values)
            if len(values) > 1:
                yield statistics.stdev(values)


def gaps(rows: list[dict[str, str]], figures: list[dict[str, float]]) -> Iterator[float]:
    """Yield means and standard deviations over draws of how far balanced training is ahead of
    long-tailed, and many of few.
    """
    of_level: dict[str, list[dict[str, float]]] = defaultdict(list)
    balanced = {}
    for row, numbers in zip(rows, figures, strict=True):
        if row.get("kind") == "balanced":
            balanced[row["level"], row["draw"]] = numbers["top1"]
    for row, numbers in zip(rows, figures, strict=True):
        if row.get("kind") == "long-tailed":
            gap = balanced[row["level"], row["draw"]] - numbers["top1"]
            of_level[row["level"]].append({"gap": gap, "ahead": numbers["many"] - numbers["few"]})
    for group in of_level.values():
        for name in ("gap", "ahead"):
            values = [one[name] for one in group]
            yield statistics.mean(values)
            yield statistics.stdev(values)


def ratios(figures: list[dict[str, float]]) -> Iterator[float]:
    """Yield trained parameters over all, images and memory over the first row's, and memory over
    that of the row before whose parameters are all trained.
    """
    first = whole = figures[0]
    for one in figures:
        if "trained_parameters" in one:
            yield one["trained_parameters"] / one["parameters"]
            whole = one if one["trained_parameters"] == one["parameters"] else whole
        for name in ("peak_memory", "memory_mb", "images"):
            if one.get(name) and first.get(name):
                yield one[name] / first[name]
                yield one[name] / whole[name]


def is_measured(shown: str, among: list[float]) -> bool:
    """Return whether one of the sorted numbers is shown so when it is rounded."""
    value, decimals = float(shown.replace(",", "")), len(shown.partition(".")[2])
    half = 0.5001 * 10**-decimals
    place = bisect.bisect_left(among, abs(value) - half)
    return place < len(among) and among[place] <= abs(value) + half


TABLES = [
    pytest.param(table, id=f"{table.page}, {number}")
    for page in PAGES
    for number, table in enumerate(tables(page))
]


@pytest.mark.parametrize("table", TABLES)
def test_numbers_of_a_table_stand_in_its_files(table):
    among = measured(table.files)
    missing = [shown for shown in numbers_of(table) if not is_measured(shown, among)]
    assert not missing, f"not in {', '.join(file.name for file in table.files)}"


def test_numbers_of_the_readme_stand_in_files():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (table,) = (block for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE))
    among = measured(tuple(sorted(RESULTS.glob("*.csv"))))
    cells = [cell for line in table.splitlines()[2:] for cell in line.split("|")[2:]]
    shown = [number for cell in cells for number in NUMBER.findall(cell)]
    assert len(shown) > 8
    assert not [number for number in shown if not is_measured(number, among)]


def test_a_number_that_was_not_measured_is_found():
    among = measured((RESULTS / "siblings-cpu.csv",))
    assert is_measured("50.9", among) and is_measured("0.7", among)
    assert not is_measured("99.4", among) and not is_measured("12.34", among)
