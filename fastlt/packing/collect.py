"""Which images make a pack: the arguments of `fastlt pack`, checked and read."""

from pathlib import Path

from fastlt.errors import UserError
from fastlt.packing.cifar import TASKS as CIFAR_TASKS
from fastlt.packing.cifar import WITH_AUXILIARIES
from fastlt.packing.collection import Collection
from fastlt.packing.descriptions import describe
from fastlt.packing.grocery import read_grocery
from fastlt.packing.holdout import Together, hold_out
from fastlt.packing.owners import limit_owners
from fastlt.packing.owners import overlap as replace_by_targets
from fastlt.packing.sources import is_pack, read_cifar100, read_collection

TASKS_OF = {"cifar100": CIFAR_TASKS, "grocery": ("grocery",)}
IMBALANCE = 100.0
UNUSED = Path("unused")  # of --val


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
    owners: int = 0,
    overlap: float = 0.0,
) -> Collection:
    """Return the images that the arguments of `fastlt pack` name; messages name them by option.

    source: cifar100:DIR, grocery:DIR or None. val: of tasks of CIFAR-100 also "unused", the images
    of targets that a task leaves out of training. together: what `holdout` leaves on one side.
    Raises UserError where the arguments contradict each other, and DataError where images cannot be
    read.
    """
    if together is not None and together.groups is not None and not holdout:
        raise UserError("--groups is for --holdout, which takes validation images out: name both")
    if holdout and val is not None:
        raise UserError("--holdout takes the place of --val: leave one of them out")
    has_unused = source is not None and source.startswith("cifar100:") and val == UNUSED
    if has_unused:
        val = None
    if source is not None:
        named = (target, val, test, pairs, root, class_names, relabel, image_key, label_key)
        if any(named):
            raise UserError(
                "--target, --val, --test, --pairs, --root, --class-names, --relabel, --image-key "
                f"and --label-key do not go with {source.partition(':')[0]}:DIR: leave them out"
            )
        collection = of_task(source, task, auxiliary, imbalance, holdout)
        if has_unused and not collection.unused:
            raise UserError(f"--val unused: {task} leaves no training images out, see --holdout")
    else:
        if not holdout and target is not None and val is None and is_pack(target):
            val = target
        if target is None or (val is None and not holdout):
            raise UserError(
                "nothing to pack: name images with --target and --val (or --holdout), or give "
                "cifar100:DIR or grocery:DIR"
            )
        if task is not None or overlap:
            option = f"--task {task}" if task is not None else f"--overlap {overlap:g}"
            raise UserError(
                f"{option} is for cifar100:DIR and grocery:DIR, not for --target: leave it out"
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
    if owners:
        limit_owners(collection, owners)
    if overlap:
        replace_by_targets(collection, overlap)
    if holdout:
        hold_out(collection, holdout, together)
    if has_unused:  # those for validation until now are for testing then
        collection.val, collection.test = collection.unused, collection.val
        collection.unused = []
    return collection


def of_task(
    source: str, task: str | None, auxiliary: str | None, imbalance: float, holdout: float
) -> Collection:
    """Return the images of a task of a known data set; see `collect`."""
    kind, _, folder = source.partition(":")
    if kind not in TASKS_OF or not folder:
        raise UserError(
            f"unknown source '{source}': it must be cifar100:DIR or grocery:DIR; folders are named "
            "with --target, --auxiliary and --val"
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
    default = "siblings" if task in WITH_AUXILIARIES else "none"
    if auxiliary not in (None, *controls):
        raise UserError(f"--auxiliary {auxiliary}: for cifar100 it is one of {', '.join(controls)}")
    collection = read_cifar100(Path(folder), task, imbalance, auxiliary or default)
    if holdout:  # the official test images are for testing then
        collection.val, collection.test = [], collection.val
    return collection
