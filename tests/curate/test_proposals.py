"""Names compared, targets dropped, the same category merged, and how many each target gets."""

import numpy as np
import pytest

from fastlt.curate.proposals import (
    Category,
    Proposal,
    Target,
    even_limits,
    merge,
    tail_weighted_limits,
    with_random_names,
)

TARGETS = [Target("tiger_cat", 500), Target("sofa", 10)]
SYNONYMS = [["tiger cat", "tabby"], ["sofa", "couch", "lounge"]]


def merged(*proposals, limit=8):
    proposed = [[p for p in proposals if p.target == target] for target in range(2)]
    return merge(TARGETS, SYNONYMS, proposed, [limit, limit])


def test_a_category_that_two_targets_are_proposed_is_one_with_two_owners():
    decisions, categories = merged(
        Proposal(0, "Bengal cat", "llm"),
        Proposal(1, "bengal_cats", "llm"),
        Proposal(1, "bench", "llm", query="garden bench"),
    )
    assert [decision.kept for decision in decisions] == [True] * 3
    assert [(c.name, c.query, c.owners) for c in categories] == [
        ("Bengal cat", "Bengal cat", {0, 1}),
        ("bench", "garden bench", {1}),
    ]


def test_owners_are_also_the_targets_that_it_belongs_to():
    _, (category,) = merged(Proposal(0, "futon", "wordnet", also=(1,)))
    assert category.owners == {0, 1}


@pytest.mark.parametrize(
    ("proposal", "reason"),
    [
        (Proposal(0, "Couches", "llm"), "it is the target 'sofa' or a synonym of it"),
        (Proposal(0, "tabby", "llm"), "it is the target 'tiger_cat' or a synonym of it"),
        (
            Proposal(1, "chesterfield", "wordnet", synonyms=("Tiger cats",)),
            "it is also called 'tiger_cat'",
        ),
        (
            Proposal(1, "furniture", "wordnet", refused="it contains the target 'sofa'"),
            "it contains the target 'sofa'",
        ),
        (Proposal(1, " - ", "llm"), "it has no name"),
    ],
)
def test_what_is_no_neighbour_is_dropped_with_its_reason(proposal, reason):
    (decision,), categories = merged(proposal)
    assert not decision.kept and decision.reason.startswith(reason) and not categories


def test_a_second_meaning_of_a_name_and_what_came_before_are_dropped():
    decisions, categories = merged(
        Proposal(0, "crane", "wordnet", key="n1"),
        Proposal(0, "cranes", "wordnet", key="n1"),
        Proposal(1, "crane", "wordnet", key="n2"),
        Proposal(1, "bed", "wordnet", key="n3"),
    )
    assert [decision.kept for decision in decisions] == [True, False, False, True]
    assert decisions[1].reason == "it was proposed for this target before"
    assert decisions[2].reason == "another category has this name (n1)"
    assert [category.owners for category in categories] == [{0}, {1}]


def test_the_best_are_kept_up_to_the_limit():
    proposals = [
        Proposal(0, name, "llm") for name in ("tabby", "ocicat", "serval", "lynx", "caracal")
    ]
    decisions, categories = merged(*proposals, limit=2)
    assert [category.name for category in categories] == ["ocicat", "serval"]
    assert [decision.reason for decision in decisions[3:]] == ["enough were better"] * 2


def test_the_tail_gets_more_of_as_many_in_all():
    rng = np.random.default_rng(0)
    targets = [
        Target(str(i), int(n))
        for i, n in enumerate(rng.permutation(np.geomspace(2, 1280, 200).astype(int)))
    ]
    limits = np.array(tail_weighted_limits(targets, 8))
    counts = np.array([target.count for target in targets])
    # but for rounding
    assert abs(limits.sum() - sum(even_limits(targets, 8))) <= 0.03 * limits.sum()
    assert 1 <= limits.min() < 8 < limits.max() <= 16
    assert (np.diff(limits[np.argsort(counts)]) <= 0).all()
    assert tail_weighted_limits([Target("a", 7)] * 3, 5) == [5, 5, 5]


def test_random_categories_keep_the_owners():
    categories = [Category("a", "a", owners={0, 1}), Category("b", "b", owners={1})]
    pool = [Category(str(i), f"photo of {i}", f"n{i}") for i in range(50)]
    drawn = with_random_names(categories, pool, 3)
    assert [c.owners for c in drawn] == [{0, 1}, {1}] and len({c.name for c in drawn}) == 2
    assert all(c.query == f"photo of {c.name}" for c in drawn)
    assert drawn == with_random_names(categories, pool, 3) != with_random_names(categories, pool, 4)
    assert not any(category.owners for category in pool)
