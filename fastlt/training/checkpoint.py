"""Checkpoints: a folder per step with safetensors and JSON, whole or not there.

Loading a foreign one never runs code.

RUN/checkpoints/step-00001234/
    model.safetensors  optimizer.safetensors  [ema.safetensors]  state.json  SHA256SUMS
    head/*.safetensors, where the classes are split over ranks: any number of ranks can load it
"""

import hashlib
import json
import shutil
from collections.abc import Collection, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.optim import Optimizer

from fastlt.classes import ClassSpace
from fastlt.errors import UserError
from fastlt.models.classifier import Classifier
from fastlt.models.weights import copies, load_weights, read_tensors, write_tensors
from fastlt.utils.files import flush_to_disk, sha256_of, whole_folder
from fastlt.utils.run_files import checkpoints

Snapshot = dict[str, dict[str, Tensor]]  # tensors on the CPU, by file
FIRST_VERSION = "0.1.0"  # which did not write its number down
SUMS = "SHA256SUMS"  # as `sha256sum -c` reads it


def class_space_id(space: ClassSpace) -> str:
    """Return a digest of the class space, by which rows of a classifier have the same meaning."""
    return hashlib.sha256(
        json.dumps([space.target_names, space.auxiliary_names]).encode()
    ).hexdigest()[:16]


# --- writing


def snapshot(
    model: nn.Module,
    optimizer: Optimizer,
    ema: nn.Module | None,
    extra: Mapping[str, dict[str, Tensor]] | None = None,
    still: Collection[str] = (),
) -> Snapshot:
    """Return copies on the CPU, so that training can go on while they are written.

    What is sharded over ranks is left out: see `write_head`. extra: what a method has besides its
    model, by file; files without tensors are left out. still: names of tensors of the model that
    training does not change: these are left out.
    """
    tensors = {
        "model.safetensors": moving(model, still),
        "optimizer.safetensors": optimizer_tensors(optimizer, model),
    }
    if ema is not None:
        tensors["ema.safetensors"] = moving(ema, still)
    tensors |= {file: part for file, part in (extra or {}).items() if part}
    return {file: copies(part) for file, part in tensors.items()}


def moving(model: nn.Module, still: Collection[str]) -> dict[str, Tensor]:
    """Return the tensors of a model but those that stand still."""
    return {name: tensor for name, tensor in model.state_dict().items() if name not in still}


def optimizer_tensors(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """`index.name` -> tensor for every state tensor of what is not sharded, parameters counted
    through the groups.
    """
    head: Any = getattr(model, "head", None)
    sharded = (
        {id(parameter) for parameter in head.parameters()}
        if getattr(head, "is_sharded", False)
        else set()
    )
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {
        f"{i}.{name}": torch.as_tensor(value)
        for i, parameter in enumerate(parameters)
        for name, value in optimizer.state.get(parameter, {}).items()
        if value is not None and not (id(parameter) in sharded and value.shape == parameter.shape)
    }


def head_tensors(model: Classifier, optimizer: Optimizer, ema: Classifier | None) -> dict[str, Any]:
    """Return DTensors over the memory of a class-parallel head, its average and their buffers.

    The buffers are the optimiser's. Empty for other heads.
    """
    if not model.head.is_sharded:
        return {}
    found: dict[str, Any] = {}
    head: Any = model.head
    for name, parameter in head.named_parameters():
        found[name] = head.sharded(parameter)
        for kind, value in optimizer.state[parameter].items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                found[f"{name}.{kind}"] = head.sharded(value)
    average: Any = ema.head if ema is not None else None
    if average is not None and average.is_sharded:
        for name, parameter in average.named_parameters():
            found[f"ema.{name}"] = average.sharded(parameter)
    return found


def write_head(folder: Path, tensors: dict[str, Any]) -> None:
    """Write the tensors of a class-parallel head; all ranks call it together."""
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    checkpoint.save(
        tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True)
    )


def load_head(folder: Path, tensors: dict[str, Any]) -> None:
    """Read a class-parallel head into the memory of `tensors`.

    All ranks call it together, however many had written it.
    """
    from torch.distributed import checkpoint
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    try:
        checkpoint.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)))
    except (CheckpointException, OSError, ValueError) as error:
        raise UserError(
            f"{folder} does not fit the model of this configuration: use another RUN folder"
        ) from error


def path_of(run: Path, step: int) -> Path:
    """Return the folder of the checkpoint after a step."""
    return run / "checkpoints" / f"step-{step:08d}"


