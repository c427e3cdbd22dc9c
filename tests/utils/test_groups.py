"""Groups by thresholds and by thirds, against lists written by hand."""

import itertools

import pytest

from fastlt.config import DataConfig, load_config
from fastlt.errors import ConfigError
from fastlt.utils.groups import Grouping, grouping_of

COUNTS = [500, 101, 100, 20, 19, 0]


def test_by_default_groups_are_those_of_the_papers():
    assert Grouping().members(COUNTS) == {"many": [0, 1], "medium": [2, 3], "few": [4, 5]}
    assert DataConfig().grouping == Grouping() == grouping_of({"budget": 50})
    assert Grouping().spans(COUNTS) == {
        "many": "more than 100",
        "medium": "20 to 100",
        "few": "fewer than 20",
    }


def test_thresholds_move_the_groups():
    grouping = DataConfig(many_images=99, few_images=1).grouping
    assert grouping.members(COUNTS) == {"many": [0, 1, 2], "medium": [3, 4], "few": [5]}
    assert grouping.spans(COUNTS)["medium"] == "1 to 99"
    assert grouping_of({"many_images": 99, "few_images": 1, "groups": "count"}) == grouping


@pytest.mark.parametrize(
    ("counts", "sizes"),
    [([1], (1, 0, 0)), ([1, 1], (1, 1, 0)), ([3] * 5, (2, 2, 1)), (list(range(100)), (34, 33, 33))],
)
def test_thirds_hold_all_classes_the_most_frequent_first(counts, sizes):
    members = Grouping("thirds").members(counts)
    assert tuple(map(len, members.values())) == sizes
    assert sorted(itertools.chain(*members.values())) == list(range(len(counts)))
    means = [[counts[target] for target in ids] for ids in members.values() if ids]
    assert all(min(a) >= max(b) for a, b in itertools.pairwise(means))


def test_thirds_are_named_by_the_images_they_hold():
    spans = Grouping("thirds").spans([1500, 30, 4, 9, 9, 7])
    assert spans == {"many": "30 to 1,500", "medium": "9", "few": "4 to 7"}
    assert Grouping("thirds").spans([5, 4])["few"] == "-"


def test_anchors_are_medium_as_the_release_counts_them():
    assert Grouping().anchored([101, 100, 21, 20, 19]) == {1, 2}
    assert Grouping(many_images=50, few_images=19).anchored([101, 50, 20, 19]) == {1, 2}
    assert Grouping("thirds").anchored([9, 300, 20]) == {2}


def test_thresholds_that_cross_are_refused():
    with pytest.raises(ConfigError, match=r"few_images=200 is more than data\.many_images=100"):
        load_config("demo", ["data.few_images=200"])
    assert load_config("demo", ["data.few_images=100"]).data.few_images == 100
