"""`fastlt compare`: runs side by side, where their configurations differ, and whether the
differences are more than chance.

Runs that differ in their seed alone are one kind: several of each are compared seed by seed.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy import stats

from fastlt.classes import ClassSpace
from fastlt.config import MAY_CHANGE, config_type, flat
from fastlt.errors import UserError
from fastlt.evaluation.paired import Paired, corrected, paired
from fastlt.evaluation.significance import holm
from fastlt.utils.run_files import COLUMNS, RunFiles, read_run_files, shortest_names
from fastlt.utils.tables import figure_table


def compare(places: Sequence[Path], console: Console) -> None:
    """The first run is what the others are held against.

    Raises UserError where one is no finished run.
    """
    if len(places) < 2:
        raise UserError("compare needs two runs at least: fastlt compare RUN RUN ...")
    if twice := [
        place
        for place, times in Counter(Path(place).resolve() for place in places).items()
        if times > 1
    ]:
        raise UserError(f"{twice[0]} is named twice")
    runs = [read_run_files(Path(place)) for place in places]
    names = shortest_names(places)
    kinds = by_kind(runs)
    if len(kinds) > 1 and all(len(seeds) > 1 for seeds in kinds.values()):
        compare_kinds(kinds, dict(zip((run.path for run in runs), names, strict=True)), console)
        return
    console.print(figures(runs, names))
    changed = settings(runs)
    if changed:
        table = Table(
            "setting",
            *map(escape, names),
            title="where their settings differ",
            title_justify="left",
            box=SIMPLE_HEAD,
            pad_edge=False,
        )
        for column in table.columns:
            column.overflow = "fold"  # not cut, as names differ in their ends
        for key, values in changed.items():
            table.add_row(key, *(escape(value) for value in values))
        console.print(table)
    tests = [McNemar(runs[0], run) for run in runs[1:]]
    p_values = holm(
        {name: test.p for name, test in zip(names[1:], tests, strict=True) if test.p is not None}
    )
    for name, test in zip(names[1:], tests, strict=True):
        sentence = verdict(test, names[0], name, p_values.get(name), len(p_values))
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)


# --- kinds of several seeds

Kinds = dict[str, dict[int, RunFiles]]  # settings but for the seed -> seed -> run


def by_kind(runs: Sequence[RunFiles]) -> Kinds:
    """Return runs by what they were trained with but for the seed, in their order.

    It is empty where a kind has two runs of a seed, of which none is the one to pair with.
    """
    kinds: Kinds = {}
    for run in runs:
        seed = run.config.get("train", {}).get("seed", 0)
        same = {key: value for key, value in settings_of(run).items() if key not in ALIKE}
        members = kinds.setdefault(json.dumps(same, sort_keys=True), {})
        if seed in members:
            return {}
        members[seed] = run
    return kinds


# a control often differs in its pack alone
ALIKE = {*MAY_CHANGE, "train.seed"} - {"data.pack"}


def settings_of(run: RunFiles) -> dict[str, str]:
    """Return the settings of a run by `section.key`, as text; what it lacks has its default."""
    defaults = config_type()()
    sections = {key.rpartition(".")[0] for key in flat(defaults)}
    return {
        key: str(value)
        for tree in (defaults.model_dump(mode="json"), run.config)
        for key, value in leaves(tree, sections)
    }


def leaves(
    tree: Mapping[str, Any], sections: Collection[str], above: str = ""
) -> Iterator[tuple[str, Any]]:
    """Yield the settings of a tree by `section.key`; tables that are no sections are values."""
    for name, value in tree.items():
        key = f"{above}{name}"
        if key in sections:
            yield from leaves(value, sections, f"{key}.")
        else:
            yield key, value


def compare_kinds(kinds: Kinds, names: Mapping[Path, str], console: Console) -> None:
    """Print means over seeds, and differences to the first kind paired over seeds."""
    every = list(kinds.values())
    titles = [names[next(iter(seeds.values())).path] for seeds in every]
    firsts = [next(iter(seeds.values())) for seeds in every]
    found = {
        title: paired(by_seed(seeds), by_seed(every[0]))
        for title, seeds in zip(titles[1:], every[1:], strict=True)
    }
    p_values = corrected(found)
    table = figure_table("first of its seeds", "seeds", *COLUMNS, title="mean over seeds, %")
    for title, seeds in zip(titles, every, strict=True):
        results = [run.result for run in seeds.values()]
        cells = [mean_of([one.get(key) for one in results]) for key in COLUMNS.values()]
        table.add_row(escape(title), str(len(seeds)), *cells)
    console.print(table)
    packs = [settings_of(run)["data.pack"] for run in firsts]
    differing = settings(firsts) | ({"data.pack": packs} if len(set(packs)) > 1 else {})
    for key, values in differing.items():
        told = ", ".join(f"{title}: {v}" for title, v in zip(titles, values, strict=True))
        console.print(f"{key}  {told}", markup=False, highlight=False, soft_wrap=True)
    for title, one in found.items():
        sentence = of_kinds(title, titles[0], one, p_values.get(title), len(p_values))
        console.print(sentence, markup=False, highlight=False, soft_wrap=True)


def by_seed(seeds: Mapping[int, RunFiles]) -> dict[int, float]:
    """Return the accuracy of each seed."""
    return {seed: run.result["top1"] for seed, run in seeds.items()}


def mean_of(values: Sequence[float | None]) -> str:
    """Return mean and standard deviation in words; - where one is not known."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return "-"
    return f"{np.mean(known):.1f} ± {np.std(known, ddof=1):.1f}"


