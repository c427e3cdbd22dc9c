"""Which images make a pack: the arguments of `fastlt pack`, checked and read."""

from pathlib import Path

from fastlt.errors import UserError
from fastlt.packing.collection import Collection
from fastlt.packing.holdout import Together, hold_out
from fastlt.packing.sources import is_pack, read_cifar100, read_collection

TASKS = ("cifar100-lt", "cifar100-siblings")


def collect(
    source: str | None = None,
    *,
    target: Path | None = None,
    auxiliary: str | None = None,
    val: Path | None = None,
    test: Path | None = None,
    holdout: float = 0.0,
    pairs: Path | None = None,
    root: Path | None = None,
    class_names: Path | None = None,
    task: str | None = None,
    imbalance: float = 100,
    together: Together | None = None,
    relabel: bool = False,
    image_key: str = "",
    label_key: str = "",
) -> Collection:
    """Return the images that the arguments of `fastlt pack` name; messages name them by option.

    source: cifar100:DIR, or None. together: what `holdout` leaves on one side. Raises UserError
    where the arguments contradict each other, and DataError where images cannot be read.
    """
    if together is not None and together.groups is not None and not holdout:
        raise UserError("--groups is for --holdout, which takes validation images out: name both")
    if holdout and val is not None:
        raise UserError("--holdout takes the place of --val: leave one of them out")
    if source is None:
        if not holdout and target is not None and val is None and is_pack(target):
            val = target
        if target is None or (val is None and not holdout):
            raise UserError(
                "nothing to pack: name images with --target and --val (or --holdout), or give "
                "cifar100:DIR"
            )
        if task is not None:
            raise UserError(f"--task {task} is for cifar100:DIR, not for --target: leave it out")
        collection = read_collection(
            target,
            Path(auxiliary) if auxiliary else None,
            val,
            pairs,
            root,
            class_names,
            test,
            relabel=relabel,
            image_key=image_key,
            label_key=label_key,
        )
        if holdout:
            hold_out(collection, holdout, together)
        return collection
    kind, _, folder = source.partition(":")
    if kind != "cifar100" or not folder:
        raise UserError(
            f"unknown source '{source}': it must be cifar100:DIR; folders are named with --target, "
            "--auxiliary and --val"
        )
    if target or val or test or pairs or root or class_names or relabel or image_key or label_key:
        raise UserError(
            "--target, --val, --test, --pairs, --root, --class-names, --relabel, --image-key and "
            "--label-key do not go with cifar100:DIR: leave them out"
        )
    if task not in TASKS:
        raise UserError("cifar100 needs --task cifar100-lt or --task cifar100-siblings")
    controls = ["siblings", "random", "none"]
    default = "none" if task == TASKS[0] else "siblings"
    if auxiliary not in (None, *controls):
        raise UserError(f"--auxiliary {auxiliary}: for cifar100 it is one of {', '.join(controls)}")
    collection = read_cifar100(Path(folder), task, imbalance, auxiliary or default)
    if holdout:
        collection.val, collection.test = [], collection.val
        hold_out(collection, holdout, together)
    return collection
