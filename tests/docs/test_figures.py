"""Every measured number in the README and in tables of results stands in a CSV of measurements."""

import csv
import itertools
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers.doc_pages import ROOT

RESULTS = ROOT / "benchmarks" / "results"
PAGES = [ROOT / "docs" / "results.md", *sorted((ROOT / "docs" / "studies").glob("*.md"))]
NUMBER = re.compile(r"(?<![\w.-])[+-]?\d[\d,]*(?:\.\d+)?(?![\w]*\d)")
SPREAD = re.compile(r"([\d.]+) ± ([\d.]+)")
GROUPS = re.compile(r"(\d+) / (\d+) / (\d+)")  # many, medium and few
# columns of what was not measured here, and of rates that were not kept
GIVEN = re.compile(r"published|^seeds?$|^time$")
SCALES = (1, 100, 1e-3, 1e-6, 1e-9)  # shares as percent; bytes and counts as KB, MB and GB
REPEATED = {"seed", "draw", "date", "command", "settings", "run", "commit", "machine", "torch"}
AXES = ("neighbours", "silence")  # of sweeps, which are also shown one by one
README = {  # the first words of a row -> the file that it is of
    "loss with silencing": "loss-h100.csv",
    "the same from features": "loss-cpu.csv",
    "loading JPEG photos": "data-cpu.csv",
    "training steps of ResNet-50": "train-cpu.csv",
}


class Table(NamedTuple):
    """A table of a page, and the files that its section links last above it."""

    page: str
    files: tuple[Path, ...]
    head: list[str]
    rows: list[list[str]]


class Group(NamedTuple):
    """Repetitions of one measurement."""

    words: frozenset[str]  # what the file calls it
    values: dict[str, list[float]]  # column -> a value for each repetition
    is_alone: bool = False  # one of them, whether or not there are others

    def means(self) -> Iterator[float]:
        return (statistics.mean(values) for values in self.values.values())


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
        text = "\n".join(block)
        if linked := re.findall(r"results/([\w-]+\.csv)", text[text.rfind("\n## ") + 1 :]):
            files = tuple(RESULTS / name for name in linked)
        elif "\n## " in text:
            files = ()


@cache
def measured(files: tuple[Path, ...]) -> list[Group]:
    """Return the measurements in files, as repetitions and each on its own."""
    found: list[Group] = []
    for file in files:
        with file.open(newline="", encoding="utf-8") as opened:
            rows = list(csv.DictReader(opened))
        figures = [numeric(row) for row in rows]
        add_ratios(figures)
        found += [*repetitions(rows, figures), *gaps(rows, figures)]
        found += [
            Group(frozenset(row.values()), {name: [one] for name, one in numbers.items()}, True)
            for row, numbers in zip(rows, figures, strict=True)
        ]
    return found


def numeric(row: dict[str, str]) -> dict[str, float]:
    found = {}
    for name, value in row.items():
        try:
            found[name] = float(value)
        except ValueError:
            continue
    return found


def add_ratios(figures: Sequence[dict[str, float]]) -> None:
    """Add how far many are ahead of few, the share of trained parameters, and images and memory
    over those of the first row and of the row before whose parameters are all trained.
    """
    first = whole = dict(figures[0])
    for one in figures:
        if {"many", "few"} <= one.keys():
            one["ahead"] = one["many"] - one["few"]
        if "trained_parameters" in one:
            one["trained"] = one["trained_parameters"] / one["parameters"]
            whole = dict(one) if one["trained"] == 1 else whole
        for name in ("peak_memory", "memory_mb", "images"):
            if one.get(name) and first.get(name):
                one |= {
                    f"{name} over the first": one[name] / first[name],
                    f"{name} over the whole": one[name] / whole[name],
                }


def repetitions(
    rows: Sequence[dict[str, str]], figures: Sequence[dict[str, float]]
) -> Iterator[Group]:
    """Yield the rows whose words are the same, all together and by the numbers of each axis."""
    groups = defaultdict(list)
    for row, numbers in zip(rows, figures, strict=True):
        words = tuple(v for k, v in row.items() if k not in numbers and k not in REPEATED)
        sizes = re.findall(r"data\.size=(\d+)", row.get("settings") or "")  # the last one holds
        for axis in (None, *AXES):
            place = (axis, row.get(axis or ""), sizes[-1:])
            groups[words, str(place)].append((row, numbers))
    for (words, _), members in groups.items():
        names = {name for _, numbers in members for name in numbers}
        values = {
            name: [numbers[name] for _, numbers in members if name in numbers] for name in names
        }
        yield Group(frozenset(words), values)


