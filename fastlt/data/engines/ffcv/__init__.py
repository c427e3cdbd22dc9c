"""The ffcv engine: one for the packs of a split, one for splits of several packs."""

from fastlt.data.engines.ffcv.engine import FfcvEngine
from fastlt.data.engines.ffcv.mixed import MixedFfcvEngine

__all__ = ["FfcvEngine", "MixedFfcvEngine"]
