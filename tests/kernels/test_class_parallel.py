"""The class-parallel loss on 1, 2 and 4 gloo processes, against the reference on all rows and
classes in one.
"""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers.loss_cases import (
    MIXES,
    Case,
    assert_as_exact_as_eager,
    assert_near,
    make_case,
    make_weights,
    reference_of_linear,
)
from helpers.ranks import Ranks
from torch import nn
from torch.nn import functional as F

from fastlt_kernels import (
    ClassGraph,
    ClassParallelLinear,
    class_parallel_loss,
    class_parallel_outputs,
    reference_loss,
    shard_of,
)
from fastlt_kernels._impl import chunks
from fastlt_kernels._impl.class_sampling import draw, sample_size

WORLDS = [1, 2, 4]
SHAPES = [  # N, T, C, D
    (4, 2, 5, 3),  # an empty shard of four
    (8, 4, 10, 4),  # a short one
    (12, 12, 12, 5),  # no auxiliaries
    (8, 100, 1000, 16),
]


@pytest.fixture(scope="module")
def ranks_of(tmp_path_factory):
    """Groups of processes by their number, each started once."""
    folder, started = tmp_path_factory.mktemp("ranks"), {}

    def ranks(world):
        if world not in started:
            started[world] = Ranks(world, folder)
        return started[world]

    yield ranks
    for group in started.values():
        group.close()


every_world = pytest.mark.parametrize("world", WORLDS)


