"""The class space: what classes.json holds, and what it refuses."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from fastlt.classes import ClassSpace, pair_ids
from fastlt.errors import UserError


def space(**changes: object) -> ClassSpace:
    fields = {
        "target_names": ["cat", "dog", "owl"],
        "auxiliary_names": ["lynx", "wolf"],
        "train_counts": [120, 60, 5, 50, 40],
        "val_counts": [10, 10, 0],
        "pairs": [(0, 3), (1, 3), (1, 4)],  # lynx neighbours two targets, owl has no neighbour
        "origins": {"lynx": "web", "wolf": "web"},
    }
    return ClassSpace(**(fields | changes))


def test_json_round_trip_keeps_everything(tmp_path: Path) -> None:
    space().save(tmp_path / "classes.json")
    assert ClassSpace.load(tmp_path / "classes.json") == space()
    assert json.loads((tmp_path / "classes.json").read_text())["pairs"] == [[0, 3], [1, 3], [1, 4]]


def test_targets_come_first() -> None:
    assert space().names == ["cat", "dog", "owl", "lynx", "wolf"]
    assert (space().num_targets, space().num_auxiliaries, space().num_classes) == (3, 2, 5)


def test_targets_only_forgets_the_auxiliaries() -> None:
    alone = space().targets_only()
    assert alone.names == ["cat", "dog", "owl"]
    assert (alone.train_counts, alone.val_counts, alone.pairs) == ([120, 60, 5], [10, 10, 0], [])


def test_graph_relates_each_target_with_its_neighbours() -> None:
    graph = space().graph()
    assert (graph.num_targets, graph.num_classes) == (3, 5)
    assert graph.pairs().tolist() == [[0, 3], [1, 3], [1, 4]]


def test_groups_at_their_borders() -> None:
    counts = [101, 100, 20, 19, 500, 500]
    names = [f"target {i}" for i in range(4)]
    groups = space(target_names=names, train_counts=counts, val_counts=[1] * 4, pairs=[]).groups()
    assert groups == {"many": [0], "medium": [1, 2], "few": [3]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"target_names": [], "val_counts": [], "train_counts": [1, 1], "pairs": []},
            "no target classes",
        ),
        ({"auxiliary_names": ["lynx", "cat"]}, "not unique: cat"),
        ({"train_counts": [1, 2, 3]}, "3 entries for 5 classes"),
        ({"val_counts": [1, 2]}, "2 entries for 3 targets"),
        ({"pairs": [(3, 0)]}, r"pair \(3, 0\)"),
        ({"pairs": [(0, 5)]}, r"pair \(0, 5\)"),
        ({"pairs": [(-1, 3)]}, r"pair \(-1, 3\)"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_an_inconsistent_space_cannot_be_made(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        space(**changes)


def test_loading_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot read the class space"):
        ClassSpace.load(tmp_path / "none.json")
    broken = tmp_path / "broken.json"
    broken.write_text('{"target_names": ["cat"], "train_counts": [], "val_counts": [1]}')
    with pytest.raises(
        UserError, match=r"broken\.json is not a class space: .*0 entries for 1 classes"
    ):
        ClassSpace.load(broken)
    broken.write_bytes(b"\xff\xfe not text")
    with pytest.raises(UserError, match=r"broken\.json is not a class space"):
        ClassSpace.load(broken)


def test_pairs_are_many_to_many_sorted_and_once_each() -> None:
    pairs = [("b", "y"), ("a", "x"), ("b", "x"), ("a", "x")]
    assert pair_ids(pairs, ["a", "b"], ["x", "y"], "pairs.csv") == [(0, 2), (1, 2), (1, 3)]


def test_pairs_with_unknown_classes_are_refused_by_line() -> None:
    with pytest.raises(UserError, match=r"pairs\.csv, line 3: there is no target class 'c'"):
        pair_ids([("a", "x"), ("c", "x")], ["a", "b"], ["x"], "pairs.csv")
    with pytest.raises(UserError, match=r"pairs\.csv, line 2: there is no auxiliary class 'z'"):
        pair_ids([("a", "z")], ["a", "b"], ["x"], "pairs.csv")
