"""The images of confusions: the classes, and the mistaken images of which the model was surest."""

from pathlib import Path

import numpy as np
import pytest

from fastlt.evaluation.metrics import Predictions, confusions, score
from fastlt.packing.reader import Pack, open_pack
from fastlt.reports import images
from fastlt.reports.content import Run
from fastlt.utils.thumbnail import thumbnail


@pytest.fixture
def pack(small_pack: Path) -> Pack:
    return open_pack(small_pack)


def run_of(pack: Pack, predicted: list[int], confidence: list[float]) -> Run:
    label = pack.val.label.astype(np.int32)
    found = Predictions(
        np.arange(len(label)), label, np.array(predicted, np.int32), np.array(confidence)
    )
    result = score(found, pack.space) | {"confusion": confusions(found)}
    return Run(Path("run"), {}, result, [], pack.space, vars(found))


def test_a_confusion_shows_both_classes_and_its_surest_mistakes(pack: Pack) -> None:
    label = pack.val.label
    assert label.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    run = run_of(pack, [1, 1, 1, 1, 1, 0, 2, 2, 2], [0.5, 0.9, 0.7, *[0.6] * 6])
    first, second = images.confused(run, pack)
    assert (first["true"], first["predicted"], first["count"]) == ("a", "b", 3)
    assert (second["true"], second["predicted"], second["count"]) == ("b", "a", 1)
    assert [round(sure) for sure, _ in first["mistaken"]] == [90, 70, 50]
    shown = [uri for _, uri in first["mistaken"]]
    assert shown == [thumbnail(bytes(pack.val.read(image))) for image in (1, 2, 0)]
    train = {name: pack.train.label.tolist().index(i) for i, name in enumerate("ab")}
    assert first["true_image"] == thumbnail(bytes(pack.train.read(train["a"])))
    assert first["predicted_image"] == thumbnail(bytes(pack.train.read(train["b"])))


def test_no_more_pairs_and_images_are_shown_than_there_is_room_for(
    pack: Pack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "SHOWN_PAIRS", 1)
    monkeypatch.setattr(images, "SHOWN_MISTAKEN", 2)
    (row,) = images.confused(run_of(pack, [1, 1, 1, 1, 1, 0, 2, 2, 2], [0.5] * 9), pack)
    assert row["count"] == 3 and len(row["mistaken"]) == 2


def test_of_other_images_or_no_pack_nothing_is_shown(pack: Pack) -> None:
    run = run_of(pack, [1] * 9, [0.5] * 9)
    assert images.confused(run, None) == []
    run.predictions["label"] = run.predictions["label"][::-1]
    assert images.confused(run, pack) == []


def test_the_page_of_a_run_without_its_pack_says_why(tmp_path: Path, pack: Pack) -> None:
    from fastlt.reports.run import find_pack, render

    run = run_of(pack, [1] * 9, [0.5] * 9)
    run.config["data"] = {"pack": str(tmp_path / "gone")}
    found, why = find_pack(run, None)
    page = render(run, found, why)
    assert found is None and "There are no sample images: there is no pack at" in page
    assert 'class="pairs"' not in page and 'class="pairs"' in render(run, pack)
