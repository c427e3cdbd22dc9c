"""Which images make a pack: the arguments of `fastlt pack`, checked and read."""

from pathlib import Path

from fastlt.errors import UserError
from fastlt.packing.cifar import TASKS as CIFAR_TASKS
from fastlt.packing.collection import Collection
from fastlt.packing.descriptions import describe
from fastlt.packing.grocery import read_grocery
from fastlt.packing.holdout import Together, hold_out
from fastlt.packing.sources import is_pack, read_cifar100, read_collection

TASKS_OF = {"cifar100": CIFAR_TASKS, "grocery": ("grocery",)}
IMBALANCE = 100.0


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
    imbalance: float = IMBALANCE,
    together: Together | None = None,
    relabel: bool = False,
    image_key: str = "",
    label_key: str = "",
    descriptions: Path | None = None,
) -> Collection:
    """Return the images that the arguments of `fastlt pack` name; messages name them by option.

    source: cifar100:DIR, grocery:DIR or None. together: what `holdout` leaves on one side. Raises
    UserError where the arguments contradict each other, and DataError where images cannot be read.
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
                "cifar100:DIR or grocery:DIR"
            )
        if task is not None:
            raise UserError(
                f"--task {task} is for cifar100:DIR and grocery:DIR, not for --target: leave it out"
            )
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
        if descriptions is not None:
            describe(collection, descriptions)
        if holdout:
            hold_out(collection, holdout, together)
        return collection
    kind, _, folder = source.partition(":")
    if kind not in TASKS_OF or not folder:
        raise UserError(
            f"unknown source '{source}': it must be cifar100:DIR or grocery:DIR; folders are named "
            "with --target, --auxiliary and --val"
        )
    if descriptions is not None:
        raise UserError(f"--descriptions does not go with {kind}:DIR: leave it out")
    if target or val or test or pairs or root or class_names or relabel or image_key or label_key:
        raise UserError(
            "--target, --val, --test, --pairs, --root, --class-names, --relabel, --image-key and "
            f"--label-key do not go with {kind}:DIR: leave them out"
        )
    if task not in TASKS_OF[kind]:
        tasks = " or ".join(f"--task {name}" for name in TASKS_OF[kind])
        raise UserError(f"{kind} needs {tasks}")
    if kind == "grocery":
        if holdout or imbalance != IMBALANCE:
            raise UserError(
                "grocery has validation images and an imbalance of its own: leave out --holdout "
                "and --imbalance"
            )
        return read_grocery(Path(folder), auxiliary)
    controls = ["siblings", "random", "none"]
    default = "siblings" if task == "cifar100-siblings" else "none"
    if auxiliary not in (None, *controls):
        raise UserError(f"--auxiliary {auxiliary}: for cifar100 it is one of {', '.join(controls)}")
    collection = read_cifar100(Path(folder), task, imbalance, auxiliary or default)
    if holdout:
        collection.val, collection.test = [], collection.val
        hold_out(collection, holdout, together)
    return collection