def gaps(rows: Sequence[dict[str, str]], figures: Sequence[dict[str, float]]) -> Iterator[Group]:
    """Yield how far balanced training is ahead of long-tailed, draw by draw."""
    tops: dict[tuple[str, str, str], float] = {}
    for row, numbers in zip(rows, figures, strict=True):
        if row.get("kind") in ("balanced", "long-tailed"):
            tops[row["level"], row["kind"], row["draw"]] = numbers["top1"]
    found = defaultdict(list)
    for (level, kind, draw), top in tops.items():
        if kind == "long-tailed":
            found[level].append(tops[level, "balanced", draw] - top)
    for level, values in found.items():
        yield Group(frozenset([level]), {"gap": values})


# --- is it there?


def plain(cell: str) -> str:
    return cell.strip("`* ")


def about(groups: Sequence[Group], *names: str) -> Sequence[Group]:
    """Return the groups that a file calls by each of the names that it knows at all."""
    for name in names:
        groups = [group for group in groups if plain(name) in group.words] or groups
    return groups


def rounds_to(value: float, shown: str) -> bool:
    decimals = len(shown.partition(".")[2])
    return abs(abs(value) - abs(float(shown.replace(",", "")))) <= 0.5001 * 10**-decimals


def missing(cell: str, groups: Sequence[Group]) -> list[str]:
    """Return what a cell shows and no group has.

    A mean with its spread must be those of one column of one group, and accuracies of many, medium
    and few those of one group.
    """
    wrong = [
        f"{mean} ± {spread}"
        for mean, spread in SPREAD.findall(cell)
        if not any(has_spread(group, mean, spread) for group in groups)
    ]
    wrong += [
        " / ".join(shown)
        for shown in GROUPS.findall(cell)
        if not any(has_groups(group, shown) for group in groups)
    ]
    rest = GROUPS.sub("", SPREAD.sub("", cell))
    values = [mean for group in groups for mean in group.means()]
    return wrong + [
        shown
        for shown in NUMBER.findall(rest)
        if not any(rounds_to(value * scale, shown) for value in values for scale in SCALES)
    ]


def has_spread(group: Group, mean: str, spread: str) -> bool:
    return any(
        rounds_to(statistics.mean(values), mean) and rounds_to(statistics.stdev(values), spread)
        for values in group.values.values()
        if len(values) > 1
    )


def has_groups(group: Group, shown: Iterable[str]) -> bool:
    names = ("many", "medium", "few")
    return not group.is_alone and all(
        rounds_to(statistics.mean(group.values[name]), one) if group.values.get(name) else False
        for name, one in zip(names, shown, strict=True)
    )


def wrong_cells(table: Table) -> list[str]:
    """Return what a table shows that is not in its files, but for its first column."""
    groups = measured(table.files)
    return [
        f"{row[0]}, {head}: {shown}"
        for row in table.rows
        for head, cell in zip(table.head[1:], row[1:], strict=True)
        if not GIVEN.search(head)
        for shown in missing(cell, about(groups, row[0], head))
    ]


TABLES = [
    pytest.param(table, id=f"{table.page}, {number}")
    for page in PAGES
    for number, table in enumerate(tables(page))
]


@pytest.mark.parametrize("table", TABLES)
def test_numbers_of_a_table_stand_in_its_files(table):
    assert not wrong_cells(table), f"not in {', '.join(file.name for file in table.files)}"


@pytest.mark.parametrize("words", README)
def test_numbers_of_the_readme_stand_in_files(words):
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    (line,) = (line for line in lines if line.startswith(f"| {words}"))
    cells = line.strip("|").split("|")[1:]
    assert any(NUMBER.search(cell) for cell in cells)
    groups = measured((RESULTS / README[words],))
    assert not [shown for cell in cells for shown in missing(cell, groups)]


def test_the_readme_has_no_other_rows():
    table = re.findall(r"(?:^\|.*\n)+", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert len(table) == 1 and len(table[0].splitlines()) == 2 + len(README)


def test_a_number_that_was_not_measured_is_found():
    groups = measured((RESULTS / "finetune-vit-cpu.csv",))
    lora = about(groups, "`lora`", "neighbours")
    assert not missing("50.0 ± 0.7", lora) and not missing("60 / 49 / 40", lora)
    assert missing("50.1 ± 0.7", lora) == ["50.1 ± 0.7"] and missing("60 / 49 / 41", lora)
    assert missing("48.7 ± 0.4", lora)  # another row's
    assert missing("12.34", groups) == ["12.34"]
