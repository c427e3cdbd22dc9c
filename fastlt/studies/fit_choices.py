"""What `fastlt fit` chooses, by the data, the machine and the time there is, with its reasons."""

import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastlt.config import Config, as_override, load_config
from fastlt.errors import UserError
from fastlt.models.backbones import import_timm
from fastlt.models.export import find_metadata
from fastlt.models.hub import cached_weights, has_hub
from fastlt.models.preprocessing import preprocessing_of, stored_architecture
from fastlt.models.weight_files import weights_file
from fastlt.packing.reader import Pack
from fastlt.training.dry_run import Memory, Speed, measure
from fastlt.training.loop import open_packs
from fastlt.training.setup import prepare

# backbones that are taken where none is named, the first that there is
ON_CPU = ("tf_efficientnet_lite0.in1k", "mobilenetv3_large_100.ra_in1k", "resnet18.a1_in1k")
ON_GPU = ("convnext_tiny.in12k_ft_in1k", "resnet50.a1_in1k", "vit_small_patch16_224.augreg_in21k")
SCRATCH_EPOCHS, FINE_TUNE_EPOCHS = 100, 30
FEWEST_EPOCHS = 8  # below, the baseline is left out
RANDOM = "it starts at random, which takes larger steps and more decay"
SMALL_SET = 20_000  # images, up to which a batch is 64
SHARE_OF_MEMORY = 0.6
OF_TIME = 0.9  # of the budget that trainings may take; packing and evaluation take the rest
SMALLEST_SIZE, STEP = 64, 32  # pixels
PLAIN_WORD = re.compile(r"[A-Za-z/][\w./-]*")  # needs no quotes in a setting


class Choice(NamedTuple):
    """A setting, and why it has this value."""

    key: str
    value: Any
    reason: str

    @property
    def override(self) -> str:
        """The setting as it is typed."""
        is_word = isinstance(self.value, str) and PLAIN_WORD.fullmatch(self.value)
        return f"{self.key}={self.value if is_word else json.dumps(self.value)}"


class Plan(NamedTuple):
    """What is trained, and how."""

    choices: list[Choice]
    epochs: int
    baseline: bool
    why_no_baseline: str = ""


# --- start


def start_choices(weights: str | None, name: str | None, device: str) -> list[Choice]:
    """Return the backbone and what it starts from.

    weights: a file, a RUN, a folder, a name of timm, or None for what there is. name: of the
    architecture, where a file does not tell. Raises UserError where it cannot be told.
    """
    if weights is not None and Path(weights).exists():
        found = name or architecture_of(Path(weights))
        return [
            Choice("model.name", found, "what --weights holds" if name is None else "--model"),
            Choice("model.weights", str(Path(weights).resolve()), "--weights"),
        ]
    if weights is not None:
        if not import_timm(weights).is_model(weights):
            raise UserError(
                f"--weights {weights} is no file, and timm has no model of that name: name a file, "
                "a RUN, or a model with weights on the hub"
            )
        return [
            Choice("model.name", weights, "--weights"),
            Choice("model.pretrained", True, "its weights are timm's, from the hub or its cache"),
        ]
    if name is not None:
        return [Choice("model.name", name, "--model; it starts at random without --weights")]
    return found_choices(device)


def found_choices(device: str) -> list[Choice]:
    """Return a pretrained backbone that is at hand, or a small one that starts at random."""
    names = ON_GPU if device == "cuda" else ON_CPU
    try:
        timm = import_timm("of the hub")
    except UserError:
        timm = None
    here = [name for name in names if timm is not None and cached_weights(timm, name)]
    if here or (timm is not None and has_hub()):
        where = "its weights are in the hub's cache" if here else "the first choice on the hub"
        return [
            Choice("model.name", (here or names)[0], f"{where}; another: --weights NAME or FILE"),
            Choice("model.pretrained", True, "a pretrained start is worth most on few images"),
        ]
    why = "timm is not installed" if timm is None else "no weights in the cache, no hub in reach"
    small = "resnet32" if device == "cuda" else "resnet20"
    return [Choice("model.name", small, f"{why}: it starts at random; far better: --weights FILE")]


