"""Labels as they are written: one class an image. Several classes, and shares of them, are told."""

import re

from fastlt.errors import DataError

NUMBER = r"-?[0-9]+"
SEVERAL = re.compile(rf"[\[({{]?\s*{NUMBER}(\s*[,;|\s]\s*{NUMBER})+\s*[\])}}]?")
SHARE = r"[0-9]*\.[0-9]+(e-?[0-9]+)?"
SOFT = re.compile(
    rf"[\[({{]?\s*({NUMBER}\s*:\s*)?({SHARE}|{NUMBER})(\s*[,;|\s]\s*({NUMBER}\s*:\s*)?"
    rf"({SHARE}|{NUMBER}))*\s*[\])}}]?",
    re.IGNORECASE,
)


def check_single(label: str, place: str) -> None:
    """Raise DataError where a label names several classes, or shares of classes.

    place: what it is the label of, for the message.
    """
    label = label.strip()
    if SEVERAL.fullmatch(label):
        raise DataError(
            f"{place}: '{label}' are several labels, but fastlt trains one class an image: give "
            "each image the label of one class, or use a trainer for multi-label data"
        )
    if SOFT.fullmatch(label) and re.search(SHARE + r"|:", label, re.IGNORECASE):
        raise DataError(
            f"{place}: '{label}' is a soft label, but fastlt trains one class an image: give the "
            "class with the largest share (mixup and label smoothing are settings of the training)"
        )
