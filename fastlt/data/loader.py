"""One front for training and evaluation: a plan's batches in, each with its images out, whichever
engine makes them.

An engine is a class with `batches(batches) -> Iterator[Tensor]`, `damaged` and `close()`. Decoding
exactly, all on a CPU give the same images; decoding regions, or with DALI, nearly the same.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

import torch

from fastlt.data.engines import dali, resident
from fastlt.data.engines.dali import DaliEngine, has_dali, import_dali
from fastlt.data.engines.ffcv.engine import FfcvEngine
from fastlt.data.engines.ffcv.mixed import MixedFfcvEngine
from fastlt.data.engines.ffcv.native import has_ffcv, import_ffcv
from fastlt.data.engines.gpu import GpuEngine, torchvision_decoder
from fastlt.data.engines.resident import ResidentEngine
from fastlt.data.engines.torch import TorchEngine
from fastlt.data.plan import Batch
from fastlt.decode.region import check_region, has_region
from fastlt.errors import UserError
from fastlt.packing.concat import MixedSplit
from fastlt.packing.reader import Split
from fastlt.packing.remote import Fetcher

Engine = TorchEngine | ResidentEngine | FfcvEngine | MixedFfcvEngine | DaliEngine | GpuEngine
ENGINES = ("auto", "torch", "ffcv", "dali")
DECODES = ("auto", "region", "exact", "gpu")
CPU = torch.device("cpu")


class Loader:
    """Images of `size` pixels a side from a split.

    `engine` is one of ENGINES, or what `choose_engine` has made of it.

    decode: `exact` decodes whole images, as Pillow does; `region` only what the crop needs; `auto`
    does so where it can; `gpu` decodes on `device`, by DALI or, where that is missing or engine is
    `torch`, by torchvision. Not `strict`, an image that cannot be decoded is replaced by another
    one of its class. prefetch (batches) and hw_decoder_load (share of the JPEGs for a GPU's
    decoding hardware) are for the dali engine; shared is a folder for what the resident engine has
    decoded.
    """

    def __init__(
        self,
        split: Split,
        size: int,
        engine: str = "auto",
        workers: int = 2,
        betons: Sequence[Path] = (),
        *,
        decode: str = "exact",
        strict: bool = True,
        device: torch.device = CPU,
        prefetch: int = dali.PREFETCH,
        hw_decoder_load: float = dali.HW_DECODER_LOAD,
        shared: Path | None = None,
    ) -> None:
        self._split = split
        self.engine_name = name = choose_engine(split, betons, engine, decode, device)
        self.decode = choose_decode(decode, name, device)
        self._engine: Engine
        if name == "dali":
            self._engine = DaliEngine(
                split, size, workers, device, strict, prefetch, hw_decoder_load
            )
        elif name == "ffcv" and isinstance(split, MixedSplit):
            self._engine = MixedFfcvEngine(split, size, workers, betons, self.decode, strict)
        elif name == "ffcv":
            self._engine = FfcvEngine(split, size, workers, betons[0], self.decode, strict)
        elif name == "resident":
            self._engine = ResidentEngine(split, size, device, shared)
        elif self.decode == "gpu":
            self._engine = GpuEngine(
                split, size, workers, device, strict, torchvision_decoder(device)
            )
        else:
            self._engine = TorchEngine(split, size, workers, self.decode, strict)

    @property
    def damaged(self) -> dict[int, str]:
        """The images that were replaced so far, with the reason."""
        return self._engine.damaged

    def iterate(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, torch.Tensor]]:
        """Each batch with its images, (n, size, size, 3) uint8, the caller's to keep, on the CPU
        or, of the dali engine, on its device. Engines read the plan ahead.
        """
        ahead: deque[Batch] = deque()
        source = batches if self._split.remote is None else Fetcher(self._split).ahead(batches)

        def noted() -> Iterator[Batch]:
            for batch in source:
                ahead.append(batch)
                yield batch

        with closing(self._engine.batches(noted())) as images:
            for made in images:
                yield ahead.popleft(), made

    def close(self) -> None:
        """Ends worker processes and threads; the loader is of no use afterwards."""
        self._engine.close()


def choose_engine(
    split: Split,
    betons: Sequence[Path],
    engine: str,
    decode: str = "exact",
    device: torch.device = CPU,
) -> str:
    """`resident`, `dali`, `ffcv` or `torch`. betons: the split's FFCV files, one of each pack.

    Raises UserError where the one asked for is not to be had.
    """
    if engine not in (*ENGINES, "resident"):
        raise UserError(
            f"there is no engine '{engine}': data.engine is one of {', '.join(ENGINES)}"
        )
    if engine == "ffcv":
        import_ffcv()
        if split.remote is not None:
            raise UserError(
                f"the ffcv engine needs its pack at hand, and this one is at {split.remote.url}: "
                "set data.engine=torch"
            )
        if not betons:
            which = (
                "a .beton of each pack"
                if isinstance(split, MixedSplit)
                else f"{split.folder}.beton"
            )
            raise UserError(
                f"the ffcv engine needs {which}: pack again with --beton, or set data.engine=torch"
            )
        return "ffcv"
    if engine == "dali":
        import_dali()
        if decode == "exact":
            raise UserError(
                "the dali engine decodes regions alone: leave exact decoding to data.engine=torch "
                "or ffcv"
            )
        return "dali"
    if resident.fits(split):  # the torch engine's images, for a hundredth of its time
        return "resident"
    if engine == "auto" and device.type == "cuda" and decode in ("auto", "gpu") and has_dali():
        return "dali"
    is_faster = len(betons) > 0 and split.remote is None and decode != "gpu" and has_ffcv()
    return "ffcv" if engine == "auto" and is_faster else "torch"


def choose_decode(decode: str, engine: str, device: torch.device = CPU) -> str:
    """`region`, `exact` or `gpu`, as the engine does it.

    Raises UserError where the one asked for cannot be had.
    """
    if decode not in DECODES:
        raise UserError(
            f"there is no decode '{decode}': data.decode is one of {', '.join(DECODES)}"
        )
    if decode == "gpu" and (device.type != "cuda" or engine == "ffcv"):
        raise UserError(
            "data.decode=gpu needs an NVIDIA GPU, and data.engine=dali or torch: set "
            "data.decode=auto"
        )
    if engine == "dali":
        return "gpu" if device.type == "cuda" else "region"
    if engine == "resident":
        return "exact"
    if decode == "region":
        check_region("data.decode=region")
    if decode == "gpu":
        return "gpu"
    return "region" if decode != "exact" and has_region() else "exact"