def architecture_of(place: Path) -> str:
    """Return the name of the model whose weights a place holds. UserError where it does not say."""
    path = weights_file(str(place))
    if (described := find_metadata(path)) is not None:
        return str(described["model"]["name"])
    if (stored := stored_architecture(path.parent)) is not None:
        return stored
    if import_timm(path.stem).is_model(path.stem):
        return path.stem
    raise UserError(
        f"{place} does not say of which model its weights are: name it with --model, such as "
        "--model resnet50"
    )


# --- size, batch, epochs


def plan_of(
    pack: Pack,
    start: list[Choice],
    user: Sequence[str],
    budget: float | None,
    measured: Callable[[Config], tuple[Memory, Speed]],
) -> Plan:
    """Return all choices for a pack.

    user: settings that win over choices. budget: seconds that trainings may take; None: as long as
    the epochs do. measured: from a configuration to what its steps take.
    """
    given = {setting.partition("=")[0] for setting in user}
    loss = loss_choices(pack)
    base = [*start, *loss, batch_choice(len(pack.train), given)]
    pretrained = any(one.key in ("model.weights", "model.pretrained") for one in start)
    if not pretrained:
        base += [Choice("optim.lr", 0.1, RANDOM), Choice("optim.weight_decay", 5e-4, RANDOM)]
    config = configured(base, user, pack)
    size, reason = size_of(config, pack, pretrained)
    base.append(Choice("data.size", size, reason))
    config = configured(base, user, pack)
    if given >= {"data.batch", "train.precision", "train.epochs"}:  # nothing left to measure for
        return Plan(unset(base, given), config.train.epochs, True)
    memory, speed = measured(config)
    if (batch := fitting_batch(memory, config, torch.device(device_of()))) < config.data.batch:
        base.append(Choice("data.batch", batch, "what the memory holds"))
    rate = speed.images_per_second
    if device_of() == "cpu" and "train.precision" not in given:
        half = [*base, Choice("train.precision", "bf16", "")]
        _, faster = measured(configured(half, user, pack))
        if faster.images_per_second > 1.1 * rate:
            times = faster.images_per_second / rate
            base.append(Choice("train.precision", "bf16", f"{times:.1f} times as fast here"))
            rate = faster.images_per_second
    epochs = FINE_TUNE_EPOCHS if pretrained else SCRATCH_EPOCHS
    images = images_per_epoch(configured(base, user, pack), pack)
    if budget is not None and "data.size" not in given:
        smaller = affordable_size(size, OF_TIME * budget * rate / images[0])
        if smaller < size:
            base.append(Choice("data.size", smaller, "more epochs within --budget"))
            rate *= (size / smaller) ** 2
    plan = within(budget, epochs, rate, images)
    return plan._replace(choices=unset([*base, *plan.choices], given))


def within(budget: float | None, epochs: int, rate: float, images: tuple[int, int]) -> Plan:
    """Return the epochs that a budget of seconds allows, and whether the baseline is trained too.

    rate: images/s. images: of an epoch of the long-tail recipe, and of the baseline.
    """
    one, both = images[0] / rate, sum(images) / rate
    if budget is None:
        reason = f"about {duration(epochs * both)} with the baseline; less with --budget 30m"
        return Plan([Choice("train.epochs", epochs, reason)], epochs, True)
    fits = int(OF_TIME * budget / both)
    baseline = fits >= FEWEST_EPOCHS
    count = max(1, min(epochs, fits if baseline else int(OF_TIME * budget / one)))
    took = count * (both if baseline else one)
    what = "with the baseline" if baseline else "without the baseline"
    reason = f"about {duration(took)} {what}, at {rate:,.0f} images/s"
    plural = "" if fits == 1 else "s"
    missing = "" if baseline else f"--budget has time for {fits} epoch{plural} of both"
    return Plan([Choice("train.epochs", count, reason)], count, baseline, missing)


