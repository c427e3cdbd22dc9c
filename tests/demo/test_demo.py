import json
from pathlib import Path

import pytest
from rich.console import Console

import fastlt.demo.run as demo
from fastlt.demo.run import MARK, begin, comparison, run_demo
from fastlt.errors import UserError


def test_a_folder_that_is_not_the_demos_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="not from an earlier demo"):
        begin(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


class Calls:
    """Stands in for the commands: notes them, and leaves what they would."""

    def __init__(self, stop_at: str = "") -> None:
        self.made: list[str] = []
        self.stop_at = stop_at

    def __call__(self, console, *arguments):
        words = [str(argument) for argument in arguments]
        self.made.append(words[0])
        if self.stop_at == words[0]:
            raise UserError("stopped")
        if words[0] in ("pack", "train"):
            out = Path(words[words.index("--out") + 1])
            out.mkdir(exist_ok=True)
            figures = {"top1": 5.0, "many": 5.0, "medium": 5.0, "few": 5.0, "epochs": 3}
            figures |= {"images": 10, "seconds": 1.0}
            (out / "result.json").write_text(json.dumps(figures))


def test_an_earlier_demo_is_gone_on_with_and_nothing_is_removed(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.setattr(demo, "write_demo_data", lambda folder: drawn.append(folder))
    monkeypatch.setattr(demo, "call", first := Calls(stop_at="train"))
    with pytest.raises(UserError, match="stopped"):
        run_demo(tmp_path, Console())
    assert first.made == ["pack", "train"] and (tmp_path / MARK).exists()
    (tmp_path / "pack" / "mine.txt").touch()
    monkeypatch.setattr(demo, "call", second := Calls())
    run_demo(tmp_path, Console())
    assert second.made.count("train") == 3 and "pack" not in second.made and len(drawn) == 1
    capsys.readouterr()
    monkeypatch.setattr(demo, "call", third := Calls())
    run_demo(tmp_path, Console())
    said = capsys.readouterr().out
    assert not third.made and "has finished" in said and "with, silenced" in said
    assert (tmp_path / "pack" / "mine.txt").exists()


def test_the_table_shows_what_the_runs_say(tmp_path, capsys):
    for name, top1 in (("a", 41.25), ("b", 52.5)):
        (tmp_path / name).mkdir()
        result = {"top1": top1, "many": 60.0, "medium": 40.0, "few": None, "epochs": 30}
        result |= {"seconds": 12.5, "images": 10_000}
        (tmp_path / name / "result.json").write_text(json.dumps(result))
    Console().print(comparison({"without": tmp_path / "a", "with": tmp_path / "b"}))
    printed = capsys.readouterr().out
    assert "41.2" in printed and "52.5" in printed and "-" in printed and "10,000" in printed


@pytest.mark.slow
def test_the_whole_demo(tmp_path):
    run_demo(tmp_path / "demo", Console(quiet=True))
    for run in ("without", "with", "without-longer"):
        # chance is 5
        assert json.loads((tmp_path / "demo" / run / "result.json").read_text())["top1"] > 20
        assert (tmp_path / "demo" / run / "report.html").is_file()
