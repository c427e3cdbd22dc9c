"""A normalising flow of features onto fixed Gaussians: masked autoregressive blocks."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

MOST = 5.0  # the largest log-scale: features that never vary have no largest likelihood


class MaskedBlock(nn.Module):
    """A masked autoregressive block: feature i is shifted and scaled by the features before it.

    MADE (Germain et al. 2015, arXiv 1502.03509) as in MAF (Papamakarios et al. 2017, arXiv
    1705.07057, eq. 3). The limit on scales is ours.
    """

    sees: Tensor  # (D, D), which features a hidden unit sees
    seen_by: Tensor  # (2 D, D), which hidden units an output sees

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(width, width), nn.Linear(width, 2 * width)
        order = torch.arange(width)
        inside = order % max(1, width - 1)  # the last feature that a hidden unit may see
        sees, seen_by = inside[:, None] >= order, order[:, None] > inside
        self.register_buffer("sees", sees.float(), persistent=False)
        self.register_buffer("seen_by", seen_by.float().repeat(2, 1), persistent=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what becomes of x (N, D), and the log-determinants (N,)."""
        inside = F.relu(F.linear(x, self.hidden.weight * self.sees, self.hidden.bias))
        shift, scale = F.linear(inside, self.out.weight * self.seen_by, self.out.bias).chunk(2, 1)
        scale = MOST * torch.tanh(scale / MOST)
        return (x - shift) * torch.exp(-scale), -scale.sum(dim=1)


class FlowNorm(nn.Module):
    """Batch norm with its log-determinant (Dinh et al. 2016, arXiv 1605.08803, appendix E)."""

    mean: Tensor  # (D,)
    variance: Tensor  # (D,)

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what becomes of x (N, D), and the log-determinant ()."""
        mean, variance = self.mean, self.variance
        if self.training:
            mean, variance = x.mean(dim=0), x.var(dim=0, unbiased=False)
            with torch.no_grad():
                self.mean.lerp_(mean.to(self.mean.dtype), 0.1)
                self.variance.lerp_(variance.to(self.mean.dtype), 0.1)
        scale = self.scale - 0.5 * torch.log(variance + 1e-5)
        return (x - mean) * torch.exp(scale) + self.shift, scale.sum()


class Flow(nn.Module):
    """A density of features: two blocks, each with a norm, onto K fixed Gaussians of variance 1."""

    centres: Tensor  # (K, D)

    def __init__(self, width: int, clusters: int) -> None:
        super().__init__()
        self.blocks: Any = nn.ModuleList(MaskedBlock(width) for _ in range(2))
        self.norms: Any = nn.ModuleList(FlowNorm(width) for _ in range(2))
        self.register_buffer("centres", 0.05 * torch.randn(clusters, width))

    def latent(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the latent (N, D) of features x (N, D), and the log-determinants (N,)."""
        total = x.new_zeros(x.shape[0])
        for block, norm in zip(self.blocks, self.norms, strict=True):
            x, of_block = block(x)
            x, of_norm = norm(x)
            x, total = x.flip(1), total + of_block + of_norm
        return x, total

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return log p(x) (N,) and log p(k | x) (N, K) of features x (N, D), in float32 at least.

        log p(x, k) = -D/2 log(2 pi) - |u - mu_k|^2 / 2 + log|det|, with weight 1/K of each centre.
        """
        with torch.autocast(x.device.type, enabled=False):
            u, log_det = self.latent(x.to(torch.promote_types(x.dtype, torch.float32)))
            clusters, width = self.centres.shape
            near = u @ self.centres.T - 0.5 * self.centres.square().sum(dim=1)
            base = log_det - 0.5 * (u.square().sum(dim=1) + width * math.log(2 * math.pi))
            return base + near.logsumexp(dim=1) - math.log(clusters), near.log_softmax(dim=1)
