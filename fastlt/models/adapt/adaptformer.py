"""AdaptFormer (arXiv 2205.13535): a small bottleneck beside the MLP of each block of a transformer,
in the form of LIFT (arXiv 2309.10019).
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fastlt.config import AdapterConfig
from fastlt.models.adapt.blocks import blocks_of


class Bottleneck(nn.Module):
    """Norm, down, ReLU, up, times a learned scale: (N, L, D) tokens to (N, L, D), 0 at first."""

    def __init__(self, width: int, rank: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.down = nn.Linear(width, rank)
        self.up = nn.Linear(rank, width)
        self.drop = nn.Dropout(dropout)
        self.scale = nn.Parameter(torch.ones(()))
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)
        for part in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(part)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return what is added to the tokens."""
        return self.scale * self.up(self.drop(self.down(self.norm(tokens)).relu()))


def add_adaptformer(backbone: nn.Module, config: AdapterConfig, name: str) -> set[str]:
    """Add a bottleneck to every block; return the names of their parameters.

    Raises UserError where the blocks are not a transformer's.
    """
    for block in blocks_of(backbone, name, "adaptformer"):
        block.adapter = Bottleneck(block.norm2.normalized_shape[0], config.rank, config.dropout)
        kind: Any = type(block)
        block.__class__ = adapted(kind)
    return {key for key, _ in backbone.named_parameters() if ".adapter." in key}


@cache
def adapted(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a block of timm that adds its `adapter` to what its MLP gives.

    The block keeps its names, so that its weights are those of timm's.
    """

    def forward(self: Any, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x)))) + self.adapter(x)

    return type(f"AdaptFormer{kind.__name__}", (kind,), {"forward": forward})
