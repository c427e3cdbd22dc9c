"""The blocks of a vision transformer of timm."""

from typing import Any

from torch import nn

from fastlt.errors import UserError

# what a block of timm's VisionTransformer is made of
PARTS = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")


def blocks_of(backbone: nn.Module, name: str, kind: str) -> list[Any]:
    """Return the blocks of a transformer. Raises UserError that names the kind for others."""
    blocks: Any = getattr(backbone, "blocks", None)
    found = list(blocks) if isinstance(blocks, nn.Sequential | nn.ModuleList) else []
    if (
        not found
        or not hasattr(backbone, "num_prefix_tokens")
        or not all(all(hasattr(block, part) for part in PARTS) for block in found)
    ):
        raise UserError(
            f"model.adapt={kind} is for vision transformers such as vit_base_patch16_224, not for "
            f"{name}: take lora, norm, bitfit, last:K or full"
        )
    return found
