"""The list of engines, and the choice among them."""

from fastlt.data.engines.dali import DaliEngine
from fastlt.data.engines.ffcv.engine import FfcvEngine
from fastlt.data.engines.ffcv.mixed import MixedFfcvEngine
from fastlt.data.engines.gpu import GpuEngine
from fastlt.data.engines.interface import DECODES, Engine, Options
from fastlt.data.engines.resident import ResidentEngine
from fastlt.data.engines.torch import TorchEngine
from fastlt.errors import UserError
from fastlt.packing.reader import Split

# In the order in which `auto` tries them. A new engine is a file with a class as in interface.py,
# and a line here (and its name in `data.engine` of config.py, if it may be asked for by name).
# Where several share a name, the obstacle of the last one is what the user reads.
ENGINES: tuple[type[Engine], ...] = (
    ResidentEngine,
    DaliEngine,
    MixedFfcvEngine,
    FfcvEngine,
    GpuEngine,
    TorchEngine,
)
NAMES = ("auto", *dict.fromkeys(engine.name for engine in ENGINES))


def choose(split: Split, options: Options, name: str = "auto") -> type[Engine]:
    """Return the engine of that name, or with `auto` the first that suits the split.

    Raises UserError with the engine's obstacle where it cannot be used.
    """
    if name not in NAMES:
        raise UserError(f"there is no engine '{name}': data.engine is one of {', '.join(NAMES)}")
    if options.decode not in DECODES:
        raise UserError(
            f"there is no decode '{options.decode}': data.decode is one of {', '.join(DECODES)}"
        )
    obstacle = None
    for engine in ENGINES:
        if engine.suits(split, options) if name == "auto" else engine.name == name:
            obstacle = engine.obstacle(split, options)
            if obstacle is None:
                return engine
    raise UserError(obstacle or "no engine can load these images")
