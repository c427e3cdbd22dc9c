"""Weights of others that a backbone starts from, made to fit it as timm does."""

import re
import sys
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fastlt.errors import UserError
from fastlt.models.weight_files import read_weights

# what wrappers and larger models put before the names of a backbone's tensors
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "encoder.", "visual.")
CLASSIFIERS = re.compile(r"^(head|fc|classifier|last_linear|head_dist)\b")
COUNTER = "num_batches_tracked"
SHOWN = 3  # names of tensors in a message


def load_backbone(backbone: nn.Module, path: Path) -> list[str]:
    """Fill a backbone with the weights of a file; return a sentence about each adaptation.

    The file is safetensors, or of torch, with names of timm, of torch or of a RUN. Its classifier
    is left out, position embeddings of another size are resampled, and counters of batch norm may
    be missing. Raises UserError that names the first tensors where anything else does not fit.
    """
    own = backbone.state_dict()
    stored = without_prefix(read_weights(path), own)
    weights = filtered(stored, backbone)
    missing = [name for name in own if name not in weights and not name.endswith(COUNTER)]
    wrong = [
        f"{name} {tuple(weights[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in weights and weights[name].shape != tensor.shape
    ]
    unknown = [name for name in weights if name not in own]
    if missing or wrong:
        parts = [
            named(missing, "is missing", "are missing"),
            named(wrong, "has another shape", "have another shape"),
            named(unknown, "is unknown", "are unknown"),
        ]
        raise UserError(
            f"{path} does not fit the model (is model.name the one that it is of?): "
            + "; ".join(part for part in parts if part)
        )
    backbone.load_state_dict(
        {name: weights.get(name, tensor) for name, tensor in own.items()}, strict=True
    )
    return adaptations(stored, weights, own)


def adaptations(
    stored: dict[str, Tensor], weights: dict[str, Tensor], own: dict[str, Tensor]
) -> list[str]:
    """Return a sentence about each way in which a file was made to fit.

    stored: the tensors of the file; weights: the same, resampled; own: those of the backbone.
    """
    said = []
    for name, tensor in weights.items():
        if name in own and name in stored and stored[name].shape != tensor.shape:
            said.append(f"{name} is resized from {shape(stored[name])} to {shape(tensor)}")
    left_out = [name for name in weights if name not in own]
    rows = [weights[name] for name in left_out if CLASSIFIERS.match(name)]
    if rows:
        said.append(f"its classifier of {max(len(part) for part in rows):,} classes is left out")
    others = [name for name in left_out if not CLASSIFIERS.match(name)]
    if others:
        said.append(named(others, "is left out", "are left out"))
    counters = [name for name in own if name.endswith(COUNTER) and name not in weights]
    if counters:
        said.append(f"it has no {COUNTER} for {len(counters)} batch norms, which count from 0")
    return said


def shape(tensor: Tensor) -> str:
    """Return the shape of a tensor in words."""
    return " x ".join(map(str, tensor.shape))


def named(names: list[str], one: str, several: str) -> str:
    """Return how many there are and the first of them; nothing for none."""
    if not names:
        return ""
    first = ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    return (
        f"{len(names)} tensor{'s' * (len(names) > 1)} {one if len(names) == 1 else several} "
        f"({first})"
    )


def without_prefix(weights: dict[str, Tensor], own: dict[str, Any]) -> dict[str, Tensor]:
    """Return weights under the names of a backbone: without what stands before all of them, and
    then without the prefix that makes most of them known.
    """
    while common := next((p for p in PREFIXES if all(n.startswith(p) for n in weights)), None):
        if not weights or any(name in own for name in weights):
            break
        weights = renamed(weights, common)
    candidates = [weights, *(renamed(weights, prefix) for prefix in PREFIXES)]
    return max(candidates, key=lambda found: len(found.keys() & own.keys()))


def renamed(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return weights without a prefix where they have it."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items()}


def filtered(weights: dict[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """Return weights as timm would load them: other names, position embeddings resampled.

    timm's file of an architecture brings a function for that where its weights come in several
    forms.
    """
    convert = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    if convert is None:
        return weights
    try:
        return convert(dict(weights), backbone)
    except Exception:  # not the file's form: what does not fit is told by the caller
        return weights
