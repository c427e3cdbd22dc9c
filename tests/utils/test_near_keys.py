from pathlib import Path

import pytest

import fastlt
from fastlt.config import DECLARED_IN, Config, config_type, setting_names
from fastlt.errors import ConfigError
from fastlt.utils.declared import declared_keys
from fastlt.utils.near_keys import OTHER_NAMES, near_keys, no_setting

KNOWN = list(setting_names())


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("train.lr", "optim.lr"),
        ("lr", "optim.lr"),
        ("epochs", "train.epochs"),
        ("epoch", "train.epochs"),
        ("batch-size", "data.batch"),
        ("optimizer.lr", "optim.lr"),
        ("optm.name", "optim.name"),
        ("loss.silense", "loss.silence"),
        ("los.silense", "loss.silence"),
        ("optim.momentun", "optim.momentum"),
        ("weight-decay", "optim.weight_decay"),
    ],
)
def test_the_key_that_was_meant_is_found(name, meant):
    assert near_keys(name, KNOWN) == [meant]


def test_a_key_of_several_sections_names_them_all():
    assert {"model.name", "loss.name", "optim.name"} <= set(near_keys("name", KNOWN))
    assert "'model.name' or 'loss.name'" in no_setting("name", KNOWN, "x")


def test_what_is_near_nothing_names_the_list():
    assert no_setting("zzz", KNOWN, "1") == "there is no setting 'zzz': `fastlt settings` lists all"


def test_the_line_that_works_has_the_value():
    assert no_setting("train.lr", KNOWN, "0.1") == (
        "there is no setting 'train.lr', did you mean 'optim.lr'? Write optim.lr=0.1"
    )


def test_other_names_lead_to_settings():
    assert set(OTHER_NAMES.values()) <= set(KNOWN)


def test_names_read_from_text_are_those_of_the_classes():
    added = set(setting_names(config_type())) - set(setting_names(Config))
    read = {
        f"{section}.{key}"
        for section, file in DECLARED_IN.items()
        for key in declared_keys(Path(fastlt.__file__).parent / file, "Section")
    }
    assert read == added and "loss.gamma" in added


def test_declared_keys_are_of_the_base_and_what_extends_it(tmp_path):
    file = tmp_path / "code.py"
    file.write_text(
        "class Base(Section):\n    a: int = 1\n    b = 2\n"
        "class Other:\n    c: int = 3\n"
        "class Outer:\n    class Numbers(Base):\n        d: int = 4\n"
    )
    assert declared_keys(file, "Section") == ("a", "d")


def test_a_key_of_another_method_names_it():
    from fastlt.config import load_config

    with pytest.raises(ConfigError, match=r"without method\.name=distill.*: add --method distill"):
        load_config("demo", ["method.teacher=x"])
