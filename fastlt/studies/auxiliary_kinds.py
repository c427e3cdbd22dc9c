"""What studies of auxiliary classes share: their kinds, names, scores, and as many images."""

import json
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from fastlt.config import load_config
from fastlt.errors import UserError
from fastlt.evaluation.evaluate import evaluate_run
from fastlt.packing.reader import open_pack

NONE, ALONE = "none, as many images", "none"
KINDS: dict[str, tuple[str, list[str]]] = {  # name -> auxiliaries of the pack, settings
    ALONE: ("none", ["loss.name=balanced-ce"]),
    NONE: ("none", ["loss.name=balanced-ce"]),
    "random": ("random", ["loss.silence=1"]),
    "neighbours": ("siblings", ["loss.silence=1"]),
    "silenced 0.1": ("siblings", ["loss.silence=0.1"]),
    "hard mask": ("siblings", ["loss.silence=0"]),
}


def as_many_images(epochs: int, pack: Path, recipe: str, settings: list[str]) -> int:
    """Return the epochs without auxiliaries in which as many images are seen as in `epochs` with
    those of a pack.
    """
    space = open_pack(str(pack)).space
    targets = sum(space.train_counts[: space.num_targets])
    budget = load_config(recipe, settings).data.budget
    return round(epochs * (targets + budget * space.num_auxiliaries) / targets)


def chosen(names: Iterable[str], patterns: tuple[str, ...]) -> list[str]:
    """Return the names that one of the patterns matches, with * for any text; all for none."""
    every = list(names)
    if not patterns:
        return every
    found = [name for name in every if any(fnmatchcase(name, one) for one in patterns)]
    if not found:
        raise UserError(f"--only {patterns[0]} matches none of: {'; '.join(every)}")
    return found


def scored_on_test(run: Path) -> dict[str, Any]:
    """Return the figures of a run on the test images of its pack, which are computed once."""
    path = run / "test.json"
    if not path.is_file():
        return evaluate_run(run, split="test")
    return json.loads(path.read_text(encoding="utf-8"))
