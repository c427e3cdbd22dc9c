"""The RUN folder: who may use it, what is taken up from it, and what is saved to it."""

import copy
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from fastlt import __version__
from fastlt.config import MAY_CHANGE, Config, flat, load_config, with_changes
from fastlt.data.engines import resident
from fastlt.errors import UserError
from fastlt.methods.method import Base
from fastlt.models.weights import read_tensors
from fastlt.packing.reader import Pack
from fastlt.training import checkpoint as ckpt
from fastlt.training.distributed import ALONE, Ranks
from fastlt.training.setup import Trainer, TrainState, enter_stage
from fastlt.utils.files import is_disk_full, sibling, write_text
from fastlt.utils.lock import alone_in
from fastlt.utils.run_files import result_of


@contextmanager
def only_run(run: Path, ranks: Ranks = ALONE) -> Iterator[None]:
    """Hold the lock of a RUN folder, which two trainings would overwrite for each other.

    The first of several processes holds it for all.
    """
    if not ranks.is_first:
        yield
        return
    with alone_in(run, "another training"):
        yield


@contextmanager
def disk_errors(run: Path) -> Iterator[None]:
    """A full disk in words; other errors stay what they are."""
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        saved = ckpt.checkpoints(run)
        where = f"from {saved[-1].name}" if saved else "from the start, for nothing was saved yet"
        raise UserError(
            f"the disk with {run} is full: free some space and call the same command again; it "
            f"goes on {where}"
        ) from error


def check_config(config: Config, run: Path, pack: Pack, console: Console) -> Config:
    """Return the configuration that a run is trained with; UserError where it began with another.

    A run that was resumed under another configuration would be neither the one nor the other. What
    says how, not what, may change. The pack may move: its content says whether it is the same.
    """
    path = run / "config.toml"
    saved = ckpt.checkpoints(run)
    if not path.is_file() or not saved:
        return config
    kept, wanted = (flat(c) for c in (load_config(str(path)), config))
    if kept["train.epochs"] != wanted["train.epochs"]:
        raise UserError(_other_epochs(run, kept["train.epochs"], wanted["train.epochs"]))
    for key, value in wanted.items():
        if value != kept.get(key) and key not in MAY_CHANGE:
            what = f"{key} = {kept.get(key)!r}, not {value!r}"
            raise UserError(
                f"{run} holds a run with another configuration ({what}): choose another --out, or "
                "remove the folder"
            )
    return _with_engine_of_old(config, saved, pack, console)


def _other_epochs(run: Path, kept: int, wanted: int) -> str:
    """Return why a run does not get another length, and what to do instead."""
    if result_of(run) is None:
        return (
            f"{run} was begun with train.epochs={kept}, and its learning rate follows them: go on "
            f"with that, or train {wanted} epochs with another --out"
        )
    return (
        f"{run} has finished its {kept} epochs, and its learning rate ended with them: for "
        f"{wanted} train anew with another --out, or begin with this model by --start {run} and "
        "another --out"
    )


def _with_engine_of_old(config: Config, saved: list[Path], pack: Pack, console: Console) -> Config:
    """Return the configuration with the engine that version 0.1.0 used where it said `torch`.

    It decoded small images of one size exactly and kept them in memory: the resident engine.
    """
    if config.data.engine != "torch" or not resident.fits(pack.train):
        return config
    if not any(ckpt.version_of(checkpoint) == ckpt.FIRST_VERSION for checkpoint in saved):
        return config
    console.print(
        "[yellow]note:[/] this run was begun by fastlt 0.1.0, whose data.engine=torch was the "
        "resident engine for small images: it is resumed with data.engine=resident",
        highlight=False,
        soft_wrap=True,
    )
    return with_changes(config, {"data.engine": "resident"})


def resume(trainer: Trainer, console: Console) -> None:
    """Take up the newest checkpoint that is sound and cut metrics.jsonl back to it.

    The first rank says which one.
    """
    saved = None
    if trainer.ranks.is_first:
        ckpt.remove_leftovers(trainer.run)
        saved = newest_sound(trainer.run, console)
    if saved := trainer.ranks.firsts(saved):
        load(trainer, saved)
        if finished(trainer) is not None:
            return
        state = trainer.state
        console.print(
            f"resumed from {saved.name}: epoch {state.epochs_done + 1}, step {state.step_in_epoch}"
        )
    if trainer.ranks.is_first:
        keep_lines(trainer.run / "metrics.jsonl", trainer.state.epochs_done)


