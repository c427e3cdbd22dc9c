import json

import pytest
from typer.testing import CliRunner

from fastlt.cli import app
from fastlt.cli.app import console
from fastlt.cli.setting_list import listed_settings
from fastlt.config import setting_names
from fastlt.errors import ConfigError, UserError


def printed(*arguments: str, columns: int = 80) -> str:
    before, console.width = console._width, columns  # whichever it was imported with
    try:
        ended = CliRunner().invoke(app, ["settings", *arguments])
    finally:
        console._width = before
    assert ended.exit_code == 0, ended.output
    return ended.output


def names(*arguments: str) -> list[str]:
    return [one["name"] for one in json.loads(printed(*arguments, "--json"))]


def test_all_settings_are_listed_with_type_default_and_meaning():
    found = {one["name"]: one for one in json.loads(printed("--json"))}
    assert set(setting_names()) <= set(found)
    assert {"method.teacher", "loss.gamma", "model.head_scale"} <= set(found)
    assert found["optim.lr"]["type"] == "number above 0" and found["optim.lr"]["default"] == "0.1"
    assert found["train.compile"]["type"] == "auto | on | off"
    assert "focal" in found["loss.name"]["meaning"]
    assert all(one["type"] and one["default"] for one in found.values())
    assert [name for name, one in found.items() if not one["meaning"]] == []


def test_keys_of_methods_name_their_method():
    sections = {one.section for one in listed_settings() if one.name == "method.teacher"}
    assert "method, with method.name=distill" in sections


def test_a_section_is_that_section():
    assert all(name.startswith("optim.") for name in names("optim"))
    assert "optim.lr" in names("optim")


def test_a_word_is_looked_for_in_names_and_meanings():
    found = names("silence")
    assert "loss.silence" in found and "data.pairs" in found and "optim.lr" not in found
    assert "train.epochs" in names("train.epochs") and names("nesterov") == ["optim.nesterov"]


def test_what_is_not_found_names_the_nearest():
    for word, message in (("optin", "did you mean 'optim'"), ("xyzzy", "without a word lists all")):
        ended = CliRunner().invoke(app, ["settings", word])
        assert isinstance(ended.exception, ConfigError) and message in str(ended.exception)


def test_the_tables_fit_80_columns_and_cut_nothing():
    text = printed()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert "optim.lr_base_batch" in text


@pytest.mark.parametrize(
    ("given", "line"),
    [
        (["--epochs", "2"], "there is no option --epochs: write train.epochs=2 after the recipe"),
        (["--lr=0.1"], "there is no option --lr: write optim.lr=0.1 after the recipe"),
        (["-lr", "0.1"], "there is no option -lr: write optim.lr=0.1 after the recipe"),
        (["--batch-size", "64"], "write data.batch=64"),
        (["--optim.lr", "0.1"], "write optim.lr=0.1"),
        (["--pretrained"], "write model.pretrained=true"),
        (["train.lr=0.1"], "did you mean 'optim.lr'? Write optim.lr=0.1"),
        (["lr=0.1"], "Write optim.lr=0.1"),
        (["epochs=3"], "Write train.epochs=3"),
        (["train.epochs", "3"], "write train.epochs=VALUE"),
        (["loss.silence=0,1"], "a decimal point, not a comma, is needed: write loss.silence=0.1"),
        (["train.compile=true"], "write train.compile=on"),
        (["train.compile=false"], "write train.compile=off"),
        (["data.crop=centercrop"], "write data.crop=centre-crop"),
    ],
)
def test_a_mistaken_setting_is_answered_with_the_line_that_works(given, line, tmp_path):
    arguments = ["train", "demo", *given, "--data", str(tmp_path), "--out", str(tmp_path / "run")]
    ended = CliRunner().invoke(app, arguments)
    assert isinstance(ended.exception, UserError) and line in str(ended.exception)
    assert "\n" not in str(ended.exception)
    assert not (tmp_path / "run").exists()


def test_an_option_near_no_setting_is_typers_to_answer(tmp_path):
    ended = CliRunner().invoke(app, ["train", "demo", "--qqqq", "--data", str(tmp_path)])
    assert ended.exit_code == 2 and "No such option" in ended.output
