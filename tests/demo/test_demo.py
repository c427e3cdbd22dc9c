import json

import pytest
from rich.console import Console

from fastlt.demo.run import MARK, comparison, run_demo, start_anew
from fastlt.errors import UserError


def test_a_folder_that_is_not_the_demos_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="not from an earlier demo"):
        start_anew(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_an_earlier_demo_is_replaced(tmp_path):
    (tmp_path / MARK).touch()
    (tmp_path / "pack").mkdir()
    start_anew(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [MARK]


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
