"""The contenders of `fastlt bench-loss`, and the problems with a real task's silencing.

Two families. "logits": logits (N, C) -> loss and their gradient. "linear": features (N, D) and
weight (C, D) -> loss and the gradients of both. The peers know no silencing; what they solve is
plain cross entropy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlt_benchmarks.timing import copies_beyond_cache, free_bytes
from fastlt_kernels import (
    ClassGraph,
    linear_neighbor_silencing_loss,
    neighbor_silencing_loss,
    reference_loss,
)

SILENCE = 0.1
AUXILIARIES_PER_TARGET = 8  # the most that the release has
PAIRS_PER_AUXILIARY = 6851 / 5012  # ImageNet-LT
ROW_WEIGHT = 2.0
IMBALANCE = 100  # images of the most frequent target over those of the rarest

# Largest relative error of loss and gradients on the small problem. bfloat16 keeps 8 bits; leaving
# the silencing out is 4% of that loss and more of the gradient. float32 leaves room for a peer's
# TF32.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}


class Size(NamedTuple):
    """The size of a problem; logits have no width."""

    family: str  # "logits" or "linear"
    rows: int
    classes: int
    width: int | None  # None for logits

    def __str__(self) -> str:
        return f"{self.family}: N={self.rows:,}, C={self.classes:,}" + (
            f", D={self.width:,}" if self.width else ""
        )


class Inputs(NamedTuple):
    """The tensors that a pass begins with."""

    leaves: tuple[Tensor, ...]  # logits (N, C), or features (N, D) and weight (C, D)
    target: Tensor  # (N,) int64


@dataclass
class Problem:
    """A problem: graph, prior, labels and inputs."""

    size: Size
    dtype: torch.dtype
    device: torch.device
    graph: ClassGraph
    log_prior: Tensor  # (C,) fp32
    copies: list[Inputs]  # taken in turn


class Prepared(NamedTuple):
    """A contender that is ready for a problem."""

    loss: Callable[[Inputs], Tensor]
    state: tuple[Tensor, ...] = ()  # what it keeps beside the inputs: a table of neighbours, a mask


@dataclass(frozen=True)
class Contender:
    """A loss that takes part."""

    name: str  # ends in its family
    what: str
    silences: bool
    prepare: Callable[[Problem], Prepared]
    is_compiled: bool = False
    overwrites_logits: bool = False

    @property
    def family(self) -> str:
        """The family: logits or linear."""
        return self.name.rpartition("-")[2]


class Unavailable(Exception):
    """A contender that cannot run here, and why.

    Where memory is the reason it says how much it would need.
    """

    def __init__(self, reason: str, needs_bytes: int | None = None):
        super().__init__(reason)
        self.needs_bytes = needs_bytes


def make_problem(size: Size, dtype: torch.dtype, device: torch.device) -> Problem:
    """Return the same problem for the same arguments.

    Logits are standard normal, or come out so.
    """
    generator = torch.Generator(device).manual_seed(0)
    graph = make_graph(size.classes, device, generator)
    nbytes = sum(math.prod(shape) for shape in leaf_shapes(size)) * dtype.itemsize
    copies = [
        draw_inputs(size, dtype, device, generator)
        for _ in range(copies_beyond_cache(nbytes, device))
    ]
    return Problem(size, dtype, device, graph, make_log_prior(graph), copies)


def make_graph(classes: int, device: torch.device, generator: torch.Generator) -> ClassGraph:
    """Return a graph in which a sixth are targets with at most 8 auxiliaries each.

    An auxiliary has one owner or two, 1.37 on average.
    """
    targets = math.ceil(classes / 6)
    auxiliaries = classes - targets
    slots = AUXILIARIES_PER_TARGET * targets
    pairs = round(auxiliaries * PAIRS_PER_AUXILIARY)
    owner = (
        torch.randperm(slots, generator=generator, device=device)[:pairs] // AUXILIARIES_PER_TARGET
    )
    again = torch.randperm(auxiliaries, generator=generator, device=device)[: pairs - auxiliaries]
    owned = torch.cat([torch.arange(auxiliaries, device=device), again])
    return ClassGraph.from_pairs(targets, classes, torch.stack([owner, targets + owned], dim=1))


def make_log_prior(graph: ClassGraph) -> Tensor:
    """Return the log of a long tail over the targets, (C,).

    It goes from 500 images down to 5, with 50 of each auxiliary.
    """
    place = torch.arange(graph.num_targets, device=graph.indptr.device) / max(
        1, graph.num_targets - 1
    )
    auxiliary = torch.full((graph.num_classes - graph.num_targets,), 50.0, device=place.device)
    return torch.cat([500 * IMBALANCE**-place, auxiliary]).log().log_softmax(dim=0)


def leaf_shapes(size: Size) -> list[tuple[int, int]]:
    """Return the shapes of the tensors that get gradients."""
    if size.width is None:
        return [(size.rows, size.classes)]
    return [(size.rows, size.width), (size.classes, size.width)]


def draw_inputs(
    size: Size, dtype: torch.dtype, device: torch.device, generator: torch.Generator
) -> Inputs:
    """Return random inputs."""
    leaves = [
        torch.randn(shape, dtype=dtype, device=device, generator=generator)
        for shape in leaf_shapes(size)
    ]
    if size.width is not None:
        leaves[1] *= size.width**-0.5
    target = torch.randint(0, size.classes, (size.rows,), device=device, generator=generator)
    return Inputs(tuple(leaf.requires_grad_() for leaf in leaves), target)


def restore(inputs: Inputs) -> None:
    """Draw new logits after a contender that left its gradient in their place."""
    inputs.leaves[0].detach().normal_()


def fault(contender: Contender, dtype: torch.dtype, device: torch.device) -> str:
    """Return how loss or gradients are wrong on a small problem, "" where they are right.

    They are held to the specification in float64.
    """
    problem = make_problem(
        Size(contender.family, 64, 24, 64 if contender.family == "linear" else None), dtype, device
    )
    inputs = problem.copies[0]
    wanted = exact(problem, inputs, contender.silences)
    loss = contender.prepare(problem).loss(inputs)
    got = [loss.detach(), *torch.autograd.grad(loss, inputs.leaves)]
    errors = [float((g.double() - w).norm() / w.norm()) for g, w in zip(got, wanted, strict=True)]
    names = [
        "loss",
        *(
            f"gradient of {name}"
            for name in (["logits"] if problem.size.width is None else ["features", "weight"])
        ),
    ]
    wrong = [
        f"{name} is off by {error:.1%}"
        for name, error in zip(names, errors, strict=True)
        if not error <= TOLERANCE[dtype]
    ]
    return ", ".join(wrong)


def exact(problem: Problem, inputs: Inputs, silences: bool) -> list[Tensor]:
    """Return loss and gradients in float64."""
    leaves = [leaf.detach().double().requires_grad_() for leaf in inputs.leaves]
    logits = leaves[0] if len(leaves) == 1 else F.linear(*leaves)
    graph, log_prior = (problem.graph, problem.log_prior) if silences else (None, None)
    loss = reference_loss(logits, inputs.target, graph=graph, log_prior=log_prior, silence=SILENCE)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


# ---- who solves them


def ours(problem: Problem, weighted: bool = False) -> Prepared:
    """Return fastlt's own loss, with weights of rows or without."""
    function = (
        neighbor_silencing_loss if problem.size.width is None else linear_neighbor_silencing_loss
    )
    loss = partial(function, graph=problem.graph, log_prior=problem.log_prior, silence=SILENCE)
    kept = problem.graph.indptr, problem.graph.indices
    if not weighted:
        return Prepared(lambda inputs: loss(*inputs.leaves, inputs.target), kept)
    # all alike, so that the mean is that of the others; no value costs less than another
    weights = torch.full((problem.size.rows,), ROW_WEIGHT, device=problem.device)
    return Prepared(
        lambda inputs: loss(*inputs.leaves, inputs.target, row_weight=weights),
        (*kept, weights),
    )


