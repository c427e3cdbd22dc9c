import numpy as np
import pytest
import torch

from fastlt_kernels import ClassGraph

PAIRS = [(0, 3), (0, 5), (1, 3), (0, 3)]  # (0, 3) twice; target 2 and auxiliary 4 alone


def rows_of(graph):
    return [
        graph.indices[graph.indptr[y] : graph.indptr[y + 1]].tolist()
        for y in range(graph.num_classes)
    ]


@pytest.mark.parametrize(
    "pairs", [PAIRS, torch.tensor(PAIRS), torch.tensor(PAIRS, dtype=torch.int32), np.array(PAIRS)]
)
def test_from_pairs_holds_both_ways(pairs):
    graph = ClassGraph.from_pairs(3, 6, pairs)
    assert rows_of(graph) == [[3, 5], [3], [], [0, 1], [], [0]]
    assert (graph.num_targets, graph.num_classes, graph.num_pairs, graph.max_degree) == (3, 6, 3, 2)
    assert graph.indptr.dtype == graph.indices.dtype == torch.int64
    assert graph.pairs().tolist() == [[0, 3], [0, 5], [1, 3]]


def test_rows_are_the_given_relation_at_size():
    generator = torch.Generator().manual_seed(0)
    pairs = torch.stack(
        [
            torch.randint(0, 40, (900,), generator=generator),
            torch.randint(40, 300, (900,), generator=generator),
        ],
        1,
    )
    graph = ClassGraph.from_pairs(40, 300, pairs)
    wanted = [set() for _ in range(300)]
    for target, auxiliary in pairs.tolist():
        wanted[target].add(auxiliary)
        wanted[auxiliary].add(target)
    assert rows_of(graph) == [sorted(row) for row in wanted]
    assert graph.max_degree == max(map(len, wanted))
    assert torch.equal(graph.pairs(), pairs.unique(dim=0))


@pytest.mark.parametrize(
    "pairs", [[], np.empty((0, 2), dtype=np.int64), torch.empty(0, 2, dtype=torch.int64)]
)
def test_empty(pairs):
    graph = ClassGraph.from_pairs(3, 3, pairs)
    assert (graph.num_pairs, graph.max_degree, graph.indptr.tolist()) == (0, 0, [0, 0, 0, 0])
    assert graph.pairs().shape == (0, 2)
    columns, real = graph.neighbours(torch.tensor([0, 2]))
    assert columns.shape == real.shape == (2, 0)
    assert graph.directed("target_rows").restricted(torch.ones(3, dtype=torch.bool)).num_pairs == 0


def test_directed():
    graph = ClassGraph.from_pairs(3, 6, PAIRS)
    targets, auxiliaries = graph.directed("target_rows"), graph.directed("aux_rows")
    assert rows_of(targets) == [[3, 5], [3], [], [], [], []]
    assert rows_of(auxiliaries) == [[], [], [], [0, 1], [], [0]]
    for directed in (targets, auxiliaries):
        assert directed.num_pairs == 3
        assert torch.equal(directed.pairs(), graph.pairs())
        assert rows_of(directed.directed("both")) == rows_of(graph)


def test_restricted_keeps_pairs_of_kept_targets_and_the_direction():
    graph = ClassGraph.from_pairs(3, 6, PAIRS)
    keep = torch.tensor([False, True, True])
    assert rows_of(graph.restricted(keep)) == [[], [3], [], [1], [], []]
    assert rows_of(graph.directed("aux_rows").restricted(keep)) == [[], [], [], [1], [], []]
    assert graph.restricted(keep).num_pairs == 1


def test_neighbours_are_padded_with_the_label():
    graph = ClassGraph.from_pairs(3, 6, PAIRS)
    columns, real = graph.neighbours(torch.tensor([0, 5, 2]))
    assert columns.tolist() == [[3, 5], [0, 5], [2, 2]]
    assert real.tolist() == [[True, True], [True, False], [False, False]]


def test_to_moves_the_tensors():
    graph = ClassGraph.from_pairs(3, 6, PAIRS).to("meta")
    assert graph.indptr.device.type == graph.indices.device.type == "meta"
    assert graph.num_pairs == 3


@pytest.mark.parametrize(
    ("targets", "classes", "pairs", "message"),
    [
        ("3", 6, [], "num_targets must be an integer"),
        (3, 6.0, [], "num_classes must be an integer"),
        (0, 3, [], "num_targets"),
        (4, 3, [], "num_classes"),
        (3, 6, [(0, 3, 1)], r"pairs must have shape \(P, 2\)"),
        (3, 6, [0, 3], r"pairs must have shape \(P, 2\)"),
        (3, 6, [(0.0, 3.0)], "pairs must hold integers"),
        (3, 6, [("cat", "dog")], "pairs must be"),
        (3, 6, [(0, 3), (1,)], "pairs must be"),
        (3, 6, [(0, 3), (3, 4)], "pairs: target id 3 in row 1"),
        (3, 6, [(-1, 3)], "pairs: target id -1 in row 0"),
        (3, 6, [(0, 2)], "pairs: auxiliary id 2"),
        (3, 6, [(0, 6)], r"pairs: auxiliary id 6 in row 0 is out of range \(3..5\)"),
        (3, 3, [(0, 3)], "num_classes equals num_targets"),
    ],
)
def test_bad_arguments(targets, classes, pairs, message):
    with pytest.raises(ValueError, match=message):
        ClassGraph.from_pairs(targets, classes, pairs)


def test_bad_direction_and_mask():
    graph = ClassGraph.from_pairs(3, 6, PAIRS)
    with pytest.raises(ValueError, match="direction"):
        graph.directed("sideways")
    with pytest.raises(ValueError, match="keep"):
        graph.restricted(torch.ones(6, dtype=torch.bool))
    with pytest.raises(ValueError, match="keep"):
        graph.restricted(torch.ones(3))
