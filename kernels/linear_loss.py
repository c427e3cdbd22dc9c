"""Features and classifier weight -> neighbour silencing loss and all gradients, without ever holding N x C logits.

Rows go through in chunks. A chunk's logits become their own gradient in place, and the products with weight and
features follow at once, so for reduction "mean" and "sum" the forward leaves the gradients of the summed loss and the
backward only scales them. For "none" the scale of each row is known in the backward alone, which goes over the chunks again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastlt_kernels.checks import check_chunk_bytes, check_linear, check_loss
from fastlt_kernels.graph import ClassGraph
from fastlt_kernels.labels import accumulation_dtype, stack_labels
from fastlt_kernels.softmax_rows import loss_and_gradient_, silenced_columns

# Measured on AVX-512 at C = 10k and 100k: 64 rows starve the matrix products (1.1 times the time in fp32, 2 in bf16),
# and more than 512 leave the caches and gain nothing.
CPU_CHUNK_ROWS = 512

Gradients = tuple[Tensor, Tensor, Tensor]  # of features, weight and offset; empty where not wanted


def linear_neighbor_silencing_loss(
    features: Tensor,  # (N, D) fp32, fp16, bf16 or fp64
    weight: Tensor,  # (C, D), dtype of features, or any but fp64 under autocast
    target: Tensor,  # (N,) integer class ids
    *,
    bias: Tensor | None = None,  # (C,), as weight
    graph: ClassGraph | None = None,
    log_prior: Tensor | None = None,  # (C,) float
    silence: float = 0.1,
    target_b: Tensor | None = None,  # (N,) integer class ids
    mix: float | Tensor | None = None,  # scalar or (N,)
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    backend: str = "auto",
    chunk_bytes: int = 512 * 2**20,
) -> Tensor:
    """`neighbor_silencing_loss(features @ weight.T + bias, ...)` in bounded memory.

    Temporaries stay within chunk_bytes (but one row is always taken), whatever N and C are, beside a few vectors of N and
    of C. The gradients come on top, those of weight and bias summed in float32 (float64 for float64) and returned in the
    parameter's dtype. Under autocast the products are made in its dtype (float32 for float16 on a CPU). Other arguments,
    the result and the errors are as there. Differentiable once, in features, weight and bias.
    """
    autocast = torch.is_autocast_enabled(features.device.type)
    check_linear(features, weight, bias, autocast)
    check_chunk_bytes(chunk_bytes)
    rows, classes = features.shape[0], weight.shape[0]
    check_loss(
        rows, classes, features.device, target, graph, log_prior, silence, target_b, mix, label_smoothing, reduction, backend
    )
    dtype = accumulation_dtype(features.dtype)
    labels, shares = stack_labels(target, target_b, mix, dtype)
    offset = _offset(bias, log_prior, dtype)
    silencing = graph if graph is not None and graph.max_degree > 0 and silence < 1 else None
    wanted = [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (features, weight, offset)]
    losses = torch.ops.fastlt_kernels.linear_loss(
        features,
        weight,
        offset,
        labels,
        shares,
        silencing.indptr if silencing else None,
        silencing.indices if silencing else None,
        silencing.max_degree if silencing else 0,
        silence,
        label_smoothing,
        _product_dtype(features, autocast),
        chunk_bytes,
        reduction != "none",
        wanted,
    )[0]
    return losses / rows if reduction == "mean" else losses


def _offset(bias: Tensor | None, log_prior: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What is added to every row of products, (C,): its gradient is the bias's."""
    parts = [p.to(dtype) for p in (bias, None if log_prior is None else log_prior.detach()) if p is not None]
    return sum(parts[1:], parts[0]) if parts else None


def _product_dtype(features: Tensor, autocast: bool) -> torch.dtype:
    device = features.device.type
    dtype = torch.get_autocast_dtype(device) if autocast and features.dtype != torch.float64 else features.dtype
    # Measured on AVX-512: fp16 products take 4 to 60 times as long as fp32 ones, and can overflow.
    return torch.float32 if dtype == torch.float16 and device == "cpu" else dtype


class Chunking(NamedTuple):
    """How the work is cut so that the temporaries fit."""

    rows: int  # of features at a time
    classes: int  # of weight at a time where a product needs a temporary
    cast_weight_once: bool  # a whole copy of weight in the dtype of the products fits


