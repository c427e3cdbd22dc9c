"""Vectors for the names of classes, by which neighbours are ranked and chosen."""

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastlt.errors import UserError
from fastlt.utils.names import normalised


@dataclass(frozen=True)
class Embeddings:
    """The vectors of class names."""

    vectors: Mapping[str, np.ndarray]  # normalised name -> (D,) of length 1

    def similarity(self, names: Sequence[str], others: Sequence[str]) -> float | None:
        """The cosine of the first of the names that has a vector and the first of the others; None
        where none has.
        """
        one, other = self._first(names), self._first(others)
        return None if one is None or other is None else float(one @ other)

    def of(self, names: Sequence[str]) -> list[np.ndarray | None]:
        """Return the vector (D,) of each name, None where it has none."""
        return [self.vectors.get(normalised(name)) for name in names]

    def _first(self, names: Sequence[str]) -> np.ndarray | None:
        return next(
            (self.vectors[word] for word in map(normalised, names) if word in self.vectors), None
        )


def read_embeddings(place: str) -> Embeddings:
    """place: an .npz with `names` (n,) and one array (n, D) of floats; `FILE.npz:KEY` where it
    holds several.
    """
    path, _, key = place.partition(".npz:")
    file = Path(f"{path}.npz" if key else place)
    try:
        with np.load(file) as arrays:
            keys = [name for name in arrays.files if name != "names"]
            if (
                "names" not in arrays.files
                or not keys
                or (key or keys[0]) not in keys
                or (len(keys) > 1 and not key)
            ):
                raise UserError(
                    f"{file} must hold `names` and vectors, one of {', '.join(keys)}: name it as "
                    f"{file}:KEY"
                )
            names, vectors = arrays["names"], arrays[key or keys[0]]
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read embeddings from {file}: {error}") from error
    if vectors.ndim != 2 or vectors.dtype.kind != "f" or len(vectors) != len(names):
        raise UserError(
            f"{file}: {len(names)} names do not go with vectors of shape {vectors.shape}"
        )
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.maximum(lengths, 1e-12)
    return Embeddings(
        {normalised(str(name)): vector for name, vector in zip(names, unit, strict=True)}
    )
