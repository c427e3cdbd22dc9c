"""When two names mean the same class."""

import re
import unicodedata


def normalised(name: str) -> str:
    """Lower case, single spaces for all that is neither letter nor digit, the last word in the
    singular.
    """
    folded = unicodedata.normalize("NFKC", name).casefold()
    words = re.sub(r"[^\w]+|_+", " ", folded).split()
    return " ".join([*words[:-1], singular(words[-1])]) if words else ""


def singular(word: str) -> str:
    """English plurals that end in s.

    What is no plural may change too, but alike on both sides of a comparison.
    """
    if len(word) > 4 and word.endswith("ies"):
        return f"{word[:-3]}y"
    if len(word) > 4 and word.endswith(("ches", "shes", "sses", "xes", "zes")):
        return word[:-2]
    return (
        word[:-1]
        if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is"))
        else word
    )
