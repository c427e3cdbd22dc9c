"""Visual prompt tuning (arXiv 2203.12119): learned tokens beside those of the image, at the first
block of a transformer or anew at each.
"""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from fastlt.config import AdapterConfig
from fastlt.models.adapt.blocks import blocks_of


def add_shallow_prompts(backbone: nn.Module, config: AdapterConfig, name: str) -> set[str]:
    """Add prompts before the first block, which go through all; return the name of their tensor."""
    blocks = blocks_of(backbone, name, "vpt-shallow")
    _put(backbone, blocks[0], config.prompts)
    for block, enters, leaves in (
        (blocks[0], True, len(blocks) == 1),
        *([(blocks[-1], False, True)] if len(blocks) > 1 else []),
    ):
        block.prefix, block.prompts_leave = backbone.num_prefix_tokens, leaves
        block.prompt_count = config.prompts
        kind: Any = type(block)
        block.__class__ = prompted(kind, enters)
    return {key for key, _ in backbone.named_parameters() if key.endswith("prompts")}


def add_deep_prompts(backbone: nn.Module, config: AdapterConfig, name: str) -> set[str]:
    """Add prompts of its own to every block; return the names of their tensors."""
    for block in blocks_of(backbone, name, "vpt-deep"):
        _put(backbone, block, config.prompts)
        block.prefix, block.prompts_leave = backbone.num_prefix_tokens, True
        block.prompt_count = config.prompts
        kind: Any = type(block)
        block.__class__ = prompted(kind, True)
    return {key for key, _ in backbone.named_parameters() if key.endswith("prompts")}


def _put(backbone: Any, block: Any, count: int) -> None:
    """Give a block prompts (P, D), uniform as in VPT: by the size of a patch and the width."""
    patch, width = math.prod(backbone.patch_embed.patch_size), backbone.embed_dim
    limit = math.sqrt(6 / (3 * patch + width))
    block.prompts = nn.Parameter(torch.empty(count, width).uniform_(-limit, limit))


@cache
def prompted(kind: type[nn.Module], enters: bool) -> type[nn.Module]:
    """Return a block of timm that puts its prompts behind the tokens of the class, or takes those
    away that came in, or both.
    """

    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if enters:
            prompts = self.prompts.to(x.dtype).expand(x.shape[0], -1, -1)
            x = torch.cat([x[:, : self.prefix], prompts, x[:, self.prefix :]], dim=1)
        x = kind.forward(self, x, *args, **kwargs)
        if self.prompts_leave:
            x = torch.cat([x[:, : self.prefix], x[:, self.prefix + self.prompt_count :]], dim=1)
        return x

    return type(f"Prompted{kind.__name__}", (kind,), {"forward": forward})
