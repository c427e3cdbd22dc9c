"""`fastlt extend`: classes that a run never saw, from a few images each, without training."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastlt.classes import ClassSpace
from fastlt.config import Config
from fastlt.errors import DataError, UserError
from fastlt.evaluation.evaluate import run_config
from fastlt.evaluation.predict import load_model
from fastlt.evaluation.user_images import images_below
from fastlt.losses import Task
from fastlt.methods import method_names, method_type
from fastlt.methods.method import Base
from fastlt.models.classifier import Classifier, build_model
from fastlt.models.export import export_safetensors
from fastlt.models.heads import LinearHead, with_values
from fastlt.models.weights import load_weights, read_tensors
from fastlt.utils.run_files import newest_checkpoint


def extend_run(run: Path, images: Path, to: Path) -> list[str]:
    """Write the run's model with the classes of a folder added; return their names.

    images: a folder of class folders. The targets keep their rows, so what is said of them changes
    only in that the new classes compete. Raises UserError for runs whose method gives no rows to
    new classes, and DataError for folders that hold none.
    """
    if to.suffix != ".safetensors":
        raise UserError(f"cannot write to '{to.name}': the name must end in .safetensors")
    config = run_config(run)
    if not hasattr(method_type(config.method.name), "new_rows"):
        able = [name for name in method_names() if hasattr(method_type(name), "new_rows")]
        raise UserError(
            f"{run} was trained with method.name={config.method.name}, which gives no rows to "
            f"classes that it never saw: train with --method {' or '.join(able)}"
        )
    model = load_model(run)
    known = ClassSpace.load(run / "classes.json").names
    folders = class_folders(images, [*model.classes, *known])
    shown = [images_below(folder) for folder in folders]
    features = model.features([path for paths in shown for path in paths])
    labels = torch.arange(len(shown)).repeat_interleave(torch.tensor([*map(len, shown)]))
    method: Any = trained_method(config, run)
    rows = method.new_rows(features, labels, len(folders))
    names = [folder.name for folder in folders]
    longer = with_more_rows(model.module.cpu(), rows)
    export_safetensors(longer, config, [*model.classes, *names], to, scale=model.scale)
    return names


def class_folders(images: Path, known: list[str]) -> list[Path]:
    """Return the class folders of a folder, by name.

    Raises DataError where one is of a class that the run was trained on, or holds other folders.
    """
    if not images.is_dir():
        raise DataError(f"{images} is no folder: name one that holds a folder for each new class")
    folders = sorted(path for path in images.iterdir() if path.is_dir())
    if not folders:
        raise DataError(f"{images} holds no class folders: make one for each new class")
    if already := [folder.name for folder in folders if folder.name in known]:
        raise DataError(f"'{already[0]}' in {images} is a class of the run already: leave it out")
    if above := [folder for folder in folders if any(path.is_dir() for path in folder.iterdir())]:
        raise DataError(
            f"{above[0]} holds folders, and not the images of a class: name the folder that the "
            "folders of the classes are in"
        )
    return folders


def trained_method(config: Config, run: Path) -> Base:
    """Return the method of a finished run, on the CPU, as its newest checkpoint has it."""
    checkpoint = newest_checkpoint(run)
    prefix = "ema_" if config.optim.ema else ""
    space = ClassSpace.load(run / "classes.json")
    start: dict[str, Any] = {"pretrained": False, "weights": "", "head_weights": ""}
    model = build_model(config.model.model_copy(update=start), space.num_classes, config.data.size)
    kind = method_type(config.method.name)
    model = kind.build(config.method, model)
    load_weights(checkpoint / ("ema.safetensors" if prefix else "model.safetensors"), model)
    counts = torch.tensor(space.train_counts).clamp(min=1)
    task = Task(space, counts, config.loss, config.train.epochs, torch.device("cpu"))
    method = kind(config.method, model, task)
    method.load_state_dict(read_tensors(checkpoint / f"{prefix}method.safetensors"), strict=False)
    return method.eval()


def with_more_rows(model: Classifier, rows: Tensor) -> Classifier:
    """Return a model with rows (K, D + 1) added to its linear head, biases at their end."""
    head: Any = model.head
    longer = LinearHead(head.weight.shape[1], len(head.weight) + len(rows))
    weight, bias = torch.cat([head.weight, rows[:, :-1]]), torch.cat([head.bias, rows[:, -1]])
    return Classifier(model.backbone, with_values(longer, weight, bias))
