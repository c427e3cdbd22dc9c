"""A subset of a pack: some of its auxiliary classes alone.

The tables are others, the shards and the images' numbers stay.

The classes that are kept come first among the auxiliaries; those behind them have no image in any
epoch, and no row in the head.
"""

from collections import defaultdict
from dataclasses import replace

import numpy as np

from fastlt.classes import ClassSpace
from fastlt.config import DataConfig
from fastlt.errors import UserError
from fastlt.packing.reader import Pack
from fastlt.utils.embeddings import read_embeddings

Pairs = list[tuple[int, int]]  # target id, auxiliary id


def subset(pack: Pack, data: DataConfig, seed: int) -> tuple[Pack, ClassSpace]:
    """Return the pack with its auxiliaries reordered, and the class space that `data` asks for.

    `seed` is of what is drawn at random. Raises UserError where vectors are missing, or no
    auxiliary is left.
    """
    if not data.auxiliary or data.neighbours == 0:
        return pack, pack.space.targets_only()
    pack, space = chosen_auxiliaries(pack, data, seed)
    if data.auxiliary == "merged":
        owned = space.anchors()
        if alone := [
            n for i, n in enumerate(space.names) if i >= space.num_targets and i not in owned
        ]:
            raise UserError(
                f"data.auxiliary=merged: '{alone[0]}' has no target that its images could train: "
                "pair it, or set data.auxiliary=false"
            )
        return replace(pack, drawn=space), space.targets_only()
    return pack, space


def chosen_auxiliaries(pack: Pack, data: DataConfig, seed: int) -> tuple[Pack, ClassSpace]:
    """Return the pack with its auxiliaries reordered, and the space of those that are used."""
    space = pack.space
    pairs = nearest_first(space, data) if data.similarity else list(space.pairs)
    chosen = first_of_each(pairs, data.neighbours)
    owned = {auxiliary for _, auxiliary in pairs}
    all_of_them = range(space.num_targets, space.num_classes)
    asks_all = data.neighbours < 0 and data.band == (-1, 1)
    kept = [a for a in all_of_them if a in chosen or (asks_all and a not in owned)]
    rng = np.random.default_rng([seed, 1])
    if data.auxiliary_share < 1:
        drawn = rng.permutation(len(kept))[: round(data.auxiliary_share * len(kept))]
        kept = [kept[i] for i in sorted(drawn.tolist())]
    if space.num_auxiliaries and not kept:
        raise UserError(
            "no auxiliary class is left: see data.neighbours, data.auxiliary_share and data.band, "
            "or data.auxiliary=false"
        )
    is_kept = set(kept)
    relation = [(target, auxiliary) for target, auxiliary in sorted(pairs) if auxiliary in is_kept]
    if data.pairs == "random":
        relation = random_pairs(relation, kept, rng)
    return (
        (pack, space)
        if len(kept) == space.num_auxiliaries and relation == space.pairs
        else reordered(pack, kept, relation)
    )


def nearest_first(space: ClassSpace, data: DataConfig) -> Pairs:
    """Return the pairs whose names' vectors have a cosine within the band, most similar first."""
    vectors = read_embeddings(data.similarity)
    cosines = {
        pair: vectors.similarity([space.names[pair[0]]], [space.names[pair[1]]])
        for pair in space.pairs
    }
    if missing := [pair for pair, cosine in cosines.items() if cosine is None]:
        target, auxiliary = (space.names[i] for i in missing[0])
        raise UserError(
            f"{data.similarity} has no vectors for {len(missing):,} pairs, the first is ({target}, "
            f"{auxiliary})"
        )
    low, high = data.band
    known = [
        (pair, cosine)
        for pair, cosine in cosines.items()
        if cosine is not None and low <= cosine <= high
    ]
    return [pair for pair, cosine in sorted(known, key=lambda entry: -entry[1])]


def first_of_each(pairs: Pairs, most: int) -> set[int]:
    """Return the auxiliaries among the first `most` of any target; all, if it is negative."""
    times: defaultdict[int, int] = defaultdict(int)
    chosen = set()
    for target, auxiliary in pairs:
        times[target] += 1
        if most < 0 or times[target] <= most:
            chosen.add(auxiliary)
    return chosen


def random_pairs(pairs: Pairs, auxiliaries: list[int], rng: np.random.Generator) -> Pairs:
    """Return as many pairs for each target with auxiliaries that are not its neighbours.

    A target has fewer where there are not enough others.
    """
    own: defaultdict[int, list[int]] = defaultdict(list)
    for target, auxiliary in pairs:
        own[target].append(auxiliary)
    drawn = set()
    for target, neighbours in own.items():
        others = sorted(set(auxiliaries) - set(neighbours))
        drawn |= {
            (target, others[i]) for i in rng.permutation(len(others))[: len(neighbours)].tolist()
        }
    return sorted(drawn)


def reordered(pack: Pack, kept: list[int], pairs: Pairs) -> tuple[Pack, ClassSpace]:
    """Return the pack with `kept` first among its auxiliaries, and the space of those alone."""
    space, first, is_kept = pack.space, pack.space.num_targets, set(kept)
    order = [*kept, *(a for a in range(first, space.num_classes) if a not in is_kept)]
    place = np.arange(space.num_classes, dtype=np.int32)
    place[order] = np.arange(first, space.num_classes)
    names = [space.names[a] for a in order]
    kept_names = set(names[: len(kept)])
    counts = [space.train_counts[i] for i in [*range(first), *order]]
    whole = space.model_copy(
        update={
            "auxiliary_names": names,
            "train_counts": counts,
            "pairs": renamed(space.pairs, place),
        }
    )
    narrow = whole.model_copy(
        update={
            "auxiliary_names": names[: len(kept)],
            "train_counts": counts[: first + len(kept)],
            "pairs": renamed(pairs, place),
            "origins": {
                name: origin for name, origin in space.origins.items() if name in kept_names
            },
        }
    )
    train = replace(pack.train, label=place[pack.train.label])
    return replace(pack, space=whole, train=train), narrow


def renamed(pairs: Pairs, place: np.ndarray) -> Pairs:
    """Return the pairs with the ids that `place` (C,) gives their auxiliaries."""
    return sorted((target, int(place[auxiliary])) for target, auxiliary in pairs)
