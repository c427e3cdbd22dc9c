"""The module paths of version 0.1.0: they are imported from where they are now, with a warning.

This file imports nothing of fastlt, so that `import fastlt` stays fast.
"""

import sys
import warnings
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# old path -> new paths, in which a name is looked up in this order
MOVED = {
    "fastlt.charts": "fastlt.reports.charts",
    "fastlt.checkpoint": "fastlt.training.checkpoint",
    "fastlt.compare": "fastlt.evaluation.compare",
    "fastlt.curate.addresses": "fastlt.curate.public_hosts",
    "fastlt.curate.judge": "fastlt.curate.selection",
    "fastlt.curate.piles": "fastlt.curate.image_index",
    "fastlt.curate.politeness": "fastlt.curate.rate_limits",
    "fastlt.data.batch": "fastlt.data.augment",
    "fastlt.data.beton": "fastlt.data.engines.ffcv.beton",
    "fastlt.data.cifar": "fastlt.packing.cifar",
    "fastlt.data.collection": "fastlt.packing.collection",
    "fastlt.data.dali": "fastlt.data.engines.dali",
    "fastlt.data.derived": "fastlt.packing.relabel",
    "fastlt.data.ffcv": "fastlt.data.engines.ffcv.engine",
    "fastlt.data.ffcv_jit": "fastlt.data.engines.ffcv.jit",
    "fastlt.data.ffcv_mixed": "fastlt.data.engines.ffcv.mixed",
    "fastlt.data.ffcv_parts": "fastlt.data.engines.ffcv.parts",
    "fastlt.data.gpu": "fastlt.data.engines.gpu",
    "fastlt.data.images": "fastlt.decode.images",
    "fastlt.data.mix": "fastlt.data.mixup",
    "fastlt.data.mixture": "fastlt.packing.concat",
    "fastlt.data.native": "fastlt.data.engines.ffcv.native",
    "fastlt.data.output": "fastlt.utils.output",
    "fastlt.data.pack": "fastlt.packing.writer",
    "fastlt.data.packed": "fastlt.packing.reader",
    "fastlt.data.pool": "fastlt.utils.pool",
    "fastlt.data.region": "fastlt.decode.region",
    "fastlt.data.remote": "fastlt.packing.remote",
    "fastlt.data.resident": "fastlt.data.engines.resident",
    "fastlt.data.shards": "fastlt.packing.shards",
    "fastlt.data.source": "fastlt.packing.sources",
    "fastlt.data.staging": "fastlt.data.prefetch",
    "fastlt.data.stored": "fastlt.packing.encode",
    "fastlt.data.thumbnail": "fastlt.utils.thumbnail",
    "fastlt.data.torch": "fastlt.data.engines.torch",
    "fastlt.distributed": "fastlt.training.distributed",
    "fastlt.dry_run": "fastlt.training.dry_run",
    "fastlt.embeddings": "fastlt.utils.embeddings",
    "fastlt.evaluate": "fastlt.evaluation.evaluate",
    "fastlt.export": "fastlt.models.export",
    "fastlt.files": "fastlt.utils.files",
    "fastlt.forward": "fastlt.training.compile",
    "fastlt.granularity": "fastlt.studies.granularity",
    "fastlt.guard": "fastlt.training.nonfinite",
    "fastlt.hierarchy": "fastlt.studies.hierarchy",
    "fastlt.lock": "fastlt.utils.lock",
    "fastlt.metrics": "fastlt.evaluation.metrics",
    "fastlt.model": "fastlt.models.classifier fastlt.models.heads fastlt.models.backbones "
    "fastlt.models.weights",
    "fastlt.names": "fastlt.utils.names",
    "fastlt.optim": "fastlt.training.optim",
    "fastlt.posthoc": "fastlt.evaluation.posthoc",
    "fastlt.prepare": "fastlt.training.setup fastlt.models.device",
    "fastlt.procedural": "fastlt.demo.procedural",
    "fastlt.progress": "fastlt.utils.progress",
    "fastlt.report": "fastlt.reports.run",
    "fastlt.rundir": "fastlt.training.run_folder",
    "fastlt.significance": "fastlt.evaluation.significance",
    "fastlt.stopping": "fastlt.utils.signals",
    "fastlt.sweep.board": "fastlt.sweep.state",
    "fastlt.torchvision_shim": "fastlt.utils.torchvision_shim",
    "fastlt.train": "fastlt.training.loop",
    "fastlt.update": "fastlt.training.step",
    "fastlt.view": "fastlt.packing.subset",
}
RENAMED = {  # functions that have another name now
    "dead_workers_in_words": "worker_errors",
    "joined_predictions": "concatenate_predictions",
    "Board": "State",
    "mix_packs": "concat_packs",
    "staged": "prefetch_to_device",
    "view": "subset",
    "Progressed": "TrainState",
}
FUNCTIONS = ("fastlt.train", "fastlt.evaluate")  # of the Python API, which were modules too


class MovedFunction(ModuleType):
    """A module of version 0.1.0 whose path is now a function of the Python API."""

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Call the function."""
        name = self.__name__.removeprefix("fastlt.")
        return getattr(import_module("fastlt.api"), name)(*arguments, **named)


class Finder:
    """The entry of `sys.meta_path` that finds the modules of version 0.1.0."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return the specification of a module that moved; None for others."""
        return ModuleSpec(name, Finder) if name in MOVED else None  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: ModuleSpec) -> ModuleType:
        """Return the module that stands in for the one that moved."""
        return MovedFunction(spec.name) if spec.name in FUNCTIONS else ModuleType(spec.name)

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        """Fill the module with the names of those that it is now; warn whoever imports it.

        Names are copied: looked up when they are asked for, they would be imported by whatever
        goes through all modules, such as pickle.
        """
        places = MOVED[module.__name__].split()
        warnings.warn(
            f"the module {module.__name__} of fastlt 0.1 is now {' or '.join(places)}: import it "
            "from there",
            FutureWarning,
            stacklevel=2,
        )
        for place in reversed(places):
            names = vars(import_module(place))
            known = {name: value for name, value in names.items() if not name.startswith("__")}
            renamed = {old: names[new] for old, new in RENAMED.items() if new in names}
            vars(module).update({**known, **renamed})


def install() -> None:
    """Let the old paths be found, after everything that exists."""
    if Finder not in sys.meta_path:
        sys.meta_path.append(Finder)
