"""Every page that fastlt writes, opened in a real browser."""

import csv
import io
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.browser import check, column, launched, opened, unfold
from PIL import Image
from rich.console import Console

from fastlt.config import load_config
from fastlt.curate.selection import Verdicts
from fastlt.curate.sheet import write_sheets
from fastlt.evaluation.predict import Prediction, load_model
from fastlt.evaluation.prediction_sheet import open_sheet
from fastlt.packing.reader import open_pack
from fastlt.packing.sources import read_collection
from fastlt.packing.writer import PackOptions, write_pack
from fastlt.reports.run import write_report
from fastlt.sweep.report import write_sweep_report
from fastlt.training.loop import train

QUIET = Console(quiet=True)
SMALL = ("data.size=16", "data.batch=8", "data.workers=0", "model.name=resnet20")
HOSTILE = {"<script>alert(1)<script>": 9, "\"&'<b>": 4}


@pytest.fixture(scope="module")
def browser() -> Any:
    with launched() as found:
        yield found


def trained(pack: Path, out: Path, epochs: int, *more: str) -> Path:
    settings = [f'data.pack="{pack}"', f"train.epochs={epochs}", *SMALL, *more]
    config = load_config("demo", settings)
    train(config, out, QUIET)
    return out


@pytest.fixture(scope="module")
def runs(small_pack: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("runs")
    return trained(small_pack, root / "better", 4), trained(small_pack, root / "base", 1)


@pytest.fixture(scope="module")
def hostile(image_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two classes whose names are markup."""
    root = tmp_path_factory.mktemp("hostile")
    for name, like in zip(HOSTILE, "ab", strict=True):
        shutil.copytree(image_folders / "target" / like, root / "target" / name)
        shutil.copytree(image_folders / "val" / like, root / "val" / name)
    collection = read_collection(root / "target", None, root / "val")
    pack = write_pack(collection, PackOptions(out=root / "pack", workers=1), QUIET)
    return trained(pack, root / "run <i>", 1, "loss.name=balanced-ce")


def sweep_page(out: Path) -> Path:
    """Write the page of a sweep of two axes and two seeds."""
    out.mkdir()
    axes = "silence = [1, 0.1]\nneighbours = [0, 2]\nseed = [0, 1]"
    (out / "sweep.toml").write_text(f'recipe = "demo"\n[axes]\n{axes}\n[baseline]\nneighbours = 0')
    rng = np.random.default_rng(0)
    rows = [
        {
            "silence": silence,
            "neighbours": neighbours,
            "seed": seed,
            "run": f"silence={silence},neighbours={neighbours},seed={seed}",
            "status": "finished" if (silence, neighbours, seed) != (1, 2, 1) else "failed",
            "note": "" if (silence, neighbours, seed) != (1, 2, 1) else "<b>out of memory</b>",
            **{name: round(40 + neighbours + rng.random(), 2) for name in ("top1", "many", "few")},
            "medium": "",
            "epochs": 2,
            "images": 100,
            "seconds": 36,
            "settings": '["loss.silence=0.1"]',
        }
        for silence in (1, 0.1)
        for neighbours in (0, 2)
        for seed in (0, 1)
    ]
    for row in rows:
        if row["status"] == "failed":
            row |= dict.fromkeys(("top1", "many", "few"), "")
    with (out / "results.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    return write_sweep_report(out)


def sheets(pack: Path, out: Path) -> Path:
    """Write contact sheets of a pack's images; every third one is dropped."""
    split, names = open_pack(pack).train, [*"abc", "<script>x", "y"]
    verdicts = Verdicts(len(split))
    verdicts.likeness = np.linspace(0.2, 0.9, len(split))
    for image in range(0, len(split), 3):
        verdicts.drop(image, "unlike its class", "/images/<b>.jpg")
    out.mkdir()
    about = [{"name": name, "owners": ["\"&'"], "description": "<i>"} for name in names]
    write_sheets(out, split, verdicts, about, 6)
    return out / "sheet.html"


def test_the_report_of_a_run_stands_in_a_browser(browser: Any, runs: tuple[Path, Path]) -> None:
    check(browser, write_report(runs[0], baseline=runs[1]))
    check(browser, write_report(runs[1]))


def test_the_report_of_hostile_names_shows_them(browser: Any, hostile: Path) -> None:
    file = write_report(hostile)
    check(browser, file)
    with opened(browser, file) as page:
        unfold(page)
        words = page.inner_text("body")
        assert all(name in words for name in HOSTILE) and hostile.name in words


def test_the_page_of_a_sweep_stands_in_a_browser(browser: Any, tmp_path: Path) -> None:
    check(browser, sweep_page(tmp_path / "sweep <b>"))


@pytest.mark.slow
def test_contact_sheets_stand_in_a_browser(browser: Any, small_pack: Path, tmp_path: Path) -> None:
    index = sheets(small_pack, tmp_path / "curated")
    # of five sheets of one make, the first and that of hostile names
    for file in (index, *sorted((index.parent / "sheets").iterdir())[::3]):
        check(browser, file)
    with opened(browser, index) as page:
        page.click("a >> nth=3")
        assert page.inner_text("h1") == "<script>x"


def test_the_page_of_predictions_shows_a_class_alone(
    browser: Any, hostile: Path, image_folders: Path, tmp_path: Path
) -> None:
    file, model = tmp_path / "predictions.html", load_model(hostile, "cpu")
    with open_sheet(file, {}) as add:
        for found in model.stream(image_folders / "val", model.answers(top=2, threshold=0.6)):
            assert isinstance(found, Prediction)
            add(found)
    check(browser, file)
    with opened(browser, file) as page:
        names = page.locator("select option").all_inner_texts()[1:]
        shown = page.locator("figure:visible")
        assert shown.count() == 9 and set(names) <= {*HOSTILE, "unsure"}
        counts = []
        for name in names:
            page.select_option("select", label=name)
            counts.append(shown.count())
        assert sum(counts) == 9 and 0 not in counts


def test_pictures_of_the_docs(browser: Any, tmp_path: Path) -> None:
    """FASTLT_SCREENSHOTS=docs/images FASTLT_DEMO=demo, after `fastlt demo`, makes them anew."""
    folder, demo = os.environ.get("FASTLT_SCREENSHOTS"), os.environ.get("FASTLT_DEMO")
    if not folder or not demo:
        pytest.skip("set FASTLT_SCREENSHOTS to docs/images, and FASTLT_DEMO to what the demo made")
    runs = [tmp_path / name for name in ("with auxiliaries", "without auxiliaries")]
    for run in runs:
        shutil.copytree(Path(demo) / run.name.split()[0], run)
    file, size = write_report(runs[0], baseline=runs[1]), {"width": 1120, "height": 860}
    for scheme in ("light", "dark"):
        with opened(browser, file, scheme, size) as page:
            picture(page.screenshot(), Path(folder) / f"report-{scheme}.png")
            rest = page.locator("ul.pairs li:nth-child(n + 5)")
            rest.evaluate_all("(pairs) => pairs.forEach((one) => one.remove())")
            picture(
                page.locator("ul.pairs").screenshot(),
                Path(folder) / f"report-confusions-{scheme}.png",
            )


def picture(png: bytes, path: Path) -> None:
    """Write a screenshot in few colours, as small as a page of the docs wants it."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    image.quantize(256).save(path, optimize=True)
    assert path.stat().st_size < 150_000


def figures(words: str) -> list[str]:
    return re.findall(r"^[+-]?[0-9.,]+", words)


def key(words: str) -> float:
    return float(figures(words)[0].replace(",", ""))


@pytest.mark.slow
def test_tables_sort_by_a_click_on_a_header(
    browser: Any, runs: tuple[Path, Path], small_pack: Path, tmp_path: Path
) -> None:
    """Figures come from the largest, words from the first; what is not known is last, both ways."""
    files = [
        write_report(runs[0], baseline=runs[1]),
        sweep_page(tmp_path / "sweep"),
        sheets(small_pack, tmp_path / "curated"),
    ]
    changed = 0
    for file in files:
        with opened(browser, file) as page:
            unfold(page)
            tables = page.locator("table.sortable")
            assert tables.count()
            for table in range(tables.count()):
                for place in range(tables.nth(table).locator("thead th").count()):
                    changed += sorts(page, table, place)
    assert changed > 20


def sorts(page: Any, table: int, place: int) -> int:
    """Click twice on a header, hold both orders to a sorted list; return how often rows moved."""
    header = page.locator("table.sortable").nth(table).locator("thead th").nth(place)
    before = column(page, table, place)
    is_figure = "n" in (header.get_attribute("class") or "").split() or all(map(figures, before))
    absent = [word for word in before if word in ("", "-") or (is_figure and not figures(word))]
    moved = 0
    for down in (True, False) if is_figure else (False, True):
        header.locator("button").click()
        assert header.get_attribute("aria-sort") == ("descending" if down else "ascending")
        shown = column(page, table, place)
        known = shown[: len(shown) - len(absent)]
        assert sorted(shown) == sorted(before) and set(shown[len(known) :]) == set(absent)
        if is_figure:
            assert known == sorted(known, key=key, reverse=down)
        moved += shown != before
        before = shown
    return moved
