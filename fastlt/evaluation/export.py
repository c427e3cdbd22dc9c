"""`fastlt export`: a trained model in the forms that others load, each read back before it stands.

By the ending of the name: a folder (timm's own where the model is one of timm's), .onnx, .pt2 of
torch.export, or .safetensors.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fastlt.classes import ClassSpace
from fastlt.errors import UserError
from fastlt.evaluation.calibration import read_calibration
from fastlt.evaluation.evaluate import run_config
from fastlt.evaluation.model_card import model_card
from fastlt.evaluation.predict import Model, load_model
from fastlt.models.export import read_metadata
from fastlt.models.onnx_file import (
    Halved,
    check_onnx,
    onnx_description,
    onnx_logits,
    write_onnx,
)
from fastlt.models.program import program_logits, write_program
from fastlt.models.timm_folder import (
    load_timm_folder,
    timm_model,
    timm_names,
    write_config,
)
from fastlt.models.weights import copies, write_tensors
from fastlt.packing.reader import open_pack, picture
from fastlt.utils.files import flush_to_disk, sibling
from fastlt.utils.run_files import result_of

COMPARED = 16  # images
# of logits, relative to their largest magnitude: by another runtime; in float16, or resized there
MAX_DIFFERENCE, MAX_DIFFERENCE_NEAR = 1e-3, 3e-2
FORMS = ("a folder", ".safetensors", ".onnx", ".pt2")


class ExportOptions(NamedTuple):
    """The options of the command."""

    force: bool = False
    half: bool = False
    preprocessing: bool = False


class Source(NamedTuple):
    """The trained model, and what is told of it."""

    run: Path
    model: Model
    described: dict[str, Any]
    pictures: list[np.ndarray]  # (H, W, 3) uint8 each, what exports are compared on
    is_real: bool  # whether they are images of the pack

    @property
    def are_shrunk(self) -> bool:
        """Whether most of the pictures are larger than evaluation makes them."""
        data = self.described["data"]
        resize = data["eval_resize"] or data["size"]
        return float(np.median([min(one.shape[:2]) for one in self.pictures])) >= resize

    @property
    def inputs(self) -> Tensor:
        """The images (N, 3, size, size) float32 as the model takes them."""
        return torch.stack([self.model.transform(image) for image in self.pictures])


def export_run(run: Path, to: Path, options: ExportOptions | None = None) -> str:
    """Write the model of a RUN to a new file or folder; return a sentence about what was checked.

    Raises UserError where something is there already, unless `force`, where the form cannot hold
    the model, and where what was written gives other logits; then nothing is left.
    """
    options = options or ExportOptions()
    write = form_of(to, options)
    if to.exists() and not options.force:
        raise UserError(f"{to} is there already: name another place, or replace it with --force")
    source = opened_source(run)
    with replaced(to) as temporary, torch.no_grad():
        difference, form = write(source, temporary, options)
    images = "images of the pack" if source.is_real else "random images, for the pack is gone"
    return (
        f"{len(source.model.classes):,} classes, {form}; read back, it gives the same logits on "
        f"{len(source.pictures)} {images} (within {difference:.1e}, relative)"
    )


def form_of(to: Path, options: ExportOptions) -> Callable[..., tuple[float, str]]:
    """Return the function that writes the form that a name ends in. UserError for others."""
    writers = {
        "": export_folder,
        ".safetensors": export_file,
        ".onnx": export_onnx_file,
        ".pt2": export_program,
    }
    ending = "" if to.is_dir() else to.suffix
    if ending not in writers:
        raise UserError(
            f"cannot export to '{to.name}': name a folder without an ending, or a file that ends "
            f"in {', '.join(FORMS[1:])}"
        )
    if options.preprocessing and ending != ".onnx":
        raise UserError("--preprocessing is for .onnx: other forms take prepared images")
    if options.half and ending == ".pt2":
        raise UserError("--half is not for .pt2: move the loaded module to float16 instead")
    if ending == ".onnx":
        check_onnx()
    return writers[ending]


def opened_source(run: Path) -> Source:
    """Return the model of a RUN with images of its pack to compare on."""
    model = load_model(run, "cpu")
    path = run / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{run} is no RUN: name the folder that `fastlt train` wrote")
    described = read_metadata(path)
    described["calibration"] = read_calibration(run).model_dump()
    pictures = pictures_of(run)
    is_real = bool(pictures)
    if not pictures:
        random = np.random.default_rng(0)
        shape = (COMPARED, model.size, model.size, 3)
        pictures = list(random.integers(0, 256, shape, np.uint8))
    return Source(run, model, described, pictures, is_real)


def pictures_of(run: Path) -> list[np.ndarray]:
    """Return validation images of a run's pack, evenly spread; none where it is gone."""
    try:
        val = open_pack(run_config(run).data.pack).val
        numbers = np.linspace(0, len(val) - 1, min(COMPARED, len(val))).astype(int)
        return [np.asarray(picture(val, number)) for number in np.unique(numbers).tolist()]
    except (UserError, OSError):
        return []


# --- the forms