def load(trainer: Trainer, checkpoint: Path) -> None:
    """Fill the trainer with a checkpoint, of whichever stage it is."""
    kept = ckpt.read_state(checkpoint)
    ckpt.check_pack(checkpoint, kept, trainer.space, trainer.pack.id)
    check_weights(checkpoint, kept["row_weights"], trainer)
    check_still(checkpoint, kept["still"], trainer)
    state = TrainState(**kept["state"])
    if state.stage:
        enter_stage(trainer, state.stage)
    average = trainer.ema.average if trainer.ema is not None else None
    ckpt.load_checkpoint(
        checkpoint,
        trainer.model,
        trainer.updater.optimizer,
        average.model if average is not None else None,
        trainer.still.names,
    )
    for file, method in methods_by_file(trainer).items():
        if method.extra_state():
            method.load_state_dict(read_tensors(checkpoint / file), strict=False)
    trainer.updater.load(kept["loss_scale"])
    trainer.guard.keep()
    trainer.state = state


def weights_id(trainer: Trainer) -> str:
    """Return a string that changes with the weights of images; "" where they all count alike."""
    return trainer.row_weights.id if trainer.row_weights is not None else ""


def check_weights(checkpoint: Path, kept: str, trainer: Trainer) -> None:
    """Raise UserError where a file of weights holds others than when the run began."""
    if kept != weights_id(trainer):
        raise UserError(
            f"the weights of data.class_weights or data.sample_weights have changed since "
            f"{checkpoint} was written: use the file it was trained with, or another RUN folder"
        )


def check_still(checkpoint: Path, kept: str, trainer: Trainer) -> None:
    """Raise UserError where what is not trained differs from what it was when the run began."""
    if kept and kept != trainer.still.digest:
        raise UserError(
            f"the weights that are not trained have changed since {checkpoint} was written: use "
            "the file of model.weights that it was trained with, or another RUN folder"
        )


def methods_by_file(trainer: Trainer) -> dict[str, Base]:
    """Return the method and its average by the file that holds what they have besides the model."""
    found = {"method.safetensors": trainer.method}
    if trainer.ema is not None:
        found["ema_method.safetensors"] = trainer.ema.average
    return found


def finished(trainer: Trainer) -> dict[str, Any] | None:
    """Return the result of a run all of whose steps are done.

    None where they are not, or the result cannot be read: it is made anew.
    """
    return result_of(trainer.run) if trainer.has_all_steps else None


def newest_sound(run: Path, console: Console) -> Path | None:
    """Return the newest checkpoint that is sound; None where there is none yet.

    Damaged ones are removed, for the run will come by their steps again.
    """
    saved = ckpt.checkpoints(run)
    reasons: list[tuple[Path, str]] = []
    for checkpoint in reversed(saved):
        reason = ckpt.damage(checkpoint)
        if reason is None:
            for damaged, why in reasons:
                console.print(
                    f"[yellow]note:[/] {escape(damaged.name)} is damaged ({escape(why)}): it is "
                    "removed",
                    highlight=False,
                )
                shutil.rmtree(damaged)
            return checkpoint
        reasons.append((checkpoint, reason))
    if reasons:
        raise UserError(
            f"{saved[-1]} is damaged ({reasons[0][1]}), and there is no sound one before: remove "
            f"{run} to start anew"
        )
    return None


def keep_lines(path: Path, epochs: int) -> None:
    """The records of the first `epochs` epochs; a line that a kill cut short goes too."""
    if path.is_file():
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        write_text(path, "".join(line for line in lines[:epochs] if line.endswith("\n")))


def save(trainer: Trainer) -> None:
    """Save a checkpoint; all ranks together. It is on the disk once trainer.writer has waited."""
    kept = {
        "version": __version__,
        "class_space": ckpt.class_space_id(trainer.space),
        "pack": trainer.pack.id,
        "row_weights": weights_id(trainer),
        "still": trainer.still.digest,
        "state": copy.deepcopy(vars(trainer.state)),  # it changes while this is written
        "loss_scale": trainer.updater.state(),
    }
    ema = trainer.ema.average.model if trainer.ema is not None else None
    head = save_head(trainer)
    if trainer.ranks.is_first:
        extra = {file: method.extra_state() for file, method in methods_by_file(trainer).items()}
        still = trainer.still.names
        tensors = ckpt.snapshot(trainer.model, trainer.updater.optimizer, ema, extra, still)
        keep = trainer.config.train.keep
        trainer.writer.write(trainer.run, trainer.state.step, tensors, kept, keep, head)


def save_head(trainer: Trainer) -> Path | None:
    """Write what all ranks have to write together; return its folder, or None."""
    ema = trainer.ema.average.model if trainer.ema is not None else None
    tensors = ckpt.head_tensors(trainer.model, trainer.updater.optimizer, ema)
    if not tensors or trainer.ranks.any(
        ckpt.path_of(trainer.run, trainer.state.step).exists(), trainer.device
    ):
        return None
    head = trainer.ranks.firsts(sibling(trainer.run / "checkpoints" / "head"))
    head.mkdir(parents=True, exist_ok=True)
    ckpt.write_head(head, tensors)
    return head
