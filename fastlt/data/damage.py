"""What becomes of an image that cannot be decoded although it is in the pack: training takes
another one of its class.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from fastlt.decode.images import fill_box
from fastlt.decode.region import DAMAGED, UNSURE, examine
from fastlt.errors import UserError
from fastlt.packing.reader import Split, picture

ATTEMPTS = 20  # other images of the class that are tried: more in a row are no accident


def stand_in(
    split: Split, image: int, box: np.ndarray, flip: bool, size: int, reason: str
) -> np.ndarray:
    """(size, size, 3) uint8 of the next image of the class that can be decoded, cut as `box` would
    have cut `image`.

    The same for every engine, and in every epoch. Raises UserError with `reason` where the class
    has no such image.
    """
    same = np.flatnonzero(split.label == split.label[image])
    place = int(np.searchsorted(same, image))
    for other in np.roll(same, -place)[1 : ATTEMPTS + 1].tolist():
        try:
            return fill_box(picture(split, other), _moved(split, image, other, box), flip, size)
        except UserError:
            continue
    raise UserError(f"{reason}, and no other image of its class can be decoded either")


def _moved(split: Split, image: int, other: int, box: np.ndarray) -> np.ndarray:
    """The same share of another image."""
    heights, widths = (
        split.height[[image, other]].astype(float),
        split.width[[image, other]].astype(float),
    )
    scale = np.tile([heights[1] / heights[0], widths[1] / widths[0]], 2)
    moved = np.rint(box * scale).astype(np.int64)
    moved[2:] = moved[2:].clip(min=1)
    return moved


class Inspector:
    """For engines whose decoders conceal damage, or crash at it: looks at each image of a split
    when it is first asked for.
    """

    def __init__(self, split: Split, workers: int) -> None:
        self._split = split
        self._is_known, self._is_damaged = np.zeros(len(split), bool), np.zeros(len(split), bool)
        self._pool = ThreadPoolExecutor(max(1, workers), "fastlt-inspect")

    def damaged(self, images: np.ndarray) -> np.ndarray:
        """(n,) bool for images (n,)."""
        new = np.unique(images[~self._is_known[images]])
        self._is_damaged[new] = list(self._pool.map(self._look, new.tolist()))
        self._is_known[new] = True
        return self._is_damaged[images]

    def _look(self, image: int) -> bool:
        state = examine(self._split.read(image))
        if state != UNSURE:
            return state == DAMAGED
        try:
            picture(self._split, image)
        except UserError:
            return True
        return False

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)
