"""`fastlt predict`: what goes in, what comes out, and what cannot be read."""

import csv
import io
import json
import sys

import numpy as np
import pytest
import torch
from helpers.method_cases import trained
from typer.testing import CliRunner

import fastlt
from fastlt.cli import app
from fastlt.config import DataConfig
from fastlt.errors import DataError, UserError
from fastlt.evaluation.calibration import Calibration
from fastlt.evaluation.predict import Model, Unreadable
from fastlt.evaluation.predict_command import images_of, read_prior


@pytest.fixture(scope="module")
def run(small_pack, tmp_path_factory):
    return trained(small_pack, tmp_path_factory.mktemp("predict") / "run", "plain")


def called(*words):
    return CliRunner().invoke(app, ["predict", *map(str, words)], catch_exceptions=True)


def table_of(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_predictions_are_written_in_every_form(run, image_folders, tmp_path):
    places = {name: tmp_path / f"out.{name}" for name in ("csv", "jsonl", "html")}
    ended = called(
        run,
        image_folders / "val",
        "--top",
        2,
        "--csv",
        places["csv"],
        "--jsonl",
        places["jsonl"],
        "--sheet",
        places["html"],
    )
    assert ended.exit_code == 0 and "9 images" in ended.output
    expected = fastlt.load(run).predict(image_folders / "val", top=2)
    rows = table_of(places["csv"])
    lines = [json.loads(line) for line in places["jsonl"].read_text().splitlines()]
    assert len(rows) == len(lines) == len(expected) == 9
    for row, line, found in zip(rows, lines, expected, strict=True):
        assert row["image"] == line["image"] == str(found.path)
        assert [row["class_1"], row["class_2"]] == line["classes"] == found.names
        assert float(row["probability_1"]) == pytest.approx(found.probabilities[0], abs=1e-6)
        assert line["probabilities"] == pytest.approx(found.probabilities, abs=1e-6)
        assert row["prediction"] == line["prediction"] == found.names[0]
    page = places["html"].read_text()
    assert page.count("<figure") == 9 and "9 predictions" in page


def test_without_a_file_a_line_is_printed_for_each_image(run, image_folders):
    ended = called(run, image_folders / "val" / "a")
    lines = [line for line in ended.output.splitlines() if "\t" in line]
    assert len(lines) == 3 and all(line.endswith(" %") for line in lines)


def test_images_that_cannot_be_read_are_listed_and_the_rest_predicted(run, image_folders, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(6):
        data = (image_folders / "val" / "a" / f"{i % 3}.png").read_bytes()
        (folder / f"{i}.png").write_bytes(data[:40] if i in (0, 3) else data)
    (folder / "empty.jpg").write_bytes(b"")
    ended = called(run, folder, "--csv", tmp_path / "out.csv", "--batch", 2)
    assert ended.exit_code == 0
    assert "4 images; 3 could not be read" in " ".join(ended.output.split())
    assert ended.output.count("left out: ") == 3 and "empty.jpg" in ended.output
    assert [row["image"][-5] for row in table_of(tmp_path / "out.csv")] == ["1", "2", "4", "5"]
    for path in folder.glob("[1245].png"):
        path.unlink()
    ended = called(run, folder, "--csv", tmp_path / "none.csv")
    assert isinstance(ended.exception, UserError) and "no image could be read" in str(
        ended.exception
    )
    assert not (tmp_path / "none.csv").exists() and not list(tmp_path.glob(".*"))


def test_places_are_files_folders_patterns_and_a_list(image_folders, tmp_path, monkeypatch):
    val = image_folders / "val"
    total, found = images_of([str(val / "a" / "1.png"), str(val / "b"), str(val / "*" / "0.png")])
    names = [path.relative_to(val).as_posix() for path in found]
    assert names == ["a/1.png", "b/0.png", "b/1.png", "b/2.png", "a/0.png", "b/0.png", "c/0.png"]
    assert total == 7
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{val}/a/0.png\n\n{val}/b/1.png\r\n"))
    total, found = images_of(["-"])
    assert total is None and [path.name for path in found] == ["0.png", "1.png"]
    monkeypatch.chdir(val)
    assert len(list(images_of(["**/*.png"])[1])) == 9
    for place, message in (("nowhere", "no image or folder"), ("*.tif", "no image matches")):
        with pytest.raises(DataError, match=message):
            images_of([place])


def test_unsure_is_what_is_below_the_threshold(run, image_folders):
    model = fastlt.load(run)
    found = model.predict(image_folders / "val", threshold=0.5)
    assert all(one.is_unsure == (one.probabilities[0] < 0.5) for one in found)
    assert all(one.name == ("unsure" if one.is_unsure else one.names[0]) for one in found)
    known = Calibration(threshold=0.9, by_class={"a": 0.0, "b": 1.0})
    model.calibration = known
    plain, by_class = (model.predict(image_folders / "val", by_class=b) for b in (False, True))
    for one, other in zip(plain, by_class, strict=True):
        assert one.is_unsure == (one.probabilities[0] < 0.9)
        limit = {"a": 0.0, "b": 1.0}.get(other.names[0], 0.9)
        assert other.is_unsure == (other.probabilities[0] < limit)
    model.calibration = Calibration()
    with pytest.raises(UserError, match="no thresholds by class"):
        model.predict(image_folders / "val", by_class=True)
    with pytest.raises(UserError, match="threshold=2"):
        model.predict(image_folders / "val", threshold=2)


class Linear(torch.nn.Module):
    """Logits are the sums of the image's quarters, so crops and mirror images differ."""

    def forward(self, images):
        halves = images.mean(dim=1)
        size = halves.shape[1] // 2
        return torch.stack(
            [halves[:, :size, :size].sum((1, 2)), halves[:, :size, size:].sum((1, 2))], dim=1
        )


def plain_model(size=8, resize=0, **more):
    data = DataConfig(size=size, eval_resize=resize, mean=(0, 0, 0), std=(1, 1, 1))
    return Model(Linear(), ["left", "right"], data, torch.device("cpu"), **more)


@pytest.fixture
def image():
    return np.random.default_rng(3).integers(0, 256, (20, 26, 3)).astype(np.uint8)


def test_the_temperature_divides_logits(image):
    model = plain_model(calibration=Calibration(temperature=2.5))
    logits = model.module(model.transform(image)[None])[0]
    found = model.predict(image)[0]
    expected = dict(zip(model.classes, (logits / 2.5).softmax(0).tolist(), strict=True))
    assert found.probabilities == pytest.approx([expected[name] for name in found.names], rel=1e-5)


def test_flips_and_crops_are_averaged(image):
    model = plain_model(resize=10)
    images = [np.asarray(image), np.ascontiguousarray(image[:, ::-1])]
    single = [dict(zip(p.names, p.probabilities, strict=True)) for p in model.predict(images)]
    both = model.predict(image, tta="flip")[0]
    mean = {name: (single[0][name] + single[1][name]) / 2 for name in model.classes}
    assert both.probabilities == pytest.approx([mean[name] for name in both.names], rel=1e-4)
    side, crops = 16, []  # 8 / 10 of the shorter side
    for top, left in ((2, 5), (0, 0), (0, 10), (4, 0), (4, 10)):
        cut = image[top : top + side, left : left + side]
        crops += [cut, np.ascontiguousarray(cut[:, ::-1])]
    whole = plain_model(resize=0)
    expected = np.mean(
        [
            [dict(zip(p.names, p.probabilities, strict=True))[n] for n in model.classes]
            for p in whole.predict(crops)
        ],
        axis=0,
    )
    found = model.predict(image, tta="crops")[0]
    by_name = dict(zip(found.names, found.probabilities, strict=True))
    assert [by_name[name] for name in model.classes] == pytest.approx(expected.tolist(), rel=1e-3)
    with pytest.raises(UserError, match="no test-time augmentation 'rotate'"):
        model.predict(image, tta="rotate")


def test_priors_are_read_and_change_the_answer(image, tmp_path):
    (tmp_path / "p.csv").write_text("class,share\nleft,1\nright,0\n")
    shares = read_prior(tmp_path / "p.csv")
    model = plain_model(prior=[0.5, 0.5])
    assert model.predict(image, prior=shares)[0].names[0] == "left"
    with pytest.raises(UserError, match="not known to which shares"):
        plain_model().predict(image, prior=shares)
    for text, message in (
        ("class,share\nleft,x\n", "line 2: 'x' is no share"),
        ("class,share\nleft,1\nleft,2\n", "names a class twice"),
        ("name,share\nleft,1\n", "no column 'class'"),
        ("class,share\nleft,0\n", "no share above 0"),
        ("class,share\nleft\n", "too few values"),
    ):
        (tmp_path / "p.csv").write_text(text)
        with pytest.raises(UserError, match=message):
            read_prior(tmp_path / "p.csv")


def test_a_stream_holds_two_batches_and_no_more(image):
    model, taken = plain_model(), []

    def images():
        for number in range(100):
            taken.append(number)
            yield image

    stream = model.stream(images(), model.answers(), batch=4)
    for number in range(10):
        assert not isinstance(next(stream), Unreadable)
        assert len(taken) <= 4 * (number // 4 + 2)
