"""The RUN folder: who may use it, what is taken up from it, and what is saved to it."""

import copy
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from fastlt.config import MAY_CHANGE, Config, flat, load_config
from fastlt.errors import UserError
from fastlt.training import checkpoint as ckpt
from fastlt.training.distributed import ALONE, Ranks
from fastlt.training.setup import Progressed, Trainer
from fastlt.utils.files import is_disk_full, sibling, write_text
from fastlt.utils.lock import alone_in


@contextmanager
def only_run(run: Path, ranks: Ranks = ALONE) -> Iterator[None]:
    """Two trainings in one RUN folder would overwrite each other; the first of several processes
    holds the lock for all.
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


def check_config(config: Config, run: Path) -> None:
    """A run that went on under another configuration would be neither the one nor the other.

    What says how, not what, may change. The pack may move: whether it is the same is told by its
    content.
    """
    path = run / "config.toml"
    if path.is_file() and ckpt.checkpoints(run):
        kept, wanted = (flat(c) for c in (load_config(str(path)), config))
        if changed := [key for key in wanted if wanted[key] != kept[key] and key not in MAY_CHANGE]:
            what = f"{changed[0]} = {kept[changed[0]]!r}, not {wanted[changed[0]]!r}"
            raise UserError(
                f"{run} holds a run with another configuration ({what}): choose another --out, or "
                "remove the folder"
            )


def resume(trainer: Trainer, console: Console) -> None:
    """Takes up the newest checkpoint that is sound and cuts metrics.jsonl back to it.

    The first rank says which one.
    """
    saved = None
    if trainer.ranks.is_first:
        ckpt.remove_leftovers(trainer.run)
        saved = newest_sound(trainer.run, console)
    if saved := trainer.ranks.firsts(saved):
        state = ckpt.read_state(saved)
        ckpt.check_pack(saved, state, trainer.space, trainer.pack.id)
        ema = trainer.ema.model if trainer.ema is not None else None
        ckpt.load_checkpoint(saved, trainer.model, trainer.updater.optimizer, ema)
        trainer.updater.load(state["loss_scale"])
        trainer.guard.keep()
        trainer.at = Progressed(**state["at"])
        if finished(trainer) is not None:
            return
        console.print(
            f"going on from {saved.name}: epoch {trainer.at.epoch + 1}, step "
            f"{trainer.at.step_in_epoch}"
        )
    if trainer.ranks.is_first:
        keep_lines(trainer.run / "metrics.jsonl", trainer.at.epoch)


def finished(trainer: Trainer) -> dict[str, Any] | None:
    """The result of a run all of whose steps are done; None where they are not, or the result
    cannot be read: it is made anew.
    """
    if trainer.at.step < trainer.config.train.epochs * trainer.plan.steps_per_epoch:
        return None
    try:
        result = json.loads((trainer.run / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) and "top1" in result else None


def newest_sound(run: Path, console: Console) -> Path | None:
    """None where there is no checkpoint yet.

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
    """A checkpoint; all ranks together. It is on the disk once trainer.writer has waited."""
    at = copy.deepcopy(vars(trainer.at))  # it goes on while this is written
    state = {"class_space": ckpt.class_space_id(trainer.space), "pack": trainer.pack.id, "at": at}
    state["loss_scale"] = trainer.updater.state()
    ema = trainer.ema.model if trainer.ema is not None else None
    head = save_head(trainer)
    if trainer.ranks.is_first:
        tensors = ckpt.snapshot(trainer.model, trainer.updater.optimizer, ema)
        trainer.writer.write(
            trainer.run, trainer.at.step, tensors, state, trainer.config.train.keep, head
        )


def save_head(trainer: Trainer) -> Path | None:
    """What all ranks have to write together; the rest is written in the background."""
    ema = trainer.ema.model if trainer.ema is not None else None
    tensors = ckpt.head_tensors(trainer.model, trainer.updater.optimizer, ema)
    if not tensors or trainer.ranks.any(
        ckpt.path_of(trainer.run, trainer.at.step).exists(), trainer.device
    ):
        return None
    head = trainer.ranks.firsts(sibling(trainer.run / "checkpoints" / "head"))
    head.mkdir(parents=True, exist_ok=True)
    ckpt.write_head(head, tensors)
    return head