def masked(problem: Problem, compiled: bool = False) -> Prepared:
    """Return the loss by a mask of each row."""
    table, _ = problem.graph.neighbours(torch.arange(problem.size.classes, device=problem.device))
    function = one_of(problem, mask_logits, mask_linear, compiled)
    return Prepared(
        lambda inputs: function(*inputs.leaves, inputs.target, table, problem.log_prior), (table,)
    )


def one_of(
    problem: Problem,
    on_logits: Callable[..., Tensor],
    on_features: Callable[..., Tensor],
    compiled: bool,
) -> Callable[..., Tensor]:
    """Return the function of the problem's family."""
    function = on_logits if problem.size.width is None else on_features
    return torch.compile(function, dynamic=False) if compiled else function


def mask_logits(logits: Tensor, target: Tensor, table: Tensor, log_prior: Tensor) -> Tensor:
    """Return the loss on logits. table (C, K): the neighbours of every class.

    It is padded with the class itself.
    """
    mask = torch.zeros(logits.shape, dtype=torch.bool, device=logits.device)
    mask.scatter_(1, table[target], True).scatter_(1, target[:, None], False)
    return F.cross_entropy(
        torch.add(logits.float() + log_prior, mask, alpha=math.log(SILENCE)), target
    )


def mask_linear(
    features: Tensor, weight: Tensor, target: Tensor, table: Tensor, log_prior: Tensor
) -> Tensor:
    """Return the loss on features and weight."""
    return mask_logits(F.linear(features, weight), target, table, log_prior)


