"""A run beside its baseline: differences worked by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from fastlt.classes import ClassSpace
from fastlt.errors import UserError
from fastlt.reports.baseline import beside, read_baseline
from fastlt.reports.content import read_run
from fastlt.reports.run import write_report

NAMES = ["common", "middling", "rare", "new"]


def write_run(run: Path, per_class: list[float | None], names: list[str] = NAMES, **more) -> Path:
    """A run of four classes with 200, 50, 9 and 8 training images, whatever their order."""
    counts = dict(zip(NAMES, (200, 50, 9, 8), strict=True))
    run.mkdir(parents=True)
    known = [value for value in per_class if value is not None]
    few = [v for v, n in zip(per_class, names, strict=True) if n in NAMES[2:] and v is not None]
    result = {"top1": sum(known) / len(known), "per_class": per_class, "many": per_class[0]}
    result |= {"medium": per_class[1], "few": sum(few) / max(1, len(few)), **more}
    (run / "result.json").write_text(json.dumps(result))
    ClassSpace(
        target_names=names, train_counts=[counts.get(name, 1) for name in names], val_counts=[2] * 4
    ).save(run / "classes.json")
    return run


def test_differences_are_in_points_by_group_and_by_class(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "a/run", [50, 60, 40, 30], ece=3.0, harmonic_mean=None))
    base = read_run(write_run(tmp_path / "b/run", [80, 60, 10, None], ece=5.5, harmonic_mean=9.0))
    found = beside(run, base)
    assert (found["name"], found["baseline"]) == ("a/run", "b/run")
    assert [(row["name"], row["change"]) for row in found["groups"]] == [
        ("all", -5.0),
        ("many", -30.0),
        ("medium", 0.0),
        ("few", 25.0),  # 35 against the 10 of the one class that is known
    ]
    # the largest gain first, what is not known last
    assert [(row["name"], row["change"]) for row in found["classes"]] == [
        ("rare", 30.0),
        ("middling", 0.0),
        ("common", -30.0),
        ("new", None),
    ]
    assert [row["name"] for row in found["gained"]] == ["rare"]
    assert [row["name"] for row in found["lost"]] == ["common"]
    changes = {row["name"]: row["change"] for row in found["figures"]}
    assert changes["calibration error (ECE)"] == -2.5
    assert changes["harmonic mean over classes"] is None and changes["balanced accuracy"] is None


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    """A baseline whose classes come in another order, and whose groups are others."""
    run = write_run(tmp_path / "run", [50, 60, 40, 30])
    base = write_run(tmp_path / "base", [30, 40, 60, 50], NAMES[::-1])
    (base / "config.toml").write_text("[data]\nmany_images = 1\nfew_images = 1\n")
    found = beside(read_run(run), read_run(base))
    assert {row["change"] for row in found["classes"]} == {0.0}
    assert [row["before"] for row in found["groups"]] == [45.0, 50.0, 60.0, 35.0]
    assert "No class has another accuracy" in write_report(run, baseline=base).read_text()


def test_other_images_are_said(tmp_path: Path) -> None:
    run, base = (write_run(tmp_path / name, [50, 60, 40, 30]) for name in ("run", "base"))
    assert beside(read_run(run), read_run(base))["same_images"] is None
    arrays = {"image": np.arange(8), "label": np.repeat(np.arange(4), 2)}
    arrays |= {"predicted": np.zeros(8, int), "confidence": np.full(8, 0.5)}
    np.savez(run / "val_predictions.npz", **arrays)
    np.savez(base / "val_predictions.npz", **arrays)
    assert "Both were evaluated on the same images" in write_report(run, baseline=base).read_text()
    np.savez(base / "val_predictions.npz", **arrays | {"image": np.arange(8) + 1})
    assert "evaluated on different images" in write_report(run, baseline=base).read_text()


def test_a_baseline_must_be_another_run_of_the_same_classes(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", [50, 60, 40, 30])
    other = write_run(tmp_path / "other", [50, 60, 40, 30], [*NAMES[:3], "strange"])
    with pytest.raises(UserError, match="has other target classes than the run"):
        read_baseline(read_run(run), other)
    with pytest.raises(UserError, match="is the run itself"):
        write_report(run, baseline=run)
    with pytest.raises(UserError, match="there is no run at"):
        write_report(run, baseline=tmp_path / "nowhere")
    assert not (run / "report.html").exists()
