"""What studies change of auxiliary classes: how many targets they have, and how clean they are."""

from collections import Counter, defaultdict
from dataclasses import replace

from fastlt.errors import UserError
from fastlt.packing.collection import Collection


def limit_owners(collection: Collection, most: int) -> None:
    """Let each auxiliary class neighbour the `most` of its targets with the fewest training images.

    Of equals the first are kept.
    """
    counts = Counter(ref.label for ref in collection.train)
    owners: defaultdict[int, list[int]] = defaultdict(list)
    for target, auxiliary in collection.pairs:
        owners[auxiliary].append(target)
    collection.pairs = sorted(
        (target, auxiliary)
        for auxiliary, targets in owners.items()
        for target in sorted(targets, key=lambda target: (counts[target], target))[:most]
    )


def overlap(collection: Collection, share: float) -> None:
    """Replace a share of the images of each auxiliary class by images of its targets.

    They are training images of the targets that the task leaves out, each taken once, from all its
    targets in turn; they are no validation images any more. A class whose targets have none left
    keeps its own, which is noted. Raises UserError where no class gets any.
    """
    unused: defaultdict[int, list[int]] = defaultdict(list)
    for place, ref in enumerate(collection.unused):
        unused[ref.label].append(place)
    owners: defaultdict[int, list[int]] = defaultdict(list)
    for target, auxiliary in collection.pairs:
        owners[auxiliary].append(target)
    places: defaultdict[int, list[int]] = defaultdict(list)
    for place, ref in enumerate(collection.train):
        places[ref.label].append(place)
    first, taken, short = len(collection.target_names), set(), []
    for auxiliary in range(first, first + len(collection.auxiliary_names)):
        wanted = round(share * len(places[auxiliary]))
        for number, place in enumerate(places[auxiliary][len(places[auxiliary]) - wanted :]):
            own = [target for target in owners[auxiliary] if unused[target]]
            if not own:
                short.append(collection.auxiliary_names[auxiliary - first])
                break
            source = unused[own[number % len(own)]].pop(0)
            taken.add(source)
            collection.train[place] = replace(collection.unused[source], label=auxiliary)
    if not taken:
        raise UserError(
            f"--overlap {share:g}: no target of an auxiliary class has images that training does "
            "not use: leave it out"
        )
    if short:
        collection.warnings.append(
            f"{len(short)} auxiliary classes have less overlap, as their targets have no images "
            f"left: {', '.join(short[:3])}"
        )
    moved = {collection.unused[source] for source in taken}
    collection.val = [ref for ref in collection.val if ref not in moved]
    collection.unused = [ref for n, ref in enumerate(collection.unused) if n not in taken]
