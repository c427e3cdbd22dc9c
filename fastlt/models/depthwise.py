"""Depthwise convolutions on a CPU whose weights' gradient is quick where maps are smaller than the
kernel.

There oneDNN takes far longer for it than for the forward pass: most of a step of an EfficientNet on
small images. `python -m fastlt_benchmarks.depthwise` measures both ways.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Pair = tuple[int, int]


class DepthwiseConvolution(torch.autograd.Function):
    """A convolution (N, C, H, W) by kernels (C, 1, kh, kw), each of one channel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: Pair, padding: Pair) -> Tensor:
        """Return the maps (N, C, h, w)."""
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, None, stride, padding, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Return the gradients of x and weight."""
        x, weight = ctx.saved_tensors
        gradient, of_x = gradients[0], None
        if ctx.needs_input_grad[0]:
            of_x = torch.ops.aten.convolution_backward(
                gradient,
                x,
                weight,
                None,
                ctx.stride,
                ctx.padding,
                (1, 1),
                False,
                (0, 0),
                len(weight),
                [True, False, False],
            )[0]
        return of_x, weight_gradient(gradient, x, weight, ctx.stride, ctx.padding), None, None


def weight_gradient(
    gradient: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair
) -> Tensor:
    """Return the gradient (C, 1, kh, kw) of the kernels: for each place in them a product of maps.

    gradient (N, C, h, w): of the result; x (N, C, H, W).
    """
    found = torch.zeros_like(weight)
    x, gradient = x.permute(0, 2, 3, 1), gradient.permute(0, 2, 3, 1)  # as they lie in memory
    sides = list(zip(x.shape[1:3], gradient.shape[1:3], stride, padding, strict=True))
    for row in range(weight.shape[2]):
        for column in range(weight.shape[3]):
            spans = [span(at, *side) for at, side in zip((row, column), sides, strict=True)]
            if any(stop <= start for (start, stop), _ in spans):
                continue
            (outer, seen), (across, seen_across) = (
                (slice(*given), slice(*taken)) for given, taken in spans
            )
            products = gradient[:, outer, across] * x[:, seen, seen_across]
            found[:, 0, row, column] = products.sum(dim=(0, 1, 2))
    return found


def span(
    at: int, side: int, result: int, stride: int, padding: int
) -> tuple[Pair, tuple[int, int, int]]:
    """Return which of `result` places a place `at` of the kernel falls on one of `side` for, from
    and to, and on which, from, to and in steps.
    """
    start = max(0, -(-(padding - at) // stride))
    stop = min(result, (side - 1 + padding - at) // stride + 1)
    first = start * stride + at - padding
    return (start, stop), (first, first + (stop - start - 1) * stride + 1, stride)


def is_slow(layer: Any, x: Tensor) -> bool:
    """Return whether the gradient of a layer's weight would be slow for an input."""
    if not torch.is_grad_enabled() or not layer.weight.requires_grad or x.dtype != torch.float32:
        return False
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    pads_itself = type(layer).__name__.endswith("Same")
    results = (
        -(-side // step) if pads_itself else (side + 2 * pad - kernel) // step + 1
        for side, pad, kernel, step in zip(
            x.shape[2:], layer.padding, layer.kernel_size, layer.stride, strict=True
        )
    )
    return min(results) < min(layer.kernel_size)


def quicken(model: nn.Module) -> None:
    """Let the depthwise convolutions of a model take the quick way where it is one.

    Names and values of tensors stay.
    """
    for module in model.modules():
        layer: Any = module
        kind: Any = type(module)
        if (
            isinstance(module, nn.Conv2d)
            and kind.__name__ in ("Conv2d", "Conv2dSame")
            and module.groups == module.in_channels == module.out_channels > 1
            and module.bias is None
            and module.dilation == (1, 1)
            and module.padding_mode == "zeros"
            and not isinstance(module.padding, str)
        ):
            layer.__class__ = quick(kind)


@cache
def quick(kind: type[nn.Conv2d]) -> type[nn.Conv2d]:
    """Return a kind of convolution, of torch or timm's with padding as TensorFlow's, that takes the
    quick way.
    """
    if kind.__name__ == "Conv2dSame":
        from timm.layers import pad_same  # present: the layer is timm's

        def padded(layer: Any, x: Tensor) -> tuple[Tensor, Pair]:
            return pad_same(x, layer.kernel_size, layer.stride, layer.dilation), (0, 0)

    else:

        def padded(layer: Any, x: Tensor) -> tuple[Tensor, Pair]:
            return x, layer.padding

    def forward(self: Any, x: Tensor) -> Tensor:
        if not is_slow(self, x):
            return kind.forward(self, x)
        given, padding = padded(self, x)
        return DepthwiseConvolution.apply(given, self.weight, self.stride, padding)

    return type(f"Quick{kind.__name__}", (kind,), {"forward": forward})