def plan_chunks(
    rows: int,
    classes: int,
    width: int,
    slots: int,
    weight_dtype: torch.dtype,
    product: torch.dtype,
    total: torch.dtype,
    on_cpu: bool,
    chunk_bytes: int,
) -> Chunking:
    """slots: silenced columns per row, padded; product and total: dtypes of the matrix products and of the sums."""
    lowered = product != total
    copy_bytes = classes * width * product.itemsize if weight_dtype != product else 0
    cast_once = 0 < copy_bytes <= chunk_bytes // 4
    per_class = width * product.itemsize if copy_bytes > 0 and not cast_once else 0
    per_class += width * (product.itemsize + total.itemsize) if lowered else 0  # a product, widened to be added
    tile = min(classes, max(1, chunk_bytes // 4 // per_class)) if per_class else classes
    left = chunk_bytes - tile * per_class - (copy_bytes if cast_once else 0)
    per_row = classes * (total.itemsize + lowered * product.itemsize)  # logits
    per_row += width * 2 * (product.itemsize + total.itemsize)  # features and, as above, their gradient
    per_row += slots * 13 * total.itemsize  # indices, masks and values of the silenced columns, as measured
    wanted = min(rows, CPU_CHUNK_ROWS) if on_cpu else rows
    return Chunking(max(1, min(wanted, left // per_row)), tile, cast_once)


class Problem(NamedTuple):
    """The arguments that the two operators share, in the order of their schema."""

    features: Tensor  # (N, D)
    weight: Tensor  # (C, D)
    offset: Tensor | None  # (C,) fp32 or fp64
    labels: Tensor  # (L, N) int64
    shares: Tensor  # (L, N) fp32 or fp64
    indptr: Tensor | None
    indices: Tensor | None
    max_degree: int
    silence: float
    label_smoothing: float
    product_dtype: torch.dtype
    chunk_bytes: int


_SHARED_SCHEMA = (
    "Tensor features, Tensor weight, Tensor? offset, Tensor labels, Tensor shares, Tensor? indptr, Tensor? indices, "
    "SymInt max_degree, float silence, float label_smoothing, ScalarType product_dtype, SymInt chunk_bytes"
)


@torch.library.custom_op(
    "fastlt_kernels::linear_loss",
    mutates_args=(),
    schema=f"({_SHARED_SCHEMA}, bool summed, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _linear_loss(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, summed () or per row (N,), and if summed its gradients in features, weight and offset."""
    *shared, summed, wanted = args
    losses, gradients = _run(Problem(*shared), wanted if summed else (False, False, False))
    return losses.sum() if summed else losses, *gradients


@torch.library.custom_op(
    "fastlt_kernels::linear_loss_gradients",
    mutates_args=(),
    schema=f"({_SHARED_SCHEMA}, bool[] wanted) -> (Tensor, Tensor, Tensor)",
)
def _linear_loss_gradients(*args: Any) -> Gradients:
    """The gradients of the sum of shares * loss, shares being whatever each row's loss is to count."""
    *shared, wanted = args
    return _run(Problem(*shared), wanted)[1]


@_linear_loss.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *shared, summed, wanted = args
    problem = Problem(*shared)
    shape = () if summed else problem.labels.shape[1:]
    return problem.shares.new_empty(shape), *_empty_gradients(problem, wanted if summed else (False, False, False))


@_linear_loss_gradients.register_fake
def _(*args: Any) -> Gradients:
    *shared, wanted = args
    return _empty_gradients(Problem(*shared), wanted)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *shared, ctx.summed, ctx.wanted = inputs
    problem = Problem(*shared)
    ctx.dtypes = [problem.features.dtype, problem.weight.dtype, problem.shares.dtype]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    if ctx.summed:
        ctx.save_for_backward(*output[1:])
        return
    ctx.save_for_backward(*problem[:7])
    ctx.options = problem[7:]


@once_differentiable
def _backward(ctx: Any, grad_loss: Tensor | None, *_unused: Any) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (len(Problem._fields) + 2)
    if grad_loss is None:
        return nothing
    if ctx.summed:
        # Out of place: the saved gradients must serve a second backward.
        gradients = [g.to(grad_loss.dtype) * grad_loss for g in ctx.saved_tensors]
    else:
        problem = Problem(*ctx.saved_tensors, *ctx.options)
        problem = problem._replace(shares=problem.shares * grad_loss)
        gradients = torch.ops.fastlt_kernels.linear_loss_gradients(*problem, ctx.wanted)
    returned = [g.to(d) if w else None for g, d, w in zip(gradients, ctx.dtypes, ctx.wanted, strict=True)]
    return *returned, *nothing[3:]


_linear_loss.register_autograd(_backward, setup_context=_setup_context)


def _empty_gradients(problem: Problem, wanted: Sequence[bool]) -> Gradients:
    """Uninitialised; of zero length where not wanted. Those of weight and offset are sums in the dtype of shares."""
    features, weight, shares = problem.features, problem.weight, problem.shares
    return (
        features.new_empty(features.shape if wanted[0] else (0,), dtype=problem.product_dtype),
        shares.new_empty(weight.shape if wanted[1] else (0,)),
        shares.new_empty(weight.shape[:1] if wanted[2] else (0,)),
    )


def _run(problem: Problem, wanted: Sequence[bool]) -> tuple[Tensor, Gradients]:
    """Losses (N,) and the wanted gradients of their sum, chunk by chunk."""
    rows, width = problem.features.shape
    classes, total, product = problem.weight.shape[0], problem.shares.dtype, problem.product_dtype
    plan = plan_chunks(
        rows,
        classes,
        width,
        problem.labels.shape[0] * problem.max_degree,
        problem.weight.dtype,
        product,
        total,
        problem.features.is_cpu,
        problem.chunk_bytes,
    )
    weight = problem.weight.to(product) if plan.cast_weight_once else problem.weight
    losses = problem.shares.new_empty(rows)
    gradients = _empty_gradients(problem, wanted)
    gradients[1].zero_()
    gradients[2].zero_()
    logits = problem.shares.new_empty(plan.rows, classes)
    products = logits if product == total else logits.new_empty(logits.shape, dtype=product)
    # The dtypes of the products are chosen already; autocast must not choose again.
    with torch.no_grad(), torch.autocast(problem.features.device.type, enabled=False):
        for chunk in _slices(rows, plan.rows):
            count = chunk.stop - chunk.start
            losses[chunk] = _run_chunk(problem, chunk, weight, plan.classes, logits[:count], products[:count], gradients, wanted)
    return losses, gradients


def _run_chunk(
    problem: Problem,
    chunk: slice,
    weight: Tensor,
    tile: int,
    logits: Tensor,  # (n, C), dtype of the sums
    products: Tensor,  # the same buffer, or one in the dtype of the products
    gradients: Gradients,
    wanted: Sequence[bool],
) -> Tensor:
    """The losses (n,) of one chunk of rows; writes or adds its part of the gradients."""
    features = problem.features[chunk].to(products.dtype)
    for part in _slices(weight.shape[0], tile):
        torch.mm(features, weight[part].to(products.dtype).T, out=products[:, part])
    if products is not logits:
        logits.copy_(products)
    if problem.offset is not None:
        logits.add_(problem.offset)
    labels = problem.labels[:, chunk]
    silenced = silenced_columns(problem.indptr, problem.indices, problem.max_degree, labels)
    losses = loss_and_gradient_(
        logits, labels, problem.shares[:, chunk], silenced, problem.silence, problem.label_smoothing, any(wanted)
    )
    if any(wanted):
        _add_gradients_(chunk, features, weight, tile, logits, products, gradients, wanted)
    return losses


def _add_gradients_(
    chunk: slice,
    features: Tensor,
    weight: Tensor,
    tile: int,
    logits: Tensor,  # holds the gradient of the logits
    products: Tensor,
    gradients: Gradients,
    wanted: Sequence[bool],
) -> None:
    if wanted[2]:
        gradients[2].add_(logits.sum(dim=0))
    if products is not logits:
        products.copy_(logits)
    of_features = logits.new_zeros(features.shape) if wanted[0] else None
    for part in _slices(weight.shape[0], tile):
        if of_features is not None:
            _add_product_(of_features, products[:, part], weight[part].to(products.dtype))
        if wanted[1]:
            _add_product_(gradients[1][part], products[:, part].T, features)
    if of_features is not None:
        gradients[0][chunk] = of_features


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, summed in the dtype of total, which may be wider than that of the product."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(left @ right)


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