def release(problem: Problem) -> Prepared:
    """Return the loss of the paper's release.

    It has a dense (C, C) mask of 1 and silence, whose rows are taken by label.
    """
    classes, graph = problem.size.classes, problem.graph
    needed = 4 * classes * classes
    if needed > free_bytes(problem.device):
        raise Unavailable("its dense C x C mask does not fit", needed)
    mask = torch.ones(classes, classes, device=problem.device)
    mask[
        torch.repeat_interleave(torch.arange(classes, device=problem.device), graph.indptr.diff()),
        graph.indices,
    ] = SILENCE

    def loss(inputs: Inputs) -> Tensor:
        logits = F.linear(*inputs.leaves).float() + problem.log_prior
        weighed = logits.exp() * mask[inputs.target]
        return (weighed.sum(dim=1).log() - logits.gather(1, inputs.target[:, None])[:, 0]).mean()

    return Prepared(loss, (mask,))


def plain(problem: Problem, compiled: bool = False) -> Prepared:
    """Return cross entropy without silencing."""
    function = one_of(problem, plain_logits, plain_linear, compiled)
    return Prepared(lambda inputs: function(*inputs.leaves, inputs.target))


def plain_logits(logits: Tensor, target: Tensor) -> Tensor:
    """Return cross entropy on logits."""
    return F.cross_entropy(logits.float(), target)


def plain_linear(features: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Return cross entropy on features and weight."""
    return plain_logits(F.linear(features, weight), target)


def torch_linear(problem: Problem) -> Prepared:
    """Return torch's own linear cross entropy."""
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable("needs torch 2.13")
    # without options it is F.linear and F.cross_entropy
    options = torch.nn.LinearCrossEntropyOptions()
    return Prepared(
        lambda inputs: F.linear_cross_entropy(
            inputs.leaves[0], inputs.leaves[1], inputs.target, options=options
        )
    )


def liger(problem: Problem) -> Prepared:
    """Return Liger's linear cross entropy."""
    if problem.device.type != "cuda":
        raise Unavailable("needs a GPU")
    try:
        from liger_kernel.transformers import (
            LigerCrossEntropyLoss,
            LigerFusedLinearCrossEntropyLoss,
        )
    except ImportError as error:
        raise Unavailable(not_installed(error)) from error
    if problem.size.width is None:
        on_logits = LigerCrossEntropyLoss()
        return Prepared(lambda inputs: on_logits(*inputs.leaves, inputs.target))
    fused = LigerFusedLinearCrossEntropyLoss()
    return Prepared(lambda inputs: fused(inputs.leaves[1], inputs.leaves[0], inputs.target))


def cce(problem: Problem) -> Prepared:
    """Return the linear cross entropy of cut-cross-entropy."""
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError as error:
        raise Unavailable(not_installed(error)) from error
    implementation = "cce" if problem.device.type == "cuda" else "torch_compile"
    return Prepared(
        lambda inputs: linear_cross_entropy(*inputs.leaves, inputs.target, impl=implementation)
    )


def not_installed(error: ImportError) -> str:
    """Return why an import failed, in words."""
    return f"not installed ({error}): pip install 'fastlt[bench]'"


def all_contenders(device: torch.device) -> list[Contender]:
    """Return the contenders, those that silence first in each family."""
    on_gpu = device.type == "cuda"
    cce_is = (
        "Cut Cross-Entropy, its gradient filtered"
        if on_gpu
        else "Cut Cross-Entropy's form for torch.compile"
    )
    return [
        Contender("ours-logits", "neighbor_silencing_loss", True, ours),
        Contender(
            "ours-weighted-logits", "the same with row_weight", True, partial(ours, weighted=True)
        ),
        Contender("mask-logits", "eager PyTorch with a dense N x C mask", True, masked),
        Contender(
            "mask-compiled-logits",
            "torch.compile of it",
            True,
            partial(masked, compiled=True),
            is_compiled=True,
        ),
        Contender("plain-logits", "F.cross_entropy", False, plain),
        Contender(
            "plain-compiled-logits",
            "torch.compile of it",
            False,
            partial(plain, compiled=True),
            is_compiled=True,
        ),
        Contender("liger-logits", "LigerCrossEntropyLoss", False, liger, overwrites_logits=True),
        Contender("ours-linear", "linear_neighbor_silencing_loss", True, ours),
        Contender(
            "ours-weighted-linear", "the same with row_weight", True, partial(ours, weighted=True)
        ),
        Contender("mask-linear", "F.linear, then mask-logits", True, masked),
        Contender(
            "mask-compiled-linear",
            "torch.compile of it",
            True,
            partial(masked, compiled=True),
            is_compiled=True,
        ),
        Contender(
            "release-linear", "F.linear, exp, a dense C x C mask's rows, sum, log", True, release
        ),
        Contender("plain-linear", "F.linear, then F.cross_entropy", False, plain),
        Contender(
            "plain-compiled-linear",
            "torch.compile of it",
            False,
            partial(plain, compiled=True),
            is_compiled=True,
        ),
        Contender("torch-linear", "F.linear_cross_entropy, in chunks", False, torch_linear),
        Contender("liger-linear", "LigerFusedLinearCrossEntropyLoss", False, liger),
        Contender("cce-linear", cce_is, False, cce, is_compiled=not on_gpu),
    ]