def export_file(source: Source, path: Path, options: ExportOptions) -> tuple[float, str]:
    """Write a .safetensors file that `fastlt.load` takes."""
    tensors = copies(source.model.module.state_dict())
    write_tensors(path, as_stored(tensors, options), metadata(source.described))
    loaded = load_model(path, "cpu").module
    return checked(source, loaded(source.inputs), options), "targets only"


def export_folder(source: Source, folder: Path, options: ExportOptions) -> tuple[float, str]:
    """Write a folder: timm's own where timm has the model, else weights with a loader."""
    folder.mkdir()
    module, described = source.model.module, source.described
    name, size = described["model"]["name"], described["data"]["size"]
    found = timm_model(module, described["model"], size)
    space = ClassSpace.load(source.run / "classes.json")
    card = model_card(source.run, space, result_of(source.run) or {}, described, found is not None)
    (folder / "README.md").write_text(card, encoding="utf-8")
    weights = folder / "model.safetensors"
    if found is None:
        tensors = copies(module.state_dict())
        write_tensors(weights, as_stored(tensors, options), metadata(described))
        write_program(module, program_data(source), folder / "model.pt2", source.model.classes)
        text = (resources.files("fastlt.evaluation") / "loader.txt").read_text(encoding="utf-8")
        (folder / "load.py").write_text(text, encoding="utf-8")
        checked(source, program_logits(folder / "model.pt2", source.inputs), ExportOptions())
        loaded = load_model(folder, "cpu").module
        return checked(source, loaded(source.inputs), options), "weights with a loader in load.py"
    whole, classifier = found
    tensors = copies(timm_names(module, classifier))
    write_tensors(
        weights,
        as_stored(tensors, options),
        metadata({**described, "classifier": classifier}) | {"format": "pt"},
    )
    write_config(whole, folder, source.model.classes, described, source.are_shrunk)
    difference = checked(source, load_timm_folder(folder)(source.inputs), options)
    checked(source, load_model(folder, "cpu").module(source.inputs), options)
    return difference, f"timm's {name}"


def export_onnx_file(source: Source, path: Path, options: ExportOptions) -> tuple[float, str]:
    """Write an .onnx file."""
    data, classes = source.described["data"], source.model.classes
    module = source.model.module
    written: nn.Module = Halved(load_model(source.run, "cpu").module) if options.half else module
    described = onnx_description(classes, program_data(source))
    write_onnx(written.eval(), data, path, described, options.preprocessing)
    if not options.preprocessing:
        return checked(source, onnx_logits(path, source.inputs), options), "ONNX"
    pixels = [torch.from_numpy(image.copy())[None] for image in source.pictures]
    found = torch.cat([onnx_logits(path, image) for image in pixels])
    return checked(source, found, options), "ONNX with its preprocessing"


def export_program(source: Source, path: Path, options: ExportOptions) -> tuple[float, str]:
    """Write a .pt2 file."""
    write_program(source.model.module, program_data(source), path, source.model.classes)
    return checked(source, program_logits(path, source.inputs), options), "a program of torch"


def program_data(source: Source) -> dict[str, Any]:
    """Return what those who load a model without fastlt have to know."""
    temperature = source.described["calibration"]["temperature"]
    return {**source.described["data"], "temperature": temperature}


def metadata(described: dict[str, Any]) -> dict[str, str]:
    """Return the metadata of a safetensors file: one key, for their order would be random."""
    return {"fastlt": json.dumps(described)}


def as_stored(tensors: dict[str, Tensor], options: ExportOptions) -> dict[str, Tensor]:
    """Return tensors as they are written: in float16 where that was asked for."""
    if not options.half:
        return tensors
    return {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }


# --- comparison


def checked(source: Source, found: Tensor, options: ExportOptions) -> float:
    """Return how far logits (N, T) are from the model's own. UserError where that is too far."""
    return compared(found, source.model.module(source.inputs), options)


@torch.inference_mode()
def compared(found: Tensor, expected: Tensor, options: ExportOptions) -> float:
    """Return the largest difference of logits (N, T), relative to their largest magnitude."""
    scale = expected.abs().max().clamp(min=1e-12)
    difference = float((found - expected).abs().max() / scale)
    is_near = options.half or options.preprocessing  # edges of enlarged images are not exact
    limit = MAX_DIFFERENCE_NEAR if is_near else MAX_DIFFERENCE
    if not difference <= limit:
        raise UserError(
            f"what was written gives other logits than the model (relative difference "
            f"{difference:.1e}), so it was not kept"
        )
    return difference


@contextmanager
def replaced(to: Path) -> Iterator[Path]:
    """Yield a temporary place that takes the place of `to` if the block ends well.

    What stood there is removed only then.
    """
    to.parent.mkdir(parents=True, exist_ok=True)
    temporary = sibling(to).with_suffix(to.suffix)
    try:
        yield temporary
        flush_all(temporary)
        old = sibling(to)
        if to.exists():
            to.rename(old)
        temporary.rename(to)
        remove(old)
    finally:
        remove(temporary)


def flush_all(place: Path) -> None:
    """Wait until a file, or all files of a folder, are on the disk."""
    for path in place.iterdir() if place.is_dir() else [place]:
        flush_to_disk(path)


def remove(place: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if place.is_dir():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)
