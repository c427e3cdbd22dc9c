"""Vectors of texts about classes, by the text tower of a CLIP model of open-clip."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastlt.classes import ClassSpace
from fastlt.errors import MissingExtra, UserError
from fastlt.utils import torchvision_shim

OPEN_CLIP = "open-clip:"
TEXTS = 256  # that are encoded at a time
DESCRIPTION = "{description}"


def text_vectors(place: str, space: ClassSpace, templates: Sequence[str]) -> Tensor:
    """Return the vectors (C, D) float32 of all classes, each of length 1: of the mean of its texts.

    place: `open-clip:MODEL/WEIGHTS`, as open-clip names them, or with a local file for WEIGHTS.
    Raises MissingExtra without open-clip, and UserError for a model or weights that it lacks.
    """
    torchvision_shim.make_importable()
    try:
        import open_clip
    except ImportError as error:
        raise MissingExtra(f'{place} needs open-clip: pip install "fastlt[open-clip]"') from error
    name, _, weights = place.removeprefix(OPEN_CLIP).partition("/")
    if name not in open_clip.list_models() or not weights:
        known = ", ".join(f"{one}/{tag}" for one, tag in open_clip.list_pretrained()[:3])
        raise UserError(f"{place}: write {OPEN_CLIP}MODEL/WEIGHTS, such as {known}")
    texts = [texts_of(space, label, templates) for label in range(space.num_classes)]
    try:
        model = open_clip.create_model(name, pretrained=weights)
    except (RuntimeError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{place}: open-clip cannot load these weights ({reason})") from error
    flat = [text for some in texts for text in some]
    owner = torch.tensor([label for label, some in enumerate(texts) for _ in some])
    vectors = encoded(model.eval(), open_clip.get_tokenizer(name), flat)
    sums = vectors.new_zeros(space.num_classes, vectors.shape[1]).index_add_(0, owner, vectors)
    return F.normalize(sums, dim=1)


def texts_of(space: ClassSpace, label: int, templates: Sequence[str]) -> list[str]:
    """Return the texts of a class; those about a description are left out where it has none."""
    name = space.names[label]
    shown = space.display_names.get(name) or name.replace("_", " ").replace("-", " ")
    description = space.descriptions.get(name, "")
    usable = [one for one in templates if description or DESCRIPTION not in one]
    if not usable:
        raise UserError(
            f"'{name}' has no description, and all of model.templates name one: describe it, or "
            "add a template without {description}"
        )
    return [one.replace("{}", shown).replace(DESCRIPTION, description) for one in usable]


@torch.inference_mode()
def encoded(model: torch.nn.Module, tokenizer: object, texts: list[str]) -> Tensor:
    """Return the vectors (n, D) of texts, each of length 1."""
    parts = [
        model.encode_text(tokenizer(texts[i : i + TEXTS]), normalize=True).float()  # type: ignore[operator]
        for i in range(0, len(texts), TEXTS)
    ]
    return torch.cat(parts).clone()
