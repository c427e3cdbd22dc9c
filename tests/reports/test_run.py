"""The report: the figures of the run, nothing from outside, and no name that becomes markup."""

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastlt.classes import ClassSpace
from fastlt.errors import UserError
from fastlt.evaluation.metrics import Predictions, confusions, score
from fastlt.packing.reader import open_pack
from fastlt.reports import charts
from fastlt.reports.content import Relation, read_run
from fastlt.reports.run import render, write_report

VOID = {"meta", "img", "br", "path", "use", "rect"}
EVIL = '<script>alert("x")</script>'


class Page(HTMLParser):
    """Text, attributes and rows of tables of a page; complains where tags do not nest."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.html, self.text, self.attributes, self.tags = html, "", [], []  # type: ignore[var-annotated]
        self._open: list[str] = []
        self.feed(html)
        assert not self._open, f"left open: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self._open.pop() == tag
            self.text += " "

    def handle_data(self, data: str) -> None:
        if not self._open or self._open[-1] not in ("style", "script"):
            self.text += data

    @property
    def words(self) -> str:
        return re.sub(r"\s+", " ", self.text)


def write_run(
    run: Path,
    space: ClassSpace,
    predicted: np.ndarray,
    label: np.ndarray,
    pack: Path | str = "",
    **more: Any,
) -> Path:
    """A RUN folder whose figures come from the real metrics of the given predictions."""
    run.mkdir(parents=True)
    confidence = np.linspace(0.5, 0.9, len(label)).astype(np.float32)
    predictions = Predictions(
        np.arange(len(label)), label.astype(np.int32), predicted.astype(np.int32), confidence
    )
    result = score(predictions, space) | {
        "confusion": confusions(predictions),
        "epochs": 3,
        "seconds": 75.0,
        "images_per_second": 900.0,
    }
    result |= {"best": {"epoch": 2, "top1": 98.7, "many": None, "medium": None, "few": 98.7}} | more
    (run / "result.json").write_text(json.dumps(result))
    lines = [
        {"epoch": 0, "loss": 2.5},
        {"epoch": 1, "loss": 1.5, "top1": 40.0, "many": None, "medium": None, "few": 40.0},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "config.toml").write_text(
        f'[data]\npack = "{pack}"\nbudget = 37\n[loss]\nname = "neighbor-silencing"\nsilence = '
        "0.1\n"
    )
    np.savez(run / "val_predictions.npz", **vars(predictions))
    space.save(run / "classes.json")
    return run


def small_run(path: Path, pack_path: Path) -> Path:
    """Targets a (12), b (6), c (3), all few; auxiliaries x of a and b, y of b; 7 of 9 right, a
    taken for b, c for a.
    """
    pack = open_pack(pack_path)
    label = pack.val.label.copy()
    predicted = label.copy()
    predicted[np.flatnonzero(label == 0)[0]] = 1
    predicted[np.flatnonzero(label == 2)[0]] = 0
    return write_run(path, pack.space, predicted, label, pack_path)


@pytest.fixture
def run(tmp_path: Path, small_pack: Path) -> Path:
    return small_run(tmp_path / "my-run", small_pack)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, small_pack: Path) -> Page:
    """Of the same run, for the tests that only read."""
    return page_of(small_run(tmp_path_factory.mktemp("report") / "my-run", small_pack))


def page_of(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


def test_the_page_has_the_figures_of_the_run(page: Page) -> None:
    words = page.words
    for figure in (
        "77.8% top-1 accuracy after the last of 3 epochs",
        "best epoch: 98.7 % at epoch 2",
        "all every class 3 21 77.8",
        "few fewer than 20 images 3 21 77.8",
        "training time 1 min 15 s",
        "Each auxiliary is seen with 37 images per epoch",
        "auxiliaries per target: fewest / median / most 0 / 1 / 2",
        "auxiliaries with several owners 1",
        "Without neighbours: c",
        "50.0 % of the 2 errors fall between targets that share an auxiliary. Such pairs are 33.3 "
        "% of all pairs of targets.",
        "1 33.3 a few b few x",  # a taken for b, which share x
        "1 33.3 c few a few -",
    ):
        assert figure in words, figure


def test_a_group_without_classes_is_empty_and_not_zero(page: Page) -> None:
    words = page.words
    assert "many more than 100 images 0 0 - -" in words
    assert "medium 20 to 100 images 0 0 - -" in words


def test_the_last_epoch_is_the_headline_and_the_best_stands_beside(page: Page) -> None:
    html = page.html
    assert re.search(r'class="big">77\.8<', html) and re.search(r"<title>77\.8 %", html)
    assert html.count("98.7") == 3  # best epoch: in its sentence, of all classes, of the few


def test_everything_is_inside_the_page(page: Page) -> None:
    links = [
        value
        for _, name, value in page.attributes
        if name in ("src", "href", "xlink:href", "action", "srcset")
    ]
    assert links and all(value.startswith(("data:image/jpeg;base64,", "#")) for value in links)
    assert not {"link", "iframe", "object"} & set(page.tags)
    # the one that sorts tables, in the page itself
    assert page.tags.count("script") == 1
    assert (
        "http" not in re.sub(r"base64,[^\"]*", "", page.html)
        and "@import" not in page.html
        and "url(#" in page.html
    )
    assert not re.search(r"url\((?!#)", page.html)


def test_identifiers_are_unique_and_their_references_exist(page: Page) -> None:
    named = [value for _, name, value in page.attributes if name == "id"]
    assert len(named) == len(set(named))
    assert set(re.findall(r"url\(#([^)]*)\)", page.html)) <= set(named)
    assert {value[1:] for _, name, value in page.attributes if name == "href"} <= set(named)


def test_pictures_and_charts_have_a_text_and_tables_have_headers(page: Page) -> None:
    pictures = page.tags.count("img")
    assert pictures >= 8
    assert (
        sum(name == "alt" and value != "" for tag, name, value in page.attributes if tag == "img")
        == pictures
    )
    assert sum(
        name == "aria-label" and value != "" for tag, name, value in page.attributes if tag == "svg"
    ) == page.tags.count("svg")
    assert ("img", "alt", "validation image of a, predicted as b") in page.attributes
    assert all(
        value in ("row", "col")
        for tag, name, value in page.attributes
        if tag == "th" and name == "scope"
    )
    assert page.tags.count("th") == sum(
        tag == "th" and name == "scope" for tag, name, _ in page.attributes
    )


def test_colours_come_from_the_page_so_that_dark_mode_fits(page: Page) -> None:
    html = page.html
    drawings = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(drawings) == 8  # loss, accuracy, classes, histogram; each wide and narrow
    for drawing in drawings:
        assert "var(--" in drawing and not re.search(
            r"#[0-9a-f]{6}\b", re.sub(r"\(#[^)]*\)|href=\"[^\"]*\"", "", drawing)
        )
    assert set(re.findall(r"var\(--(\w+)", html)) <= set(re.findall(r"--(\w+):", html))
    assert "prefers-color-scheme: dark" in html


@pytest.mark.parametrize("many", [3, 60])
def test_a_name_never_becomes_markup(tmp_path: Path, many: int) -> None:
    names = [
        EVIL,
        '"><img src=x onerror=alert(1)>',
        "$\\frac{1}$ & 猫 ]]> --><b>",
        *(f"n{i}" for i in range(3, many)),
    ]
    counts = [200, 50, 4] + [10] * (many - 3) + [7]
    space = ClassSpace(
        target_names=names,
        auxiliary_names=["</style><i>aux"],
        train_counts=counts,
        val_counts=[2] * many,
        pairs=[(0, many), (1, many)],
    )
    label = np.repeat(np.arange(many), 2)
    page = page_of(
        write_run(tmp_path / "<u>run", space, (label + np.arange(2 * many) % 2) % many, label)
    )
    assert page.tags.count("script") == 1  # the page's own
    assert not {"b", "i", "u"} & set(page.tags) and not any(
        name.startswith("on") for _, name, _ in page.attributes
    )
    assert page.tags.count("img") == 0
    for name in (*names[:3], "</style><i>aux", "<u>run"):
        assert re.sub(r"\s+", " ", name) in page.words


def test_without_its_pack_the_page_says_so(run: Path, tmp_path: Path) -> None:
    (run / "config.toml").write_text(f'[data]\npack = "{tmp_path / "gone"}"\n')
    page = page_of(run)
    assert "There are no sample images: there is no pack at" in page.words and "gone" in page.words
    assert "img" not in page.tags and "77.8" in page.words


def test_a_named_pack_must_be_right(run: Path, tmp_path: Path, small_pack: Path) -> None:
    with pytest.raises(UserError, match="is not a pack"):
        write_report(run, pack=tmp_path)
    (run / "config.toml").write_text("")
    assert "img" not in page_of(run).tags
    assert "img" in Page(write_report(run, pack=small_pack).read_text()).tags


def test_a_pack_of_other_targets_is_refused(run: Path, small_pack: Path) -> None:
    space = ClassSpace.load(run / "classes.json")
    space.model_copy(update={"target_names": ["a", "b", "other"]}).save(run / "classes.json")
    assert "has other target classes" in page_of(run).words
    with pytest.raises(UserError, match="has other target classes"):
        write_report(run, pack=small_pack)


def test_predictions_of_other_images_show_no_errors(run: Path) -> None:
    arrays = dict(np.load(run / "val_predictions.npz"))
    np.savez(run / "val_predictions.npz", **arrays | {"label": arrays["label"][::-1]})
    assert "validation image of" not in page_of(run).html


def test_a_run_on_the_targets_alone_is_held_against_the_graph_of_its_pack(run: Path) -> None:
    ClassSpace.load(run / "classes.json").targets_only().save(run / "classes.json")
    page = page_of(run)
    assert "trained on the targets alone; the graph below is that of its pack" in page.words
    assert "50.0 % of the 2 errors" in page.words and "no auxiliaries" in page.words
    # it never saw them, so they are not among its training images
    assert "of the auxiliary" not in page.html


def test_without_auxiliaries_no_graph_and_without_errors_no_confusion(
    tmp_path: Path,
) -> None:
    space = ClassSpace(target_names=["a", "b"], train_counts=[9, 3], val_counts=[1, 1])
    words = page_of(write_run(tmp_path / "run", space, np.arange(2), np.arange(2))).words
    assert (
        "There are no auxiliary classes" in words
        and "There is no error on the validation images" in words
    )
    assert "100.0% top-1" in words


def test_a_bare_result_is_enough(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "result.json").write_text('{"top1": 12.34}')
    ClassSpace(target_names=["a", "b"], train_counts=[9, 0], val_counts=[1, 0]).save(
        run / "classes.json"
    )
    words = page_of(run).words
    for sentence in (
        "12.3%",
        "no metrics.jsonl",
        "no accuracy per class",
        "lists no confusions",
        "no config.toml",
        "names no pack",
    ):
        assert sentence in words, sentence


def spoil(name: str, text: str | None) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        (run / name).unlink() if text is None else (run / name).write_text(text)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoil("result.json", None), r"has stopped after \d+ epochs: go on with"),
        (spoil("result.json", "{"), "result.json is damaged"),
        (spoil("result.json", "{}"), "names no top1"),
        (
            spoil("result.json", '{"top1": 5, "per_class": [1, 2]}'),
            "result.json has 2 classes, classes.json 3",
        ),
        (spoil("classes.json", None), "cannot read the class space"),
        (spoil("config.toml", "= ="), "not valid TOML"),
        (spoil("metrics.jsonl", '{"epoch": 0}\n{"epo'), "metrics.jsonl is damaged"),
        (spoil("val_predictions.npz", "nonsense"), "val_predictions.npz is damaged"),
    ],
)
def test_what_is_damaged_is_named(run: Path, change: Callable[[Path], None], message: str) -> None:
    change(run)
    with pytest.raises(UserError, match=message):
        write_report(run)
    assert not (run / "report.html").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no run at"):
        write_report(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not a run"):
        write_report(tmp_path)


def test_a_thousand_classes_stay_readable_and_small(tmp_path: Path) -> None:
    rng, many = np.random.default_rng(0), 1000
    names = [
        f"n{i:08d} a name from a dictionary, with its synonyms and much else besides"
        for i in range(many)
    ]
    pairs = [(t, many + int(a)) for t in range(many) for a in rng.choice(2000, 5, replace=False)]
    counts = [int(1280 * 256 ** (-t / 999)) for t in range(many)] + [50] * 2000
    space = ClassSpace(
        target_names=names,
        auxiliary_names=[f"x{i}" for i in range(2000)],
        train_counts=counts,
        val_counts=[5] * many,
        pairs=pairs,
    )
    label = np.repeat(np.arange(many), 5)
    run = write_run(
        tmp_path / "run",
        space,
        np.where(rng.random(5000) < 0.6, label, rng.integers(0, many, 5000)),
        label,
    )
    html = render(read_run(run), None)
    assert len(html) < 1_000_000 and 'class="matrix"' not in html
    assert html.count(names[500]) <= 5


def test_siblings_share_an_auxiliary_and_stand_together() -> None:
    pairs = [(0, 4), (2, 4), (2, 5), (1, 6), (3, 6)]
    space = ClassSpace(
        target_names=list("abcd"),
        auxiliary_names=list("xyz"),
        train_counts=[1] * 7,
        val_counts=[1] * 4,
        pairs=pairs,
    )
    relation = Relation(space)
    assert relation.siblings == {(0, 2), (2, 0), (1, 3), (3, 1)}
    assert relation.shared(0, 2) == ["x"] and relation.shared(0, 1) == []
    assert relation.grouped([0, 1, 2, 3]) == [0, 2, 1, 3]


def test_spread_keeps_order_and_distance() -> None:
    spread = charts.spread([50.0, 51.0, 10.0, 50.5], 7)
    assert np.argsort(spread).tolist() == [2, 0, 3, 1] and spread[2] == pytest.approx(10, abs=7)
    assert np.diff(sorted(spread)).min() >= 7 - 1e-9
    assert charts.spread([1.0, 9.0], 7) == [1.0, 9.0]


def test_the_running_mean_skips_unknown_classes() -> None:
    x, y = charts.running_mean(np.arange(5.0), np.array([0.0, np.nan, 30.0, 60.0, 90.0]), 3)
    assert y.tolist() == pytest.approx([30.0, 60.0]) and x.tolist() == pytest.approx([5 / 3, 3.0])
    assert len(charts.running_mean(np.arange(2.0), np.zeros(2), 3)[0]) == 0