def rows_of(rank, world, count):
    return slice(rank * count // world, (rank + 1) * count // world)


def on_rank(rank, world, case, options, dtype):
    """This rank's part of the case: inputs, target and options."""
    rows, shard = rows_of(rank, world, len(case.target)), shard_of(len(case.weight), rank, world)
    inputs = [
        case.features[rows].to(dtype),
        case.weight[shard].to(dtype),
        case.bias[shard].to(dtype),
    ]
    options = {**case.options, **options}
    for name in ("target_b", "mix", "row_weight"):
        if torch.is_tensor(options.get(name)):
            options[name] = options[name][rows]
    return [t.clone().requires_grad_() for t in inputs], case.target[rows], options


def parallel(rank, world, case, options, dtype, least_classes, autocast=False, seed=None):
    """Loss and gradients of this rank."""
    chunks.LEAST_CLASSES = least_classes
    inputs, target, options = on_rank(rank, world, case, options, dtype)
    features, weight, bias = inputs
    if seed is not None:
        options["generator"] = torch.Generator().manual_seed(seed + rank)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = class_parallel_loss(
            features, weight, target, num_classes=len(case.weight), bias=bias, **options
        )
    rows = factors(len(case.target))[rows_of(rank, world, len(case.target))]
    objective = loss if loss.ndim == 0 else (loss * rows).sum()
    return [loss.detach(), *torch.autograd.grad(objective, inputs)]


def factors(count):
    """What each row of an unreduced loss counts."""
    return torch.arange(1.0, count + 1, dtype=torch.float64) / count


def joined(results):
    """Of all ranks, as if in one process: losses (N,) or (), and the gradients of the mean over
    ranks.
    """
    world = len(results)
    losses, features, weights, biases = zip(*results, strict=True)
    if losses[0].ndim == 0:
        assert all(torch.equal(loss, losses[0]) for loss in losses)
    loss = losses[0] if losses[0].ndim == 0 else torch.cat(losses)
    return [loss, torch.cat(features) / world, torch.cat(weights), torch.cat(biases)]


def wanted(case, options, world, dtype=torch.float64):
    """The same by the reference."""
    inputs = case.inputs(dtype)
    loss = reference_of_linear(case, inputs, **options)
    objective = loss if loss.ndim == 0 else (loss * factors(len(loss))).sum() / world
    return [loss.detach(), *torch.autograd.grad(objective, inputs)]


def check(ranks_of, world, case, least_classes=1024, **options):
    chunk_bytes = options.pop("chunk_bytes", None)
    given = options if chunk_bytes is None else {**options, "chunk_bytes": chunk_bytes}
    got = joined(ranks_of(world).get(parallel, case, given, torch.float64, least_classes))
    assert_near(got, wanted(case, options, world))


@pytest.mark.parametrize("classes", [1, 5, 8, 10, 12, 1000])
@every_world
def test_shards_are_torchs_chunks(world, classes):
    sizes = [len(chunk) for chunk in torch.arange(classes).chunk(world)]
    shards = [shard_of(classes, rank, world) for rank in range(world)]
    assert [len(range(classes)[shard]) for shard in shards] == sizes + [0] * (world - len(sizes))


# every combination on one shape; other shapes with all of them on
COMBINATIONS = [
    (shape, silence, label_smoothing, mix)
    for shape, silence, label_smoothing, mix in itertools.product(
        SHAPES, [0.0, 0.1, 1.0], [0.0, 0.1], MIXES
    )
    if shape == SHAPES[-1] or silence == label_smoothing == 0.1
]


@pytest.mark.parametrize(("shape", "silence", "label_smoothing", "mix"), COMBINATIONS)
@every_world
def test_is_the_reference(ranks_of, world, shape, silence, label_smoothing, mix):
    check(
        ranks_of,
        world,
        make_case(*shape, mix=mix, silence=silence, label_smoothing=label_smoothing),
    )


@pytest.mark.parametrize("chunk_bytes", [1, 3_000, 10**9])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@every_world
def test_chunks_do_not_show(ranks_of, world, reduction, chunk_bytes):
    case = make_case(24, 20, 61, 7, mix="rows", label_smoothing=0.1)
    check(ranks_of, world, case, 5, reduction=reduction, chunk_bytes=chunk_bytes)


@pytest.mark.parametrize("direction", ["target_rows", "aux_rows"])
@every_world
def test_directions(ranks_of, world, direction):
    case = make_case(16, 20, 60, 7, mix="rows", silence=0.0)
    case.options["graph"] = case.options["graph"].directed(direction)
    check(ranks_of, world, case)


@pytest.mark.parametrize("name", ["both-back", "auxiliary-rows-alone", "normal"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@every_world
def test_masks_of_blocks(ranks_of, world, label_smoothing, name):
    case = make_case(16, 20, 60, 7, mix="rows", label_smoothing=label_smoothing)
    case.options["graph"] = case.options["graph"].masked(name)
    check(ranks_of, world, case)
    if not label_smoothing:  # a sample that holds every class
        sampled = {"sample_rate": 0.999}
        got = joined(ranks_of(world).get(parallel, case, sampled, torch.float64, 7, False, 11))
        assert_near(got, wanted(case, {}, world))


@every_world
def test_no_graph_and_no_prior(ranks_of, world):
    check(ranks_of, world, make_case(8, 5, 33, 6, graph=None, log_prior=None, label_smoothing=0.1))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@every_world
def test_ignored_rows(ranks_of, world, reduction):
    """Also all those of one rank."""
    case = make_case(8, 5, 33, 6, mix="rows", label_smoothing=0.1)
    case.target[[0, 1, 5]] = -100
    case.options["target_b"][[0, 1, 6]] = -100
    check(ranks_of, world, case, reduction=reduction)


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@every_world
def test_row_weights(ranks_of, world, reduction, mix):
    """The mean is over the weights of all ranks."""
    case = make_case(8, 5, 33, 6, mix=mix, label_smoothing=0.1)
    case.options["row_weight"] = make_weights(8)
    check(ranks_of, world, case, reduction=reduction)


@every_world
def test_all_weights_zero(ranks_of, world):
    case = make_case(4, 5, 33, 6)
    case.options["row_weight"] = torch.zeros(4)
    for got in ranks_of(world).get(parallel, case, {}, torch.float64, 1024):
        assert all((part == 0).all() for part in got)


@every_world
def test_all_rows_ignored(ranks_of, world):
    case = make_case(4, 5, 33, 6)
    case.target.fill_(-100)
    for got in ranks_of(world).get(parallel, case, {}, torch.float64, 1024):
        assert all((part == 0).all() for part in got)


@every_world
def test_no_rows(ranks_of, world):
    case = make_case(4, 5, 33, 6)
    empty = Case(case.features[:0], case.weight, case.bias, case.target[:0], case.options)
    for got in ranks_of(world).get(parallel, empty, {}, torch.float64, 1024):
        assert all((part == 0).all() for part in got)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@every_world
def test_low_precision(ranks_of, world, dtype, reduction):
    case = make_case(32, 5, 507, 123, mix="scalar", label_smoothing=0.1)
    got = joined(
        ranks_of(world).get(
            parallel, case, {"reduction": reduction, "chunk_bytes": 60_000}, dtype, 64
        )
    )
    assert [g.dtype for g in got] == [torch.float32, dtype, dtype, dtype]
    exact = wanted(case, {"reduction": reduction}, world)
    eager = wanted(case, {"reduction": reduction}, world, dtype)
    # In a mean the errors of eager's rows may cancel by luck: losses are compared row by row.
    skip = int(reduction == "mean")
    assert_as_exact_as_eager(got[skip:], eager[skip:], exact[skip:])


@every_world
def test_autocast(ranks_of, world):
    case = make_case(32, 5, 507, 123, mix="scalar", label_smoothing=0.1)
    options = {"reduction": "none"}
    got = joined(ranks_of(world).get(parallel, case, options, torch.float32, 1024, True))
    assert [g.dtype for g in got] == [torch.float32] * 4
    inputs = case.inputs(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = reference_of_linear(case, inputs, **options)
    eager = [loss.detach(), *torch.autograd.grad((loss * factors(32)).sum() / world, inputs)]
    assert_as_exact_as_eager(got, eager, wanted(case, options, world))


@pytest.mark.parametrize("sample_rate", [1.0, 0.3])
def test_triton(ranks_of, sample_rate):
    """In its interpreter here: a sample's positions and padded rows are the kernels' too."""
    pytest.importorskip("triton")
    case = make_case(4, 4, 60, 5, mix="rows", label_smoothing=0.1, graph=sparse_graph(4, 60))
    options = {"sample_rate": sample_rate, "chunk_bytes": 1}
    triton, torch_ = (
        joined(
            ranks_of(2).get(
                parallel, case, {**options, "backend": backend}, torch.float32, 7, False, 3
            )
        )
        for backend in ("triton", "torch")
    )
    assert_near(triton, [t.double() for t in torch_], 1e-5)


def outputs(rank, world, case, options):
    (features, weight, bias), target, given = on_rank(rank, world, case, options, torch.float32)
    return class_parallel_outputs(
        features, weight, target, num_classes=len(case.weight), bias=bias, **given
    )[1:]


@pytest.mark.parametrize("num_targets", [1, 5, 7, 33])
@every_world
def test_log_sum_and_prediction(ranks_of, world, num_targets):
    case = make_case(8, 5, 33, 6)
    log_sums, best = map(
        torch.cat,
        zip(*ranks_of(world).get(outputs, case, {"num_targets": num_targets}), strict=True),
    )
    logits = case.logits(torch.float64)
    base = logits + case.options["log_prior"]
    label = base.gather(1, case.target[:, None])[:, 0]
    wanted_sum = reference_loss(logits, case.target, **case.options, reduction="none") + label
    assert_near([log_sums], [wanted_sum.detach()], 1e-6)
    assert torch.equal(best, logits[:, :num_targets].argmax(dim=1))


# --- sampled auxiliaries


def sparse_graph(targets, classes):
    """Three auxiliaries for each target, none of two."""
    pairs = [
        (t, targets + (7 * t + i) % (classes - targets)) for t in range(targets) for i in range(3)
    ]
    return ClassGraph.from_pairs(targets, classes, pairs)


def drawn(case, world, sample_rate, seed):
    """Classes and corrections of all ranks, as `parallel` draws them."""
    labels = (
        torch.stack([case.target, case.options["target_b"]])
        if "target_b" in case.options
        else case.target[None]
    )
    classes, corrections = [], []
    for rank in range(world):
        shard, generator = (
            shard_of(len(case.weight), rank, world),
            torch.Generator().manual_seed(seed + rank),
        )
        sample = draw(labels, case.options["graph"], shard, sample_rate, generator, torch.float64)
        classes.append(sample.classes + shard.start)
        corrections.append(sample.correction)
    return torch.cat(classes), torch.cat(corrections)


def restricted(case, classes, corrections):
    """The case as one over the drawn classes alone."""
    graph, place = case.options["graph"], torch.full((len(case.weight),), -1)
    place[classes] = torch.arange(len(classes))
    pairs = place[graph.pairs()]
    options = {
        **case.options,
        "graph": ClassGraph.from_pairs(
            graph.num_targets, len(classes), pairs[(pairs >= 0).all(dim=1)]
        ),
        "log_prior": case.options["log_prior"][classes] + corrections,
    }
    if "target_b" in options:
        options["target_b"] = place[options["target_b"]]
    return Case(
        case.features, case.weight[classes], case.bias[classes], place[case.target], options
    )


@pytest.mark.parametrize("chunk_bytes", [1, 10**9])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("mix", [None, "rows"])
@pytest.mark.parametrize("silence", [0.0, 0.1, 1.0])
@every_world
def test_a_sample_is_the_reference_on_its_classes(
    ranks_of, world, silence, mix, reduction, chunk_bytes
):
    case = make_case(4, 6, 400, 5, mix=mix, silence=silence, graph=sparse_graph(6, 400))
    options = {"sample_rate": 0.2, "reduction": reduction, "chunk_bytes": chunk_bytes}
    got = joined(ranks_of(world).get(parallel, case, options, torch.float64, 7, False, 11))
    classes, corrections = drawn(case, world, 0.2, 11)
    assert len(classes) < 300
    loss, features, weight, bias = wanted(
        restricted(case, classes, corrections), {"reduction": reduction}, world
    )
    full = [
        torch.zeros(400, *part.shape[1:], dtype=part.dtype).index_copy(0, classes, part)
        for part in (weight, bias)
    ]
    assert_near(got, [loss, features, *full])


@every_world
def test_smoothing_of_a_sample_spreads_over_its_classes(ranks_of, world):
    case = make_case(4, 6, 400, 5, label_smoothing=0.1, graph=sparse_graph(6, 400))
    options = {"sample_rate": 0.2, "reduction": "none"}
    got = joined(ranks_of(world).get(parallel, case, options, torch.float64, 1024, False, 11))
    classes, corrections = drawn(case, world, 0.2, 11)
    small = restricted(case, classes, corrections)
    loss, features, weight, _ = wanted(small, {"reduction": "none"}, world)
    # The reference takes the correction as a prior, which smoothing's sum holds too; here only the
    # log-sum-exp does.
    unsilenced = len(classes) - small.options["graph"].indptr.diff()[small.target]
    loss += 0.1 * corrections.sum() / unsilenced
    assert_near([got[0], got[1], got[2][classes]], [loss, features, weight])


@every_world
def test_a_sample_of_all_is_no_sample(ranks_of, world):
    """At rate 1, and where a batch may force every class."""
    case = make_case(8, 5, 60, 6, mix="rows", label_smoothing=0.1)
    plain = ranks_of(world).get(parallel, case, {}, torch.float64, 1024)
    whole = ranks_of(world).get(parallel, case, {"sample_rate": 1.0}, torch.float64, 1024, False, 1)
    forced = ranks_of(world).get(
        parallel, case, {"sample_rate": 0.01}, torch.float64, 1024, False, 1
    )
    for one, other, third in zip(plain, whole, forced, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert_near(third, one, 1e-12)


@pytest.mark.parametrize("sample_rate", [0.001, 0.1, 0.5])
@every_world
def test_targets_labels_and_neighbours_are_always_drawn(world, sample_rate):
    targets, classes = 6, 500
    graph = sparse_graph(targets, classes)
    shards = [shard_of(classes, rank, world) for rank in range(world)]
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(0, classes, (2, 5), generator=generator)
        samples = [
            draw(labels, graph, shard, sample_rate, generator, torch.float64) for shard in shards
        ]
        assert [len(s.classes) for s in samples] == [
            sample_size(shard, graph, sample_rate, 10) for shard in shards
        ]
        found = torch.cat(
            [sample.classes + shard.start for sample, shard in zip(samples, shards, strict=True)]
        )
        neighbours, real = graph.neighbours(labels.flatten())
        assert torch.equal(found, found.unique())
        assert torch.isin(
            torch.cat([torch.arange(targets), labels.flatten(), neighbours[real]]), found
        ).all()
        assert all(torch.isfinite(sample.correction).all() for sample in samples)


@every_world
def test_a_sample_predicts_as_all_classes_do(ranks_of, world):
    """The targets, which reach into other shards than the first, are all drawn."""
    case = make_case(8, 250, 900, 6, graph=sparse_graph(250, 900))
    case.weight[:100] /= 100
    options = {"num_targets": 250, "sample_rate": 0.05}
    _, best = map(torch.cat, zip(*ranks_of(world).get(outputs, case, options), strict=True))
    assert torch.equal(best, case.logits(torch.float64)[:, :250].argmax(dim=1))


def mean_exponentials(rank, world, case, sample_rate, draws):
    generator = torch.Generator().manual_seed(rank)
    options = {"sample_rate": sample_rate, "generator": generator, "num_targets": 0}
    log_sums = [outputs(rank, world, case, options)[0] for _ in range(draws)]
    return torch.stack(log_sums).double().exp().mean(dim=0)


@pytest.mark.slow
def test_the_sum_of_exponentials_is_right_on_average(ranks_of):
    """400 draws of a tenth: their mean has a standard error below 0.8%, and is held to 3%;
    uncorrected it is a tenth.
    """
    case = make_case(4, 4, 600, 3, graph=sparse_graph(4, 600), log_prior=None)
    case.weight /= 4
    case.bias /= 4
    got = torch.cat(ranks_of(2).get(mean_exponentials, case, 0.1, 400))
    label = case.logits(torch.float64).gather(1, case.target[:, None])[:, 0]
    whole = (reference_of_linear(case, case.inputs(torch.float64), reduction="none") + label).exp()
    assert ((got - whole).abs() <= 0.03 * whole).all()


# --- training and checkpoints


def make_backbone():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()


def train(rank, world, case, reduction):
    """Three steps with a backbone under DDP; its parameters, and the head's."""
    backbone = nn.parallel.DistributedDataParallel(make_backbone())
    head = ClassParallelLinear(5, 23, seed=4, dtype=torch.float64)
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.5, momentum=0.9)
    (features, _, _), target, options = on_rank(rank, world, case, {}, torch.float64)
    for _ in range(3):
        optimizer.zero_grad()
        head.loss(
            backbone(features.detach()), target, reduction=reduction, **options
        ).mean().backward()
        optimizer.step()
    return [p.detach() for p in (*backbone.parameters(), *head.parameters())]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@every_world
def test_training_under_ddp_is_training_on_the_whole_batch(ranks_of, world, reduction):
    case = make_case(8, 5, 23, 6, mix="rows", label_smoothing=0.1)
    results = ranks_of(world).get(train, case, reduction)
    backbone, head = make_backbone(), nn.Linear(5, 23).double()
    weight, bias = (
        torch.cat(parts) for parts in zip(*ranks_of(world).get(initial_head, 23, 5), strict=True)
    )
    head.load_state_dict({"weight": weight, "bias": bias})
    optimizer = torch.optim.SGD([*backbone.parameters(), *head.parameters()], lr=0.5, momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        reference_loss(head(backbone(case.features)), case.target, **case.options).backward()
        optimizer.step()
    plain = [p.detach() for p in backbone.parameters()]
    for result in results:
        assert_near(result[:-2], plain)
    assert_near(
        [torch.cat([r[-2] for r in results]), torch.cat([r[-1] for r in results])],
        [head.weight.data, head.bias.data],
    )


def compiled(rank, world, case):
    """The loss and its gradients beside those of a compiled function around it."""
    (features, weight, bias), target, options = on_rank(rank, world, case, {}, torch.float32)

    def step(features):
        return (
            class_parallel_loss(
                features.tanh(), weight, target, num_classes=len(case.weight), bias=bias, **options
            )
            * 2
        )

    losses = [function(features) for function in (step, torch.compile(step, backend="aot_eager"))]
    return [
        [loss.detach(), *torch.autograd.grad(loss, (features, weight, bias))] for loss in losses
    ]


def test_within_a_compiled_function(ranks_of):
    for plain, other in ranks_of(2).get(compiled, make_case(4, 5, 33, 6)):
        assert_near(other, [part.double() for part in plain], 1e-6)


def initial_head(rank, world, classes, width):
    head = ClassParallelLinear(width, classes, seed=4, dtype=torch.float64)
    return head.weight.detach(), head.bias.detach()


@pytest.mark.parametrize("classes", [5, 10, 2500])
def test_initialised_alike_on_any_number_of_ranks(ranks_of, classes):
    one, two, four = (
        torch.cat([w for w, _ in ranks_of(n).get(initial_head, classes, 16)]) for n in WORLDS
    )
    assert one.shape == (classes, 16)
    assert torch.equal(one, two) and torch.equal(one, four)
    assert one.unique().numel() > 0.99 * one.numel()
    assert 0.2 < float(one.abs().max()) <= 0.25
    if classes == 2500:
        assert abs(float(one.std()) - 0.25 / 3**0.5) < 0.002


def all_logits(rank, world, case):
    head = ClassParallelLinear(case.weight.shape[1], len(case.weight), dtype=torch.float64)
    head.load_state_dict({"weight": case.weight, "bias": case.bias})  # of all classes
    return head(case.features[rows_of(rank, world, len(case.target))])


@pytest.mark.parametrize("shape", SHAPES)
@every_world
def test_logits_of_all_classes(ranks_of, world, shape):
    case = make_case(*shape)
    got = torch.cat(ranks_of(world).get(all_logits, case))
    assert_near([got], [F.linear(case.features, case.weight, case.bias)])


def head_and_optimizer(classes, seed):
    """After a step, so that the optimiser has a buffer."""
    head = ClassParallelLinear(3, classes, seed=seed)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9)
    head.loss(torch.ones(2, 3), torch.tensor([0, classes - 1])).backward()
    optimizer.step()
    return head, optimizer.state[head.weight]["momentum_buffer"]


def save(rank, world, classes, path):
    head, momentum = head_and_optimizer(classes, seed=1)
    dcp.save({"head": head.state_dict(), "momentum": head.sharded(momentum)}, checkpoint_id=path)
    return head.weight.detach(), head.bias.detach(), momentum


def load(rank, world, classes, path):
    head, momentum = head_and_optimizer(classes, seed=2)
    state = {"head": head.state_dict(), "momentum": head.sharded(momentum)}
    dcp.load(state, checkpoint_id=path)
    fresh = ClassParallelLinear(3, classes, seed=3)
    fresh.load_state_dict(state["head"])
    return fresh.weight.detach(), fresh.bias.detach(), momentum


@pytest.mark.parametrize("classes", [5, 10])
@pytest.mark.parametrize(
    ("saved_on", "loaded_on"), [(2, 1), (2, 4), (1, 2), (4, 2), (4, 1), (4, 4)]
)
def test_checkpoints_fit_any_number_of_ranks(ranks_of, tmp_path, saved_on, loaded_on, classes):
    saved = ranks_of(saved_on).get(save, classes, str(tmp_path / "checkpoint"))
    loaded = ranks_of(loaded_on).get(load, classes, str(tmp_path / "checkpoint"))
    for one, other in zip(zip(*saved, strict=True), zip(*loaded, strict=True), strict=True):
        assert torch.equal(torch.cat(one), torch.cat(other))


# --- errors


def unequal_rows(rank, world):
    return class_parallel_loss(
        torch.zeros(2 + rank, 3), torch.zeros(3, 3), torch.zeros(2 + rank).long(), num_classes=6
    )


def unequal_reduction(rank, world):
    reduction = "mean" if rank == 0 else "none"
    return class_parallel_loss(
        torch.zeros(2, 3),
        torch.zeros(3, 3),
        torch.zeros(2).long(),
        num_classes=6,
        reduction=reduction,
    )


def bad_target_on_one(rank, world):
    return class_parallel_loss(
        torch.zeros(2, 3), torch.zeros(3, 3), torch.full((2,), 9 * rank), num_classes=6
    )


def whole_weight(rank, world):
    return class_parallel_loss(
        torch.zeros(2, 3), torch.zeros(6, 3), torch.zeros(2).long(), num_classes=6
    )


def sample_without_graph(rank, world):
    return class_parallel_loss(
        torch.zeros(2, 3), torch.zeros(3, 3), torch.zeros(2).long(), num_classes=6, sample_rate=0.5
    )


def sample_of_none(rank, world):
    return class_parallel_loss(
        torch.zeros(2, 3), torch.zeros(3, 3), torch.zeros(2).long(), num_classes=6, sample_rate=0.0
    )


def of_a_wrong_type(rank, world, given):
    given = {"num_classes": 6, "graph": ClassGraph.from_pairs(3, 6, [[0, 3]]), **given}
    return class_parallel_loss(torch.zeros(2, 3), torch.zeros(3, 3), torch.zeros(2).long(), **given)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_classes": "10"}, "num_classes must be an integer, got str"),
        ({"num_classes": -5}, "num_classes must be at least 1, got -5"),
        ({"sample_rate": "a"}, "sample_rate must be a number, got str"),
        ({"sample_rate": 0.5, "generator": 3}, "generator must be a torch.Generator, got int"),
    ],
)
def test_wrong_types_are_errors_on_every_rank(ranks_of, given, message):
    for error in ranks_of(2).run(of_a_wrong_type, given):
        with pytest.raises(ValueError, match=message):
            raise error


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (unequal_rows, r"rows must be the same on every rank, got \[2, 3\]"),
        (unequal_reduction, "reduction must be the same"),
        (bad_target_on_one, "target must be in 0..5|rank 1 was given a wrong argument"),
        (whole_weight, "weight must have 3 rows"),
        (sample_without_graph, "needs a graph"),
        (sample_of_none, "sample_rate must be in"),
    ],
)
def test_wrong_arguments_are_errors_on_every_rank(ranks_of, function, message):
    for error in ranks_of(2).run(function):
        with pytest.raises(ValueError, match=message):
            raise error


def second_derivative(rank, world):
    features = torch.ones(2, 3, requires_grad=True)
    loss = class_parallel_loss(features, torch.ones(3, 3), torch.zeros(2).long(), num_classes=6)
    torch.autograd.grad(loss, features, create_graph=True)


def transformed(rank, world):
    loss = lambda f: class_parallel_loss(f, torch.ones(3, 3), torch.zeros(2).long(), num_classes=6)  # noqa: E731
    torch.func.grad(loss)(torch.ones(2, 3))


@pytest.mark.parametrize(
    ("function", "message"),
    [(second_derivative, "differentiable once"), (transformed, r"torch\.func")],
)
def test_what_autograd_cannot_do_says_so(ranks_of, function, message):
    for error in ranks_of(2).run(function):
        with pytest.raises(RuntimeError, match=message):
            raise error


def test_needs_a_process_group():
    assert not dist.is_initialized()
    with pytest.raises(RuntimeError, match="init_process_group"):
        class_parallel_loss(
            torch.zeros(2, 3), torch.zeros(6, 3), torch.zeros(2).long(), num_classes=6
        )
