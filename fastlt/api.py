"""The Python API behind `import fastlt`: what the commands of the same names do.

Paths may be strings or Paths. Bad input raises `fastlt.UserError`, or one of the kinds below it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rich.console import Console

from fastlt.errors import UserError

if TYPE_CHECKING:
    from fastlt.evaluation.predict import Model

Place = str | Path
__all__ = ["evaluate", "load", "pack", "train"]


def pack(
    source: str | None = None,
    *,
    out: Place,
    target: Place | None = None,
    auxiliary: Place | None = None,
    val: Place | None = None,
    test: Place | None = None,
    holdout: float = 0.0,
    groups: Place | None = None,
    pairs: Place | None = None,
    root: Place | None = None,
    class_names: Place | None = None,
    task: str | None = None,
    imbalance: float = 100,
    max_side: int = 0,
    quality: int = 0,
    transcode: bool = False,
    beton: bool = False,
    strict: bool = False,
    drop_leaks: bool = False,
    drop_conflicts: bool = False,
    relabel: bool = False,
    image_key: str = "",
    label_key: str = "",
    descriptions: Place | None = None,
    owners: int = 0,
    overlap: float = 0.0,
    max_pixels: int = 0,
    range: str = "auto",
    workers: int = 1,
    quiet: bool = False,
) -> Path:
    """Write target and auxiliary images into one PACK, as `fastlt pack`; return its folder.

    The arguments are the options of the command, and mean the same. max_pixels: of one image; 0:
    the command's default. workers: processes; above 1 the script that calls this needs the guard
    `if __name__ == "__main__":`. quiet: print nothing.
    """
    from fastlt.data.engines.ffcv.beton import beton_writer
    from fastlt.decode.images import MAX_PIXELS
    from fastlt.packing.collect import collect
    from fastlt.packing.holdout import Together
    from fastlt.packing.writer import PackOptions, write_pack

    collection = collect(
        source,
        target=_path(target),
        auxiliary=None if auxiliary is None else str(auxiliary),
        val=_path(val),
        test=_path(test),
        holdout=holdout,
        pairs=_path(pairs),
        root=_path(root),
        class_names=_path(class_names),
        task=task,
        imbalance=imbalance,
        together=Together(_path(groups)),
        relabel=relabel,
        image_key=image_key,
        label_key=label_key,
        descriptions=_path(descriptions),
        owners=owners,
        overlap=overlap,
    )
    chosen = PackOptions(
        out=Path(out),
        workers=workers,
        max_side=max_side,
        quality=quality,
        transcode=transcode,
        strict=strict,
        drop_leaks=drop_leaks,
        drop_conflicts=drop_conflicts,
        max_pixels=max_pixels or MAX_PIXELS,
        range=range,
    )
    writer = beton_writer() if beton else None
    return write_pack(collection, chosen, Console(quiet=quiet), writer)


def train(
    recipe: str,
    *,
    data: Place,
    out: Place,
    settings: Mapping[str, Any] | None = None,
    method: str | None = None,
    start: Place | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Train a classifier, as `fastlt train`; return what RUN/result.json holds.

    recipe: a name, or the path of a .toml file. data: the PACK, a folder or an address. out: the
    RUN folder; a run that stopped there goes on, one that has finished is returned as it is.
    settings: values on top of the recipe, by `section.key`. method: a method or a preset that
    `fastlt methods` lists. start: a finished RUN whose model this one begins with. quiet: print
    nothing.

    Raises `fastlt.utils.signals.Stopped` where SIGTERM or Ctrl-C ended the run; it is saved then.
    """
    from fastlt.config import load_config
    from fastlt.methods import method_settings
    from fastlt.packing.remote import is_remote
    from fastlt.training.loop import asks_for_silencing
    from fastlt.training.loop import train as train_run
    from fastlt.utils.run_files import check_out

    if settings is not None and not isinstance(settings, Mapping):
        raise UserError("settings must be a dictionary of values by 'section.key'")
    place = str(data) if is_remote(str(data)) else str(Path(data).resolve())
    check_out(Path(out))
    begin = method_settings(method, None if start is None else str(Path(start).resolve()))
    config = load_config(recipe, {**(settings or {}), "data.pack": place}, begin)
    asked = asks_for_silencing(settings or {})
    return train_run(config, Path(out), Console(quiet=quiet), silencing_asked=asked)


def load(place: Place, device: str = "auto", range: str | None = None) -> Model:
    """Return the trained model of a RUN, or of a .safetensors file that `fastlt export` wrote.

    Pack, recipe and auxiliary classes are not needed. device: a torch device; auto: a GPU where
    there is one. range: of images of more than 8 bits, which values become black and white, full or
    LOW,HIGH; by default as in the pack that the model was trained on.
    """
    from fastlt.evaluation.predict import load_model

    return load_model(place, device, range)


def evaluate(
    run: Place, data: Place | None = None, split: Literal["val", "test"] = "val"
) -> dict[str, Any]:
    """Score a trained model, as `fastlt eval`; return the figures, as result.json names them.

    data: another PACK of the same targets; by default the run's own. split: `test` for the images
    of `fastlt pack --test`; of the run's own pack, RUN/test.json is written too.
    """
    from fastlt.evaluation.evaluate import evaluate_run

    return evaluate_run(Path(run), data, split)


def _path(place: Place | None) -> Path | None:
    return None if place is None else Path(place)
