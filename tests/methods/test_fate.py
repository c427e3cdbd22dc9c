"""The class graph, held to the dense formula, and to what it is for: rows of unseen classes."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from fastlt.classes import ClassSpace
from fastlt.config import load_config
from fastlt.errors import UserError
from fastlt.losses import Task
from fastlt.methods import method_settings, method_type
from fastlt.methods.fate import Method, Nodes, RowGraph, links_of, propagated, with_one
from fastlt.methods.method import StageData
from fastlt.models.classifier import Classifier, build_model
from fastlt.models.heads import CosineHead, LinearHead

CPU = torch.device("cpu")


def config_of(*settings):
    return load_config("cifar100-siblings", settings, method_settings("fate", None))


def space_of(counts, pairs=((0, 3),), auxiliaries=1):
    names = [f"c{i}" for i in range(len(counts))]
    cut = len(counts) - auxiliaries
    return ClassSpace(names[:cut], names[cut:], list(counts), list(pairs), {})


def method_of(counts, *settings, width=6):
    config = config_of("loss.name=ce", "loss.label_smoothing=0", *settings)
    torch.manual_seed(len(counts))
    model = Classifier(torch.nn.Identity(), LinearHead(width, len(counts)))
    torch.nn.init.normal_(model.head.bias)
    space = SimpleNamespace(
        num_targets=len(counts) - 1,
        num_classes=len(counts),
        train_counts=list(counts),
        graph=lambda: None,
    )
    task = Task(space, torch.tensor(counts), config.loss, 3, CPU)
    return Method(config.method, model, task), task


def data_of(counts, width=6, spread=0.3):
    generator = torch.Generator().manual_seed(sum(counts))
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=generator)]
    centres = torch.randn(len(counts), width, generator=generator)
    features = centres[labels] + spread * torch.randn(len(labels), width, generator=generator)
    return StageData(labels, lambda: features), features


def test_a_convolution_is_the_dense_formula():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    start, end = torch.tensor([2, 3, 3, 4, 5, 5]), torch.tensor([0, 0, 1, 1, 0, 1])
    weight = torch.tensor([1.0, 1, 0, 1, 1, 0.5], dtype=torch.float64)
    adjacency = torch.eye(6, dtype=torch.float64)
    for s, e, w in zip(start, end, weight, strict=True):
        adjacency[s, e] += w
        adjacency[e, s] += w
    root = adjacency.sum(dim=1).rsqrt().diag()
    expected = root @ adjacency @ root @ x
    torch.testing.assert_close(propagated(x, start, end, weight), expected, rtol=1e-6, atol=1e-6)


def test_layers_are_convolutions_without_anything_between():
    torch.manual_seed(0)
    graph = RowGraph(4, 3)
    rows, values = torch.randn(3, 4), torch.randn(5, 4)
    linked = torch.tensor([[0, 1], [1, 2], [2, 0], [0, 2], [1, 0]])
    keep = torch.tensor([[1.0, 0], [1, 1], [0, 1], [1, 1], [1, 1]])
    nodes = Nodes(values, linked, torch.tensor([1.0, 1, 1, 0, 1]))
    adjacency = torch.eye(8)
    for i in range(5):
        for j in range(2):
            edge = keep[i, j] * nodes.weight[i]
            adjacency[3 + i, linked[i, j]] += edge
            adjacency[linked[i, j], 3 + i] += edge
    root = adjacency.sum(dim=1).rsqrt().diag()
    x = torch.cat([rows, graph.project(values)])
    for layer in graph.layers:
        x = root @ adjacency @ root @ x @ layer.weight.T + layer.bias
    torch.testing.assert_close(graph(rows, nodes, keep), x[:3])


def test_images_are_linked_to_their_class_and_to_the_nearest_means():
    means = torch.tensor([[0.0, 1], [1, 1], [5, 1], [9, 1]])
    values = torch.tensor([[0.9, 1.0], [4.0, 1.0]])
    assert links_of(values, torch.tensor([1, 3]), means, 2).tolist() == [[1, 0, 2], [3, 2, 1]]
    few = links_of(values, torch.tensor([1, 3]), means[:2], 5)
    assert few.shape == (2, 2)  # a class that is new is linked to all that are known


def test_nodes_are_a_few_images_of_each_class_and_the_means_of_all():
    counts = [9, 2, 4, 0]
    method, task = method_of(counts, "method.shots=3")
    data, features = data_of(counts)
    method.enter_stage(1, task)
    method.start_stage(data)
    assert method.weight.tolist() == [[1, 1, 1], [1, 1, 0], [1, 1, 1], [0, 0, 0]]
    for label in (0, 1, 2):
        own = with_one(features[data.labels == label])
        torch.testing.assert_close(method.means[label], own.mean(dim=0))
        shown = min(3, counts[label])
        assert torch.equal(method.values[label, :shown], own[:shown])
    assert method.nodes().values.shape == (12, 7) and method.nodes().linked.shape == (12, 3)


def started(counts, *settings, epochs=0, width=6, spread=0.3):
    """Return a method in the stage of its graph, trained there for some steps."""
    method, task = method_of(counts, *settings, width=width)
    data, features = data_of(counts, width, spread)
    with torch.no_grad():  # rows as a head has them that was trained
        for label in range(len(counts)):
            own = features[data.labels == label]
            method.model.head.weight[label] = 3 * F.normalize(own.mean(dim=0), dim=0)
        method.model.head.bias.zero_()
    method.enter_stage(1, task)
    method.start_stage(data)
    optimiser = torch.optim.AdamW(method.graph.parameters(), 3e-3, weight_decay=0)
    for _ in range(epochs):
        optimiser.zero_grad()
        method(features, data.labels).loss.backward()
        optimiser.step()
    return method, data, features


def test_folds_are_disjoint_and_hide_every_class_once(monkeypatch):
    method, data, features = started([8] * 7, "method.folds=3")
    seen = []
    predicted = method.predicted
    monkeypatch.setattr(
        method, "predicted", lambda *given: (seen.append(given[1]), predicted(*given))[1]
    )
    method(features, data.labels)
    assert torch.stack(seen).sum(dim=0).tolist() == [1] * 7
    assert sorted(part.sum().item() for part in seen) == [2, 2, 3]


def test_without_a_hidden_class_the_rows_are_the_heads_to_the_bit():
    method, _, features = started([8] * 5)
    nodes, rows = method.nodes(), method.rows()
    none = torch.zeros(5, dtype=torch.bool)
    same = method.predicted(rows, none, torch.ones(nodes.linked.shape), nodes)
    assert torch.equal(same, rows)
    expected = method.model.head(features)
    torch.testing.assert_close(with_one(features) @ same.T, expected)


def test_a_hidden_class_gives_nothing_of_its_row_away():
    method, *_ = started([8] * 5)
    nodes, rows = method.nodes(), method.rows()
    hidden = torch.tensor([False, True, False, False, True])
    every = torch.ones(nodes.linked.shape)
    one = method.predicted(rows, hidden, every, nodes)
    other = method.predicted(rows + 9 * hidden[:, None], hidden, every, nodes)
    assert torch.equal(one[hidden], other[hidden])
    assert torch.equal(one[~hidden], rows[~hidden]) and not torch.equal(one[hidden], rows[hidden])


def test_the_loss_is_that_of_mixed_rows_over_all_folds():
    method, data, features = started([8, 5, 7, 4], "method.folds=2", "method.keep_edges=1")
    torch.manual_seed(5)
    step = method(features, data.labels)
    torch.manual_seed(5)
    order = torch.rand(4).argsort()
    nodes, losses = method.nodes(), []
    for fold in range(2):
        hidden = order % 2 == fold
        mixed = method.predicted(method.rows(), hidden, torch.ones(nodes.linked.shape), nodes)
        logits = features @ mixed[:, :-1].T + mixed[:, -1]
        losses.append(F.cross_entropy(logits, data.labels))
    torch.testing.assert_close(step.loss, sum(losses) / 2)
    step.loss.backward()
    assert all(parameter.grad is not None for parameter in method.graph.parameters())
    assert method.model.head.weight.grad is None


def test_the_graph_stands_still_until_the_last_fold():
    method, data, features = started([8] * 6, "method.folds=3")
    seen, graph = [], method.graph.forward

    def noting(*given):
        seen.append([parameter.detach().clone() for parameter in method.graph.parameters()])
        return graph(*given)

    method.graph.forward = noting
    optimiser = torch.optim.SGD(method.graph.parameters(), 1.0)
    method(features, data.labels).loss.backward()
    optimiser.step()
    method(features, data.labels)
    first, second = seen[:3], seen[3:]
    for step in (first, second):
        assert all(torch.equal(a, b) for fold in step for a, b in zip(fold, step[0], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first[0], second[0], strict=True))


def test_dropped_edges_are_as_many_as_asked():
    method, data, features = started([8] * 6, "method.keep_edges=0.3", "method.folds=40")
    kept = []
    graph = method.graph.forward
    method.graph.forward = lambda rows, nodes, keep: (kept.append(keep), graph(rows, nodes, keep))[
        1
    ]
    method(features, data.labels)
    share = torch.stack(kept).mean().item()
    assert 0.27 < share < 0.33 and not torch.equal(kept[0], kept[1])


def test_kappa_of_nothing_leaves_the_head_as_it_was():
    counts = [30, 8, 2, 5]
    method, *_ = started(counts, "method.kappa=0")
    head = method.predictor().head
    assert torch.equal(head.weight, method.model.head.weight)
    assert torch.equal(head.bias, method.model.head.bias)


def test_a_predicted_row_counts_by_the_images_of_its_class():
    counts = [30, 8, 2, 5]
    method, *_ = started(counts, "method.kappa=20", "method.folds=2")
    nodes, rows = method.nodes(), method.rows()
    every = torch.ones(nodes.linked.shape)
    head = method.predictor().head
    found = torch.cat([head.weight, head.bias[:, None]], dim=1)
    for label, count in enumerate(counts):
        hidden = torch.arange(4) % 2 == label % 2
        predicted = method.predicted(rows, hidden, every, nodes)[label]
        share = 20 / (20 + count)
        expected = (1 - share) * rows[label] + share * predicted
        torch.testing.assert_close(found[label], expected)


def test_new_classes_permute_with_their_labels_and_leave_others_alone():
    method, *_ = started([8] * 5, epochs=5)
    few = torch.randn(6, 6)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    rows = method.new_rows(few, labels, 3)
    place = torch.tensor([2, 0, 1])
    permuted = method.new_rows(few, place[labels], 3)
    torch.testing.assert_close(permuted[place], rows)
    before = method.rows()
    assert rows.shape == (3, 7) and torch.equal(method.rows(), before)


def test_rows_of_unseen_classes_beat_the_mean_row_and_random_rows():
    """Ten classes are never trained; the graph gives their rows from five images each."""
    torch.manual_seed(0)
    centres = torch.randn(30, 16)
    method, task = method_of([12] * 20, "method.shots=5", width=16)
    labels = torch.arange(20).repeat_interleave(12)
    features = centres[labels] + 0.5 * torch.randn(len(labels), 16)
    with torch.no_grad():
        method.model.head.weight.copy_(2 * centres[:20])
        method.model.head.bias.copy_(-centres[:20].square().sum(dim=1))
    method.enter_stage(1, task)
    method.start_stage(StageData(labels, lambda: features))
    optimiser = torch.optim.AdamW(method.graph.parameters(), 3e-3, weight_decay=0)
    for _ in range(150):
        optimiser.zero_grad()
        method(features, labels).loss.backward()
        optimiser.step()
    few = torch.arange(10).repeat_interleave(5)
    shown = centres[20 + few] + 0.5 * torch.randn(50, 16)
    tested = torch.arange(10).repeat_interleave(40)
    unseen = centres[20 + tested] + 0.5 * torch.randn(400, 16)

    def accuracy(rows):
        return ((with_one(unseen) @ rows.T).argmax(dim=1) == tested).float().mean().item()

    mean = method.rows().mean(dim=0).expand(10, -1) + 1e-3 * torch.randn(10, 17)
    random = method.rows().std() * torch.randn(10, 17)
    found = accuracy(method.new_rows(shown, few, 10))
    assert found > 0.6 and found > 2 * max(accuracy(mean), accuracy(random))


def test_only_the_graph_is_trained_in_its_stage_and_only_a_linear_head_will_do():
    method, _ = method_of([4, 4, 4])
    first, second = method.stages()
    assert first.trained == ("model.",) and second.trained == ("graph.",) and second.features
    config = config_of("model.name=resnet8")
    model = build_model(config.model, 3, 32)
    with pytest.raises(UserError, match=r"fate needs rows of a linear head"):
        Method(config.method, Classifier(model.backbone, CosineHead(64, 3, 9.0)), method.task)
    assert method_type("fate") is Method


def test_there_are_at_most_as_many_folds_as_classes():
    method, _ = method_of([4, 4, 4], "method.folds=1000")
    assert method.folds == len(method.rows())
