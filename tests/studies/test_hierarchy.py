"""What classes belong to: by a CSV, by CIFAR-100 itself, by WordNet."""

import json

import pytest

from fastlt.errors import UserError
from fastlt.studies.hierarchy import most_families, read_hierarchy

TREE = {  # parent -> children
    "n00000001": ["n00000002", "n00000003"],
    "n00000002": ["n00000004", "n00000005"],
    "n00000003": ["n00000006"],
    "n00000004": ["n00000007", "n00000008"],
}
WORDS = ["thing", "animal", "tool", "dog", "cat", "saw", "poodle", "beagle"]


@pytest.fixture
def wordnet(tmp_path):
    (tmp_path / "wordnet.parent-child.txt").write_text(
        "".join(f"{p} {c}\n" for p, cs in TREE.items() for c in cs)
    )
    (tmp_path / "synset_to_lemma.txt").write_text(
        "".join(f"n{i:08}\t{word}\n" for i, word in enumerate(WORDS, start=1))
    )
    return f"wordnet:{tmp_path}"


def test_the_tree_is_cut_at_each_depth_that_says_something(wordnet):
    levels = read_hierarchy(wordnet, ["poodle", "beagle", "cat", "saw", "gizmo"])
    assert levels == {
        "WordNet to depth 2": {
            "poodle": "dog",
            "beagle": "dog",
            "cat": "cat",
            "saw": "saw",
            "gizmo": "gizmo",
        },
        "WordNet to depth 1": {
            "poodle": "animal",
            "beagle": "animal",
            "cat": "animal",
            "saw": "tool",
            "gizmo": "gizmo",
        },
        "WordNet to depth 0": {
            "poodle": "thing",
            "beagle": "thing",
            "cat": "thing",
            "saw": "thing",
            "gizmo": "gizmo",
        },
    }
    assert most_families(levels) == {"dog": ["beagle", "poodle"]}
    with pytest.raises(UserError, match="WordNet knows none of the classes, not even 'gizmo'"):
        read_hierarchy(wordnet, ["gizmo", "widget"])
    with pytest.raises(UserError, match="WordNet groups none of the classes"):
        read_hierarchy(wordnet, ["thing", "gizmo"])


def test_groups_of_one_name_stay_apart(wordnet, tmp_path):
    lemmas = tmp_path / "synset_to_lemma.txt"
    lemmas.write_text(lemmas.read_text().replace("\ttool", "\tanimal"))
    level = read_hierarchy(wordnet, ["poodle", "cat", "saw"])["WordNet to depth 1"]
    assert level == {
        "poodle": "animal (n00000002)",
        "cat": "animal (n00000002)",
        "saw": "animal (n00000003)",
    }


def test_a_csv_may_have_several_levels(tmp_path):
    file = tmp_path / "h.csv"
    file.write_text("class,parent,kingdom\na,p,x\nb,p,x\nc,q,x\nd,r,y\n")
    levels = read_hierarchy(str(file), ["a", "b", "c"])
    assert levels == {
        "parents": {"a": "p", "b": "p", "c": "q"},
        "kingdom": {"a": "x", "b": "x", "c": "x"},
    }
    with pytest.raises(UserError, match=r"has no parent of 'e'$"):
        read_hierarchy(str(file), ["a", "e"])
    file.write_text("name,parent\na,p\n")
    with pytest.raises(UserError, match="line 1: the header must be class,parent"):
        read_hierarchy(str(file), ["a"])
    file.write_text("class,parent\n")
    with pytest.raises(UserError, match="has no rows"):
        read_hierarchy(str(file), ["a"])
    file.write_text("class,parent\na,p\na,q\n")
    with pytest.raises(UserError, match="has 'a' more than once"):
        read_hierarchy(str(file), ["a"])
    file.write_bytes("class,parent\nü,p\n".encode("latin-1"))
    with pytest.raises(UserError, match="is not UTF-8"):
        read_hierarchy(str(file), ["a"])
    with pytest.raises(UserError, match="cannot read the hierarchy"):
        read_hierarchy(str(tmp_path / "none.csv"), ["a"])


def test_cifars_superclasses(shared_data):
    cifar = shared_data / "cifar100"
    names = json.loads((cifar / "meta.json").read_text())["fine_names"]
    levels = read_hierarchy(f"cifar100:{cifar}", names)
    families = most_families(levels)
    assert len(families) == 20 and all(len(members) == 5 for members in families.values())
    assert families["fish"] == ["aquarium_fish", "flatfish", "ray", "shark", "trout"]
    with pytest.raises(UserError, match="'dragon' is no class of CIFAR-100"):
        read_hierarchy(f"cifar100:{cifar}", [*names, "dragon"])


def test_cifars_classes_in_wordnet(shared_data):
    cifar = shared_data / "cifar100"
    names = json.loads((cifar / "meta.json").read_text())["fine_names"]
    levels = read_hierarchy(f"wordnet:{shared_data / 'labels'}", names)
    sizes = [len(set(level.values())) for level in levels.values()]
    assert sizes == sorted(sizes, reverse=True) and len(sizes) > 5
    assert any(level["maple_tree"] == level["oak_tree"] == "tree" for level in levels.values())
    assert len(most_families(levels)) >= 8