def affordable_size(size: int, epochs: float) -> int:
    """Return the size at which a few epochs fit where only `epochs` of `size` would."""
    if epochs >= FEWEST_EPOCHS:
        return size
    fits = int(size * (epochs / FEWEST_EPOCHS) ** 0.5) // STEP * STEP
    return min(size, max(SMALLEST_SIZE, fits))


def loss_choices(pack: Pack) -> list[Choice]:
    """Return the loss of the long-tail recipe for a pack."""
    if pack.space.num_auxiliaries and pack.space.pairs:
        pairs = f"{len(pack.space.pairs):,} pairs"
        return [Choice("loss.name", "neighbor-silencing", f"the pack has auxiliaries and {pairs}")]
    why = "balanced softmax: classes are uneven, and there are no pairs of neighbours"
    return [Choice("loss.name", "balanced-ce", why)]


def batch_choice(images: int, given: set[str]) -> Choice:
    """Return the batch for a number of training images."""
    batch = 64 if images <= SMALL_SET else 128
    return Choice("data.batch", batch, f"{images:,} training images")


def size_of(config: Config, pack: Pack, pretrained: bool) -> tuple[int, str]:
    """Return the pixels a side that images are given to the model with, and why."""
    heights, widths = np.asarray(pack.train.height), np.asarray(pack.train.width)
    short = int(np.median(np.minimum(heights, widths)))
    known = preprocessing_of(config.model)
    wanted = known.size if known is not None else 128 if pretrained or short >= 128 else 64
    whose = "the weights'" if known is not None else "enough for a start at random"
    if short >= wanted:
        on_cpu = device_of() == "cpu" and wanted > 128
        if on_cpu:
            return 128, f"{whose} {wanted} would take {(wanted / 128) ** 2:.1f} times as long"
        return wanted, f"{whose} size"
    size = max(min(SMALLEST_SIZE, wanted), short // STEP * STEP)
    size = min(size, 128) if device_of() == "cpu" else size
    return size, f"half of the images are at most {short} pixels high or wide"


def fitting_batch(memory: Memory, config: Config, device: torch.device) -> int:
    """Return the largest half of a half ... of the batch that the memory holds."""
    from fastlt.training.dry_run import memory_bytes

    batch, room = config.data.batch, SHARE_OF_MEMORY * memory_bytes(device)
    while batch > 8 and memory.at(batch) > room:
        batch //= 2
    return batch


def images_per_epoch(config: Config, pack: Pack) -> tuple[int, int]:
    """Return the images of an epoch with auxiliaries, and of the targets alone."""
    space = pack.space
    targets = sum(space.train_counts[: space.num_targets])
    auxiliary = space.num_auxiliaries * config.data.budget if config.data.auxiliary else 0
    return targets + auxiliary, targets


def measured_here(config: Config) -> tuple[Memory, Speed]:
    """Return what steps of a configuration take on this machine."""
    with prepare(config, Path(os.devnull), open_packs(config.data)) as trainer:
        return measure(trainer, config.data.batch)


def configured(choices: Sequence[Choice], user: Sequence[str], pack: Pack) -> Config:
    """Return the recipe with choices, and the user's settings on top."""
    place = as_override("data.pack", str(pack.path))
    return load_config("fit", [*(one.override for one in choices), *user, place])


def unset(choices: Sequence[Choice], given: set[str]) -> list[Choice]:
    """Return the last choice of each key, in the order of the keys, that the user has not set."""
    return [one for one in {one.key: one for one in choices}.values() if one.key not in given]


def device_of() -> str:
    """Return cuda where there is a GPU, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def duration(seconds: float) -> str:
    """Return a time in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def seconds_of(text: str) -> float:
    """Return the seconds of a time such as 30m, 2h, 90s or 45 (minutes). UserError for others."""
    units = {"s": 1, "m": 60, "h": 3600}
    number, unit = (text[:-1], text[-1:]) if text[-1:] in units else (text, "m")
    try:
        value = float(number) * units[unit]
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise UserError(f"--budget {text} is no time: write 30m, 2h or 90s")
    return value
