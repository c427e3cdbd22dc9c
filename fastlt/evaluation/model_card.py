"""README.md of an exported model: what it predicts, what it was trained on, how well it does."""

import json
from pathlib import Path
from typing import Any

from fastlt.classes import ClassSpace
from fastlt.utils.run_files import COLUMNS, FIGURES

SHOWN_CLASSES = 50

TIMM_USE = """```python
import timm, torch
from PIL import Image

model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
with torch.inference_mode():
    logits = model(transform(Image.open("image.jpg").convert("RGB"))[None])
print(model.pretrained_cfg["label_names"][logits.argmax().item()])
```"""
OTHER_USE = """`python load.py image.jpg` needs torch and Pillow alone; `fastlt predict FOLDER
image.jpg` does the same faster."""


def model_card(
    run: Path, space: ClassSpace, result: dict[str, Any], described: dict[str, Any], is_timm: bool
) -> str:
    """Return the model card of a RUN in Markdown, with the front matter that hubs read."""
    front = ["---", f"library_name: {'timm' if is_timm else 'fastlt'}"]
    front += ["pipeline_tag: image-classification", "tags:", "- long-tailed", "- fastlt", "---"]
    parts = [
        "\n".join(front),
        f"# {described['model']['name']}, {space.num_targets:,} classes",
        f"An image classifier for a long-tailed set of classes, trained with fastlt "
        f"(method `{described['method']['name']}`).",
        "## Use\n\n" + (TIMM_USE if is_timm else OTHER_USE),
        "## Preprocessing\n\n" + preprocessing(described),
        "## Training data\n\n" + training_data(space),
        "## Figures\n\nOn the validation images, in percent; the last epoch.\n\n" + figures(result),
        "## Limits\n\n" + limits(space, result, described),
        "## Classes\n\n" + classes(space, result),
    ]
    return "\n\n".join(parts) + "\n"


def preprocessing(described: dict[str, Any]) -> str:
    """Return how an image is prepared."""
    data = described["data"]
    ranges = "".join(
        f" Of {kind} images, values from {low:g} to {high:g} become black to white first."
        for kind, (low, high) in described.get("scale", {}).items()
    )
    size, resize = data["size"], data["eval_resize"] or data["size"]
    return (
        f"RGB; the shorter side to {resize} pixels, the centre {size} x {size}; values from 0 to "
        f"1, minus mean {list(data['mean'])}, over standard deviation {list(data['std'])}.{ranges}"
    )


def training_data(space: ClassSpace) -> str:
    """Return classes and images, and where auxiliary classes came from and under what licence."""
    counts, targets = space.train_counts, space.num_targets
    text = (
        f"{sum(counts[:targets]):,} images of {targets:,} classes, {max(counts[:targets]):,} of "
        f"the largest and {min(counts[:targets]):,} of the smallest."
    )
    if not space.num_auxiliaries:
        return text
    text += (
        f" Besides them {sum(counts[targets:]):,} images of {space.num_auxiliaries:,} auxiliary "
        "classes, which the model does not predict."
    )
    if space.curation:
        text += "\n\nHow the auxiliary classes were made, and the licences of their images:\n\n"
        text += f"```json\n{json.dumps(space.curation, indent=1)}\n```"
        return text
    return f"{text} The licence of their images is not recorded: see where they came from."


def figures(result: dict[str, Any]) -> str:
    """Return the figures of the last epoch as a table."""
    values = [shown(result.get(name)) for name in FIGURES]
    return "\n".join(
        [row(list(COLUMNS)), row(["---:"] * len(values)), row(values)],
    )


def limits(space: ClassSpace, result: dict[str, Any], described: dict[str, Any]) -> str:
    """Return what the model does not do."""
    worst = result["worst_class"]
    known = described.get("calibration", {})
    lines = [
        "- It knows these classes alone: an image of anything else gets one of them.",
        f"- Its worst class on the validation images is {worst['name']} "
        f"({shown(worst['accuracy'])} %).",
    ]
    if known.get("images"):
        lines.append(
            f"- Probabilities are of logits divided by {known['temperature']:.3f}, fitted on "
            f"{known['images']:,} validation images."
        )
    if known.get("threshold") is not None:
        lines.append(
            f"- Above a probability of {known['threshold']:.3f}, {100 * known['precision']:g} % of "
            f"the predictions were right; {100 * known['coverage']:.1f} % of the images were above."
        )
    return "\n".join(lines)


def classes(space: ClassSpace, result: dict[str, Any]) -> str:
    """Return the classes with their images and accuracy, the largest first."""
    order = sorted(range(space.num_targets), key=lambda t: -space.train_counts[t])
    rows = [
        row([cell(space.target_names[t]), f"{space.train_counts[t]:,}", shown(found)])
        for t in order[:SHOWN_CLASSES]
        for found in [result["per_class"][t]]
    ]
    more = space.num_targets - SHOWN_CLASSES
    left = [f"\nand {more:,} more, in config.json"] if more > 0 else []
    return "\n".join(
        [row(["class", "training images", "accuracy"]), row(["---"] * 3), *rows, *left]
    )


def row(cells: list[str]) -> str:
    """Return a row of a table in Markdown."""
    return f"| {' | '.join(cells)} |"


def cell(text: str) -> str:
    """Return text that does not end a cell."""
    return text.replace("|", "\\|").replace("\n", " ")


def shown(value: float | None) -> str:
    """Return a figure, - where not known."""
    return "-" if value is None else f"{value:.1f}"
