"""The groups of a training are those of its results, of later evaluations and of its report."""

from pathlib import Path

import pytest
from rich.console import Console

from fastlt.cli.models import report
from fastlt.config import load_config
from fastlt.errors import UserError
from fastlt.evaluation.evaluate import evaluate_run
from fastlt.reports.content import read_run
from fastlt.training.loop import train


@pytest.fixture(scope="module")
def run(small_pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on three targets of 12, 6 and 3 training images, in thirds."""
    out = tmp_path_factory.mktemp("runs") / "thirds"
    settings = ["data.groups=thirds", "train.epochs=1", "data.size=16", "data.batch=8"]
    train(load_config("demo", [f'data.pack="{small_pack}"', *settings]), out, Console(quiet=True))
    return out


def test_thirds_hold_in_results_evaluations_and_reports(run: Path) -> None:
    content = read_run(run)
    for result in (content.result, evaluate_run(run)):
        assert [result["groups"][name]["classes"] for name in result["groups"]] == [1, 1, 1]
        assert [result[name] for name in ("many", "medium", "few")] == result["per_class"]
    assert content.groups == ["many", "medium", "few"]
    assert content.spans == {"many": "12", "medium": "6", "few": "3"}


def test_a_baseline_is_for_runs(run: Path, tmp_path: Path) -> None:
    (tmp_path / "sweep.toml").write_text("")
    with pytest.raises(UserError, match="--baseline is for runs"):
        report(tmp_path, "", run)