def write_checkpoint(
    run: Path,
    step: int,
    tensors: Snapshot,
    state: dict[str, Any],
    keep: int,
    head: Path | None = None,
) -> None:
    """`state` is what else the run needs to go on, as JSON; head: a folder with the head, which is
    moved into the checkpoint.

    Older checkpoints beyond `keep` are removed afterwards.

    Raises OSError where it cannot be written, and leaves nothing half-written behind.
    """
    path = path_of(run, step)
    if path.exists():
        return
    with whole_folder(path) as folder:
        if head is not None:
            head.rename(folder / "head")
        for name, part in tensors.items():
            write_tensors(folder / name, part)
        (folder / "state.json").write_text(json.dumps({"step": step, **state}), encoding="utf-8")
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        sums = "".join(
            f"{sha256_of(file)}  {file.relative_to(folder).as_posix()}\n" for file in files
        )
        (folder / SUMS).write_text(sums, encoding="utf-8")
        for file in [*files, folder / SUMS]:
            flush_to_disk(file)
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old)


class Writer:
    """Writes checkpoints in a thread, one at a time. What went wrong is raised by the next call."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "fastlt-checkpoint")
        self._last: Future[None] | None = None

    def write(
        self,
        run: Path,
        step: int,
        tensors: Snapshot,
        state: dict[str, Any],
        keep: int,
        head: Path | None = None,
    ) -> None:
        """Write as `write_checkpoint` does; tensors and state must not be changed afterwards."""
        self.wait()
        self._last = self._pool.submit(write_checkpoint, run, step, tensors, state, keep, head)

    def wait(self) -> None:
        """Wait until the last checkpoint is on the disk."""
        last, self._last = self._last, None
        if last is not None:
            last.result()

    def close(self) -> None:
        """End the thread."""
        self._pool.shutdown()


# --- reading


def remove_leftovers(run: Path) -> None:
    """Remove what a killed run left half-written."""
    for path in [*run.glob(".*.partial"), *(run / "checkpoints").glob(".*.partial")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def damage(checkpoint: Path) -> str | None:
    """Return what is wrong with the bytes of a checkpoint; None where nothing is."""
    try:
        lines = (checkpoint / SUMS).read_text(encoding="utf-8").splitlines()
        listed = {line.partition("  ")[2] for line in lines}
        found = {
            path.relative_to(checkpoint).as_posix()
            for path in checkpoint.rglob("*")
            if path.is_file()
        } - {SUMS}
        if unlisted := sorted(found - listed):
            return f"{SUMS} does not list {unlisted[0]}"
        for line in lines:
            wanted, _, name = line.partition("  ")
            if sha256_of(checkpoint / name) != wanted:
                return f"{name} has changed since it was written"
    except (OSError, UnicodeDecodeError) as error:
        return f"{getattr(error, 'filename', None) or SUMS} cannot be read"
    return None if lines else f"{SUMS} is empty"


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return what a checkpoint keeps besides tensors; `version` is of the fastlt that wrote it."""
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        state = {"version": FIRST_VERSION, **state}
        if "at" in state:  # as version 0.1.0 called it
            state["state"] = state.pop("at")
        names = ("step", "class_space", "pack", "state", "loss_scale", "version")
        # version 0.1.0 knew no weights of images, and left nothing out
        later = {key: state.get(key, "") for key in ("row_weights", "still")}
        return {key: state[key] for key in names} | later
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{checkpoint} is no readable checkpoint: remove it to go on from the one before"
        ) from error


def version_of(checkpoint: Path) -> str | None:
    """Return the version of fastlt that wrote a checkpoint; None where it cannot be read."""
    try:
        return read_state(checkpoint)["version"]
    except UserError:
        return None


def check_pack(checkpoint: Path, state: dict[str, Any], space: ClassSpace, pack_id: str) -> None:
    """Raise UserError where a checkpoint belongs to another pack.

    Another class space gives the rows of the classifier another meaning; other images or pairs
    change the order and the prior.
    """
    if state["class_space"] == class_space_id(space) and state["pack"] != pack_id:
        raise UserError(
            f"the pack has changed since {checkpoint} was written: use the pack it was trained on, "
            "or another RUN folder"
        )
    if state["class_space"] != class_space_id(space):
        raise UserError(
            f"{checkpoint} belongs to another class space than the pack: use the pack it was "
            "trained on, or another RUN folder"
        )


def load_checkpoint(
    checkpoint: Path,
    model: Classifier,
    optimizer: Optimizer | None = None,
    ema: Classifier | None = None,
    still: Collection[str] = (),
) -> None:
    """Fill model, optimiser and averaged weights in place.

    still: names of tensors that may be missing, as the model has them. Raises UserError where the
    tensors do not fit.
    """
    load_weights(checkpoint / "model.safetensors", model, still=still)
    if optimizer is not None:
        fill_optimizer(optimizer, read_tensors(checkpoint / "optimizer.safetensors"))
    if ema is not None:
        load_weights(checkpoint / "ema.safetensors", ema, still=still)
    if optimizer is not None and (head := head_tensors(model, optimizer, ema)):
        load_head(checkpoint / "head", head)


def fill_optimizer(optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Fill the state of an optimiser.

    State tensors take the memory format of their parameter: load_state_dict would leave
    channels_last behind.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        parameter = parameters[int(index)]
        if tensor.shape == parameter.shape:
            tensor = torch.empty_like(parameter).copy_(tensor)
        optimizer.state[parameter][name] = tensor.to(parameter.device)
