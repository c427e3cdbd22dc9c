"""When two names mean the same class."""

import pytest

from fastlt.utils.names import normalised


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("lawn_mower", "Lawn mower"),
        ("saber-toothed tiger", "saber toothed tigers"),
        ("  Electric\tGuitar ", "electric guitars"),
        ("butterflies", "butterfly"),
        ("finches", "finch"),
        ("boxes", "box"),
        ("ｃａｔ", "cat"),
        ("rock crabs", "rock_crab"),
    ],
)
def test_spellings_of_one_name(one, other):
    assert normalised(one) == normalised(other) != ""


@pytest.mark.parametrize(
    ("one", "other"),
    [("glass", "glas"), ("bus", "bu"), ("tiger cat", "tiger"), ("crane", "cranes fly")],
)
def test_other_names(one, other):
    assert normalised(one) != normalised(other)


def test_what_has_no_letters_has_no_name():
    assert normalised(" -_ ") == ""
