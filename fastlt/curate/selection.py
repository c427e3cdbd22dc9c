"""The selection of images: none that the targets have, none twice, none unlike its class.

Two images are the same that have the same bytes, the same look (a perceptual hash, mirrored too),
or nearly the same features. Of those that are the same the first is kept.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from fastlt.curate.features import later_copies, nearest, robust_mean
from fastlt.curate.image_index import ImageIndex
from fastlt.curate.settings import FilterConfig
from fastlt.packing.hashes import same_look

UNLIKE = "unlike its class"
UNLICENSED = "its licence is not accepted"
SAME_FEATURES = "the features of a"
TOO_FEW = "too few images of its class are left"


class Verdicts:
    """The verdicts on n images.

    Each has the reason to be dropped (empty: kept), the image it is the same as, and the cosine to
    its class.
    """

    def __init__(self, count: int) -> None:
        self.reasons = [""] * count
        self.of = [""] * count
        self.likeness = np.full(count, np.nan)

    @property
    def kept(self) -> np.ndarray:
        """The indices of the images that are kept, (k,) int64."""
        return np.flatnonzero([not reason for reason in self.reasons])

    def drop(self, image: int, reason: str, of: str = "") -> None:
        """Drop an image, unless it is dropped already. of: the image it is the same as."""
        if not self.reasons[image]:
            self.reasons[image], self.of[image] = reason, of


def select_images(
    index: ImageIndex,
    known: Mapping[str, ImageIndex],
    owners: Sequence[Sequence[int]],
    settings: FilterConfig,
    device: torch.device,
    refused: Iterable[int] = (),
) -> Verdicts:
    """Return the verdicts on the images of an index.

    known: the images of the targets, by what they are; the first are those for training. owners: of
    each class of the index. refused: images whose licence is not accepted.
    """
    verdicts = Verdicts(len(index))
    for image in refused:
        verdicts.drop(image, UNLICENSED)
    drop_leaks(verdicts, index, known, settings.hash_distance)
    centres = prototypes(
        index, without_copies(index, verdicts.kept), known, owners, settings.prototype
    )
    verdicts.likeness = np.einsum(
        "nd,nd->n", index.features.astype(np.float32), centres[index.split.label]
    )
    for image in verdicts.kept:
        if verdicts.likeness[image] < settings.gamma1:
            verdicts.drop(image, UNLIKE)
    # of those that are left: what is dropped itself is nobody's original
    drop_copies(verdicts, index, settings.hash_distance)
    drop_same_features(verdicts, index, known, settings.gamma2, device)
    return verdicts


def drop_leaks(
    verdicts: Verdicts, index: ImageIndex, known: Mapping[str, ImageIndex], distance: int
) -> None:
    """Drop images that the targets have, by bytes and by looks."""
    for what, other in known.items():
        theirs = {digest: image for image, digest in reversed(list(enumerate(other.hashes.exact)))}
        for image, digest in enumerate(index.hashes.exact):
            if digest in theirs:
                verdicts.drop(
                    image, f"leak: the bytes of a {what} image", other.split.where(theirs[digest])
                )
    for what, other in known.items():
        for image, theirs_ in same_look(index.hashes, other.hashes, distance).tolist():
            verdicts.drop(image, f"leak: the look of a {what} image", other.split.where(theirs_))


def without_copies(index: ImageIndex, images: np.ndarray) -> np.ndarray:
    """Return the first of the images with the same bytes, of each class."""
    first = {
        (int(index.split.label[image]), index.hashes.exact[image]): image
        for image in images[::-1].tolist()
    }
    return np.array(sorted(first.values()), np.int64)


def drop_copies(verdicts: Verdicts, index: ImageIndex, distance: int) -> None:
    """Drop later copies, by bytes and by looks."""
    first: dict[bytes, int] = {}
    for image in verdicts.kept.tolist():
        earlier = first.setdefault(index.hashes.exact[image], image)
        if earlier != image:
            verdicts.drop(image, "duplicate: the same bytes", index.split.where(earlier))
    kept = verdicts.kept
    hashes = index.hashes.take(kept)
    drop_later(
        verdicts,
        index,
        kept[same_look(hashes, hashes, distance)].tolist(),
        "duplicate: the same look",
    )


def drop_same_features(
    verdicts: Verdicts,
    index: ImageIndex,
    known: Mapping[str, ImageIndex],
    gamma2: float,
    device: torch.device,
) -> None:
    """Drop images whose features are the same as those of a target's or an earlier image."""
    for what, other in known.items():
        kept = verdicts.kept
        for row, theirs in nearest(index.features[kept], other.features, gamma2, device):
            verdicts.drop(
                kept[row], f"leak: {SAME_FEATURES} {what} image", other.split.where(theirs)
            )
    kept = verdicts.kept
    for row, earlier in later_copies(index.features[kept], gamma2, device):
        verdicts.drop(kept[row], "duplicate: the same features", index.split.where(kept[earlier]))


def drop_later(
    verdicts: Verdicts, index: ImageIndex, pairs: Iterable[list[int]], reason: str
) -> None:
    """Drop the later image of each pair, unless the earlier one is dropped itself."""
    for image, earlier in sorted(pairs):
        if earlier < image and not verdicts.reasons[earlier]:
            verdicts.drop(image, reason, index.split.where(earlier))


def prototypes(
    index: ImageIndex,
    kept: np.ndarray,
    known: Mapping[str, ImageIndex],
    owners: Sequence[Sequence[int]],
    kind: str,
) -> np.ndarray:
    """Return prototypes (classes, D) float32 of length 1; zeros for a class without images."""
    labels = index.split.label[kept]
    targets = next(iter(known.values()), None) if kind != "retrieved" else None
    centres = np.zeros((len(owners), index.features.shape[1]), np.float32)
    for number, owned_by in enumerate(owners):
        parts = [index.features[kept[labels == number]]] if kind != "targets" else []
        if targets is not None:
            parts.append(targets.features[np.isin(targets.split.label, owned_by)])
        members = np.concatenate(parts)
        if len(members):
            centres[number] = robust_mean(members)
    return centres


def give_up_small_classes(verdicts: Verdicts, labels: np.ndarray, least: int) -> None:
    """Drop all images of classes that have fewer than `least`."""
    kept = verdicts.kept
    counts = np.bincount(labels[kept], minlength=int(labels.max(initial=0)) + 1)
    for image in kept[counts[labels[kept]] < least].tolist():
        verdicts.drop(image, TOO_FEW)