def of_kinds(title: str, first: str, one: Paired | None, p: float | None, tests: int) -> str:
    """Return a difference that is paired over seeds in words."""
    if one is None or p is None:
        return f"{title} and {first} share fewer than two seeds: no test of their difference"
    how = f", corrected for {tests} tests (Holm)" if tests > 1 else ""
    return (
        f"{title} - {first}: {one.mean:+.1f} points over {one.seeds} seeds, from {one.low:+.1f} "
        f"to {one.high:+.1f} (95 %, bootstrap); t = {one.t:.1f}; p = {p:.2g} by flipping signs"
        f"{how}, of which {one.seeds} seeds can give {2 / 2**one.seeds:.2g} at least"
    )


# --- runs


def figures(runs: Sequence[RunFiles], names: Sequence[str]) -> Table:
    """Return a table of the figures of runs, with their differences to the first below them."""
    table = figure_table(
        "run", *COLUMNS, "epochs", title="last epoch, %; + and - are differences to the first"
    )
    first = runs[0].result
    for run, name in zip(runs, names, strict=True):
        values = [run.result.get(key) for key in COLUMNS.values()]
        cells = ["-" if value is None else f"{value:.1f}" for value in values]
        table.add_row(escape(name), *cells, str(run.result.get("epochs", "-")))
        if run is not runs[0]:
            before = [first.get(key) for key in COLUMNS.values()]
            table.add_row("", *map(difference, values, before), "", style="dim")
    return table


def difference(value: float | None, before: float | None) -> str:
    """Return a difference in points, empty where one of both is not known."""
    return "" if value is None or before is None else f"{value - before:+.1f}"


def settings(runs: Sequence[RunFiles]) -> dict[str, list[str]]:
    """Return the settings that are not the same in all runs; what one lacks has its default."""
    given = [settings_of(run) for run in runs]
    keys = dict.fromkeys(key for of in given for key in of)
    return {
        key: values
        for key in keys
        if key not in MAY_CHANGE and len(set(values := [of.get(key, "-") for of in given])) > 1
    }


class McNemar:
    """The exact test on the images that two runs were both evaluated on; p is None where those are
    not the same.
    """

    def __init__(self, one: RunFiles, other: RunFiles) -> None:
        a, b = one.predictions, other.predictions
        same_images = (
            a
            and b
            and np.array_equal(a["image"], b["image"])
            and np.array_equal(a["label"], b["label"])
        )
        self.p: float | None = None
        if same_images and target_names(one) == target_names(other):
            right, also = a["predicted"] == a["label"], b["predicted"] == b["label"]
            self.gained, self.lost = int((~right & also).sum()), int((right & ~also).sum())
            self.p = (
                stats.binomtest(self.gained, self.gained + self.lost).pvalue
                if self.gained + self.lost
                else 1.0
            )


def target_names(run: RunFiles) -> list[str]:
    """Return the names of the classes that a run was evaluated on."""
    return ClassSpace.load(run.path / "classes.json").target_names


def verdict(test: McNemar, name: str, other_name: str, p: float | None, tests: int) -> str:
    """Return what a p says in words; it is corrected for the number of tests."""
    if p is None:
        return (
            f"{name} and {other_name} were evaluated on other images or classes: no test of "
            "their difference"
        )
    sure = "more than chance" if p < 0.05 else "within chance"
    how = f"McNemar, p = {p:.2g}{f', corrected for {tests} tests (Holm)' if tests > 1 else ''}"
    return (
        f"{other_name} has {test.gained:,} images right that {name} has wrong, and {test.lost:,} "
        f"the other way round: {sure} "
        f"on these images ({how}); other seeds may differ by more"
    )
