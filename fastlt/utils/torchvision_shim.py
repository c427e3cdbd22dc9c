"""Lets torchvision import beside a CPU build of torch, which its published wheels (built for CUDA)
refuse.

torchvision registers fake kernels for operators that its native library defines; where that library
cannot load, the import fails with "operator torchvision::nms does not exist". Declaring the
operators first is enough for transforms.v2 and for timm. The operators themselves (detection, image
decoding) stay absent.
"""

import importlib.util
import sys
from functools import lru_cache
from pathlib import Path

import torch

from fastlt.errors import MissingExtra

OPERATORS = (
    "nms",
    "qnms",
    "roi_align",
    "_roi_align_backward",
    "ps_roi_align",
    "_ps_roi_align_backward",
    "roi_pool",
    "_roi_pool_backward",
    "ps_roi_pool",
    "_ps_roi_pool_backward",
    "qroi_align",
    "deform_conv2d",
    "_deform_conv2d_backward",
)


@lru_cache(maxsize=1)
def make_importable() -> torch.library.Library | None:
    """Call before the first import of torchvision or timm.

    Returns the library of declarations, kept alive by the cache.
    """
    if "torchvision" in sys.modules:
        return None
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise MissingExtra(
            "torchvision is not installed, and timm models and RandAugment need it: pip install "
            "'fastlt[timm]'"
        )
    if _native_operators_load(Path(spec.origin).parent):
        return None
    library = torch.library.Library("torchvision", "DEF")
    for name in OPERATORS:
        library.define(f"{name}(Tensor any) -> Tensor")
    return library


def _native_operators_load(folder: Path) -> bool:
    for path in folder.glob("_C*.so"):
        try:
            torch.ops.load_library(str(path))
            return True
        except OSError:
            continue
    return False
