"""Which images are kept: none that the targets have (a leak), none twice, none unlike its class.

Two images are the same that have the same bytes, the same look (a perceptual hash, mirrored too),
or nearly the same features. Of those that are the same the first is kept.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from fastlt.curate.features import later_copies, nearest, robust_mean
from fastlt.curate.hashes import same_look
from fastlt.curate.image_index import Pile
from fastlt.curate.settings import FilterConfig

UNLIKE = "unlike its class"
UNLICENSED = "its licence is not accepted"
SAME_FEATURES = "the features of a"
TOO_FEW = "too few images of its class are left"


class Verdicts:
    """Of n images: why each is dropped (empty: kept), which image it is the same as, and the cosine
    to its class.
    """

    def __init__(self, count: int) -> None:
        self.reasons = [""] * count
        self.of = [""] * count
        self.likeness = np.full(count, np.nan)

    @property
    def kept(self) -> np.ndarray:
        return np.flatnonzero([not reason for reason in self.reasons])

    def drop(self, image: int, reason: str, of: str = "") -> None:
        if not self.reasons[image]:
            self.reasons[image], self.of[image] = reason, of


def judge(
    pile: Pile,
    known: Mapping[str, Pile],
    owners: Sequence[Sequence[int]],
    settings: FilterConfig,
    device: torch.device,
    refused: Iterable[int] = (),
) -> Verdicts:
    """known: the images of the targets, by what they are; the first are those for training. owners:
    of each class of the pile. refused: images whose licence is not accepted.
    """
    verdicts = Verdicts(len(pile))
    for image in refused:
        verdicts.drop(image, UNLICENSED)
    drop_leaks(verdicts, pile, known, settings.hash_distance)
    centres = prototypes(
        pile, without_copies(pile, verdicts.kept), known, owners, settings.prototype
    )
    verdicts.likeness = np.einsum(
        "nd,nd->n", pile.features.astype(np.float32), centres[pile.split.label]
    )
    for image in verdicts.kept:
        if verdicts.likeness[image] < settings.gamma1:
            verdicts.drop(image, UNLIKE)
    # of those that are left: what is dropped itself is nobody's original
    drop_copies(verdicts, pile, settings.hash_distance)
    drop_same_features(verdicts, pile, known, settings.gamma2, device)
    return verdicts


def drop_leaks(verdicts: Verdicts, pile: Pile, known: Mapping[str, Pile], distance: int) -> None:
    """By bytes and by looks."""
    for what, other in known.items():
        theirs = {digest: image for image, digest in reversed(list(enumerate(other.hashes.exact)))}
        for image, digest in enumerate(pile.hashes.exact):
            if digest in theirs:
                verdicts.drop(
                    image, f"leak: the bytes of a {what} image", other.split.where(theirs[digest])
                )
    for what, other in known.items():
        for image, theirs_ in same_look(pile.hashes, other.hashes, distance).tolist():
            verdicts.drop(image, f"leak: the look of a {what} image", other.split.where(theirs_))


def without_copies(pile: Pile, images: np.ndarray) -> np.ndarray:
    """The first of those with the same bytes, of each class."""
    first = {
        (int(pile.split.label[image]), pile.hashes.exact[image]): image
        for image in images[::-1].tolist()
    }
    return np.array(sorted(first.values()), np.int64)


def drop_copies(verdicts: Verdicts, pile: Pile, distance: int) -> None:
    """By bytes and by looks."""
    first: dict[bytes, int] = {}
    for image in verdicts.kept.tolist():
        earlier = first.setdefault(pile.hashes.exact[image], image)
        if earlier != image:
            verdicts.drop(image, "duplicate: the same bytes", pile.split.where(earlier))
    kept = verdicts.kept
    hashes = pile.hashes.take(kept)
    drop_later(
        verdicts,
        pile,
        kept[same_look(hashes, hashes, distance)].tolist(),
        "duplicate: the same look",
    )


def drop_same_features(
    verdicts: Verdicts, pile: Pile, known: Mapping[str, Pile], gamma2: float, device: torch.device
) -> None:
    for what, other in known.items():
        kept = verdicts.kept
        for row, theirs in nearest(pile.features[kept], other.features, gamma2, device):
            verdicts.drop(
                kept[row], f"leak: {SAME_FEATURES} {what} image", other.split.where(theirs)
            )
    kept = verdicts.kept
    for row, earlier in later_copies(pile.features[kept], gamma2, device):
        verdicts.drop(kept[row], "duplicate: the same features", pile.split.where(kept[earlier]))


def drop_later(verdicts: Verdicts, pile: Pile, pairs: Iterable[list[int]], reason: str) -> None:
    """Of pairs (image, image) the later one, unless the earlier one is dropped itself."""
    for image, earlier in sorted(pairs):
        if earlier < image and not verdicts.reasons[earlier]:
            verdicts.drop(image, reason, pile.split.where(earlier))


def prototypes(
    pile: Pile,
    kept: np.ndarray,
    known: Mapping[str, Pile],
    owners: Sequence[Sequence[int]],
    kind: str,
) -> np.ndarray:
    """(classes, D) float32 of length 1; nothing in particular for a class without images."""
    labels = pile.split.label[kept]
    targets = next(iter(known.values()), None) if kind != "retrieved" else None
    centres = np.zeros((len(owners), pile.features.shape[1]), np.float32)
    for number, owned_by in enumerate(owners):
        parts = [pile.features[kept[labels == number]]] if kind != "targets" else []
        if targets is not None:
            parts.append(targets.features[np.isin(targets.split.label, owned_by)])
        members = np.concatenate(parts)
        if len(members):
            centres[number] = robust_mean(members)
    return centres


def give_up_small_classes(verdicts: Verdicts, labels: np.ndarray, least: int) -> None:
    kept = verdicts.kept
    counts = np.bincount(labels[kept], minlength=int(labels.max(initial=0)) + 1)
    for image in kept[counts[labels[kept]] < least].tolist():
        verdicts.drop(image, TOO_FEW)
