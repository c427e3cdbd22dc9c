"""The configuration: one tree of values, read from a recipe, changed by `section.key=value`.

What a run was trained with is kept in RUN/config.toml. Sections are closed: a key that no section
has is refused. Losses and methods bring numbers of their own (`loss.gamma`, `method.teacher`),
which are checked by their own classes: see `fastlt.losses` and `fastlt.methods`.
"""

import copy
import difflib
import itertools
import json
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from pkgutil import resolve_name
from typing import Annotated, Any, Literal, TypeVar, get_origin

import tomli_w
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    model_validator,
)

from fastlt.errors import ConfigError
from fastlt.utils.declared import declared_keys
from fastlt.utils.groups import Grouping
from fastlt.utils.near_keys import no_setting

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ADAPT = r"^(full|head|bitfit|norm|lora|adaptformer|vpt-shallow|vpt-deep|last:[1-9][0-9]*)$"
Share = Annotated[float, Field(ge=0, le=1)]
HalfTurn = Annotated[float, Field(ge=0, le=0.5)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
OrAll = Annotated[int, Field(ge=-1)]
Cosine = Annotated[float, Field(ge=-1, le=1)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Epoch = Annotated[str, Field(pattern=r"^[0-9]+$")]
Count = Annotated[int, Field(ge=0)]
Several = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]

# Settings that say how a run is trained, not what: they may change when it is resumed.
MAY_CHANGE = (
    "data.pack",
    "data.cache_gb",
    "data.workers",
    "data.engine",
    "data.strict",
    "data.prefetch",
    "data.hw_decoder_load",
    "data.shared",
    "train.device",
    "train.threads",
    "train.checkpoint_minutes",
    "train.checkpoint_steps",
    "train.keep",
    "train.max_skipped",
    "train.loggers",
)


# Keys of [loss] in version 0.1.0, which are a mask now; their values -> the mask's.
OLD_DIRECTIONS = {"both": "both", "target_rows": "target-rows", "aux_rows": "auxiliary-rows"}
OLD_KEYS = ("loss.directions", "loss.few_shot_below")


def listed(value: Any) -> Any:
    """Return a bare word, or several with commas between, as a list; anything else as it is."""
    if not isinstance(value, str):
        return value
    return [word.strip() for word in value.split(",") if word.strip()]


Loggers = Annotated[
    tuple[Literal["tensorboard", "wandb", "mlflow", "trackio"], ...], BeforeValidator(listed)
]


class Section(BaseModel):
    """A table of the configuration; the docstring below a key is its meaning."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


Tree = TypeVar("Tree", bound=Section)

# Sections to which heads, losses and methods add keys of their own: section -> `module:function`
# that returns its class for a method's name. By name, for these rooms stand above this file.
OPEN_SECTIONS = {
    "model": "fastlt.models.heads:section",
    "loss": "fastlt.losses:section",
    "method": "fastlt.methods:section",
}
# Files whose classes below Section declare the keys that are added, for what is checked before
# torch is imported; the keys of methods are checked later.
DECLARED_IN = {"model": "models/heads.py", "loss": "losses.py"}
# `module:function` -> pairs of whether settings contradict each other, and what to do about it
CHECKS = (
    "fastlt.losses:misfits",
    "fastlt.models.heads:misfits",
    "fastlt.data.engines.choice:misfits",
)
# `module:function` from a method's name to what it sets elsewhere, by `section.key`
METHOD_SETTINGS = "fastlt.methods:settings_of"


class AdapterConfig(Section):
    """The modules that `model.adapt` adds to a backbone."""

    rank: Several = 4
    """Of lora and adaptformer: the width of their bottleneck."""
    alpha: Annotated[float, Field(ge=0)] = 0.0
    """Of lora: its product is scaled by alpha over rank; 0: as rank."""
    dropout: Share = 0.0
    """Of lora and adaptformer: dropout within them."""
    prompts: Several = 10
    """Of vpt-shallow and vpt-deep: how many tokens."""


class ModelConfig(Section):
    """The backbone and the head."""

    name: str = "resnet32"
    """resnet20, resnet32, ... (6n + 2 layers, for CIFAR), or the name of any timm model."""
    args: dict[str, int | float | bool | str] = {}
    """Further arguments of timm's model, such as {patch_size = 4, depth = 6}."""
    pretrained: bool = False
    """Start from timm's weights for the name, unless `weights` names others."""
    weights: str = ""
    """A RUN or exported folder, or a local file, .safetensors, .pth or .bin, with the weights that
    the backbone starts from; size, mean and deviation of images follow them, unless set."""
    adapt: Annotated[str, Field(pattern=ADAPT)] = "full"
    """What is trained besides the head: full, the backbone; head, nothing; last:K, its K topmost
    layers; bitfit, its biases; norm, its norms; lora, or for vision transformers adaptformer,
    vpt-shallow or vpt-deep, small modules that are put into it. Statistics of batch norm move
    with full and last:K alone."""
    adapter: AdapterConfig = AdapterConfig()
    """The numbers of these modules."""
    drop_path: Share = 0.0
    """Stochastic depth: the share of residual branches that are dropped, for timm backbones."""
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass (timm): less memory, a third more work."""
    head: str = "linear"
    """The head: scaled has a factor per class, batch-norm normalises features, class-parallel
    splits the classes over ranks."""
    sync_bn: bool = False
    """Take batch-norm statistics over the images of all GPUs."""
    head_weights: str = ""
    """What the head starts from: a RUN folder, a safetensors file with `weight` (T or C, D) and
    perhaps `bias`; FILE.npz or FILE.npz:KEY with `names` and vectors of the classes, of which each
    class takes that of its name; open-clip:MODEL/WEIGHTS, texts of the names by CLIP; or means, of
    the features of each class."""
    templates: tuple[str, ...] = ("a photo of a {}.",)
    """The texts of a class for open-clip, whose vectors are averaged: {} is its name, and
    {description} its description."""
    pooling: Literal["default", "patches"] = "default"
    """The features of a vision transformer: its own, mostly the class token; or the mean of its
    patch tokens."""
    projection: bool = False
    """Keep the projection of CLIP's images, so that features are compared with those of texts."""


class DataConfig(Section):
    """The pack, how its images are loaded, and which of them make an epoch."""

    pack: str = ""
    """The PACK: a folder, or an address such as s3://bucket/pack."""
    mix: dict[str, Positive] = {}
    """Further packs whose training images are added: folder -> weight of each of its images."""
    cache_gb: Positive = 100.0
    """Size of the local cache of a pack at an address, in GB; for each address."""
    engine: str = "auto"
    """The engine that loads images; auto takes the fastest there is and prints which."""
    decode: Literal["auto", "region", "exact", "gpu"] = "auto"
    """How training images are decoded; auto: gpu with DALI, else region, or else exact."""
    strict: bool = False
    """Stop at a training image that cannot be decoded, instead of taking another of its class."""
    workers: Annotated[int, Field(ge=0, le=512)] = 2
    """Processes or threads that load images; 0: the training's own."""
    prefetch: Several = 2
    """Batches that the dali engine prepares ahead."""
    hw_decoder_load: Share = 0.65
    """Share of the JPEGs that a GPU's decoding hardware takes, with the dali engine."""
    shared: str = ""
    """A folder for small decoded images, held in memory once for all trainings that name it."""
    batch: Several = 128
    """Images per batch, over all ranks."""
    size: Several = 32
    """Pixels a side of what the model is given."""
    crop: Literal["random-resized-crop", "pad-crop", "centre-crop"] = "pad-crop"
    """How training images are cut."""
    padding: Count = 4
    """Pixels of padding of pad-crop."""
    scale: tuple[Positive, Positive] = (0.08, 1.0)
    """Smallest and largest share of the area that random-resized-crop takes."""
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    """Smallest and largest ratio of width to height that random-resized-crop takes."""
    flip: bool = True
    """Mirror half of the training images."""
    eval_resize: Count = 0
    """Pixels of the shorter side before the centre crop of evaluation; 0: as `size`."""
    mean: tuple[Finite, Finite, Finite] = (0.485, 0.456, 0.406)
    """Mean of red, green and blue, of values from 0 to 1, that is taken off."""
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    """Standard deviation of red, green and blue that is divided by."""
    auxiliary: bool | Literal["merged"] = True
    """Train on auxiliary classes too; false: on the targets alone; merged: a control, in which
    their images are of their target, of several the one with the fewest training images."""
    neighbours: OrAll = -1
    """Auxiliary classes of each target: the first so many, nearest first by `similarity` where
    that is given; -1: all."""
    auxiliary_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the auxiliary classes that is used, drawn at random by train.seed."""
    similarity: str = ""
    """FILE.npz or FILE.npz:KEY with names and vectors of the classes: how near two are."""
    band: tuple[Cosine, Cosine] = (-1, 1)
    """Cosines of target and neighbour by `similarity` between which neighbours are used."""
    pairs: Literal["given", "random"] = "given"
    """random: a control, in which each target silences as many auxiliaries, drawn at random."""
    target_sampling: Literal["once", "class-balanced", "square-root"] = "once"
    """How often target images come in an epoch: each once, or by class."""
    budget: Several = 50
    """Images per auxiliary class and epoch."""
    budget_by: Literal["class", "anchor"] = "class"
    """anchor: an auxiliary class whose target with the fewest training images is medium, with from
    21 to 100 of them (more than `few_images`, at most `many_images`), gets as many instead of
    `budget`, as in the authors' release."""
    budgets: dict[str, Count] = {}
    """The budget of single auxiliary classes, by name."""
    class_weights: dict[str, Positive] | str = {}
    """What images count in the loss by their class: weights by its name, or a CSV with the columns
    class,weight; 1 of others."""
    sample_weights: str = ""
    """A CSV with the columns image,weight: what single training images count in the loss, times the
    weight of their class; 1 of others."""
    auxiliary_ratio: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Auxiliary images per target image, in place of `budget`; 0: by `budget`."""
    repeats: Several = 1
    """Times that an image comes in a row, each time cut anew; the length of an epoch stays."""
    views: Several = 1
    """Times that each image of a batch comes in it, each time cut anew, for methods that compare
    views: a batch then has so many times `batch` images."""
    features: Literal["off", "cache"] = "off"
    """cache: compute the features of a backbone that stands still (model.adapt=head) once, and keep
    them in the pack's folder; heads are trained on them."""
    feature_views: Several = 5
    """Views of each training image, cut and augmented anew, whose features are kept."""
    start_size: Count = 0
    """Progressive resizing: pixels a side at first; 0: `size` from the start."""
    ramp: tuple[Count, Count] = (0, 0)
    """Epochs between which the side grows from `start_size` to `size`."""
    drop_last: bool = False
    """Leave out the last batch of an epoch where it is short."""
    groups: Literal["count", "thirds"] = "count"
    """The groups many, medium and few of figures: by the training images of a class, between
    `few_images` and `many_images`, or thirds of the classes, the most frequent first."""
    many_images: Several = 100
    """Targets with more training images are many, in figures and for `budget_by`."""
    few_images: Several = 20
    """Targets with fewer training images are few, in figures and for `budget_by`."""

    @property
    def grouping(self) -> Grouping:
        """The rule by which targets are many, medium or few."""
        return Grouping(self.groups, self.many_images, self.few_images)


class AugmentConfig(Section):
    """Augmentation on the compute device, after the crop."""

    mixup: NotNegative = 0.0
    """Alpha of the Beta distribution of mixup; 0: off."""
    cutmix: NotNegative = 0.0
    """Alpha of the Beta distribution of CutMix; 0: off."""
    randaugment: Annotated[int, Field(ge=0, le=10)] = 0
    """Magnitude of RandAugment; 0: off."""
    randaugment_ops: Several = 2
    """Operations of RandAugment per image."""
    jitter: tuple[Share, Share, Share, HalfTurn] = (0, 0, 0, 0)
    """Strength of the changes of brightness, contrast, saturation and hue."""
    erasing: Share = 0.0
    """Probability that a rectangle of an image is erased."""


class LossConfig(Section):
    """The loss. Each loss brings further keys of its own, listed with it."""

    name: str = "neighbor-silencing"
    """The loss."""
    silence: Share = 0.1
    """lambda_s of neighbour silencing: 1 = off, 0 = hard mask."""
    tau: NotNegative = 1.0
    """Strength of the prior of neighbor-silencing and balanced-ce."""
    mask: str = "both"
    """The rule of which classes a label silences: of pairs, in both directions or in rows of
    targets or of auxiliaries alone; few-shot, around rare targets alone; -back, auxiliaries silence
    all other auxiliaries too, and -alone, all classes; normal, all auxiliaries but a target's
    own."""
    few_shot_images: Several = 100
    """Targets with fewer training images are rare, for the masks of few-shot."""
    label_smoothing: BelowOne = 0.0
    """Label smoothing of neighbor-silencing, balanced-ce and ce."""


class OptimConfig(Section):
    """The optimiser."""

    name: Literal["sgd", "adamw"] = "sgd"
    """sgd or adamw."""
    lr: Positive = 0.1
    """Learning rate, which the schedule multiplies."""
    lr_base_batch: Count = 0
    """Above 0: `lr` is per this many images and scaled with the batch (256: the release's blr)."""
    momentum: Share = 0.9
    """Momentum of SGD."""
    nesterov: bool = False
    """Nesterov's momentum, for SGD."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """Betas of AdamW."""
    weight_decay: NotNegative = 2e-4
    """Weight decay: of all parameters with SGD, of matrices alone with AdamW."""
    backbone_lr: Positive = 1.0
    """Factor on the learning rate of the backbone; the head keeps `lr`."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Factor on the learning rate per layer below the head, for timm backbones."""
    clip: NotNegative = 0.0
    """Largest norm of the gradient; 0: any."""
    max_norm: Share = 1.0
    """Rows of the head grow no longer than this share of the way from the shortest to the longest
    that it starts with (MaxNorm); 1: off."""
    accumulate: Several = 1
    """Batches per optimiser step."""
    ema: BelowOne = 0.0
    """Decay of averaged weights, which are then evaluated and exported; 0: off."""


class ScheduleConfig(Section):
    """The learning rate over the epochs."""

    name: Literal["cosine", "step", "one-cycle"] = "cosine"
    """cosine, step or one-cycle."""
    warmup_epochs: NotNegative = 0.0
    """Epochs in which the rate rises to `optim.lr`."""
    final_lr: NotNegative = 0.0
    """Where cosine ends, as a share of optim.lr."""
    steps: dict[Epoch, NotNegative] = {}
    """For step: epoch -> factor on optim.lr from that epoch on."""
    head_only_epochs: Count = 0
    """First epochs in which the backbone is frozen."""
    head_only_lr: Positive = 1.0
    """Factor on the learning rate in those epochs."""
    shift_bn: bool = False
    """Let the batch-norm statistics of the frozen backbone follow the images of those epochs."""


class TrainConfig(Section):
    """The length of the training, the machine, and checkpoints."""

    epochs: Several = 200
    """Epochs."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of everything random."""
    device: str = "auto"
    """A torch device; auto: a GPU where there is one."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 (fp16 where it has none) on a GPU, fp32 on a CPU."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile; auto: on a GPU."""
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    """reduce-overhead: by CUDA graphs, for small models; max-autotune: a longer search too."""
    tf32: bool = True
    """float32 products on a GPU with 10 bits of mantissa, several times as fast."""
    channels_last: bool = True
    """Keep images and weights in channels_last memory format."""
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    """Threads of torch on a CPU; 0: torch's own choice."""
    eval_every: Several = 1
    """Epochs between evaluations on the val split."""
    monitor: Literal["top1", "balanced_accuracy"] = "top1"
    """The figure on the val split by which the best epoch is told."""
    patience: Count = 0
    """Evaluations in a row without a new best one after which the training ends early; 0: never."""
    keep_best: bool = False
    """Keep the model of the best epoch as well, in RUN/best.safetensors."""
    checkpoint_minutes: Positive = 10.0
    """Minutes between checkpoints, besides the one after each epoch."""
    checkpoint_steps: Count = 0
    """Steps between checkpoints; 0: by time alone."""
    keep: Several = 2
    """Checkpoints that are kept."""
    max_skipped: Several = 10
    """Steps skipped in a row, for gradients that are not finite, after which a run ends."""
    loggers: Loggers = ("tensorboard",)
    """Where figures go besides RUN: tensorboard, wandb, mlflow and trackio; []: nowhere."""


class MethodConfig(Section):
    """The method, by its name, with the numbers that its file declares."""

    name: str = "plain"
    """A file of fastlt/methods: `fastlt methods` lists them."""


class Config(Section):
    """The whole configuration of a training."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()
    method: MethodConfig = MethodConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        if type(self) is Config:  # without the keys that heads, losses and methods add
            return self
        checks = [resolve_name(place)(self) for place in CHECKS]
        for wrong, message in itertools.chain(*checks, self._misfits()):
            if wrong:
                raise ValueError(message)
        return self

    def _misfits(self) -> Iterator[tuple[bool, str]]:
        """Yield pairs of whether settings contradict each other, and what to do about it."""
        data, schedule = self.data, self.schedule
        yield (
            schedule.head_only_lr != 1 and schedule.head_only_epochs == 0,
            "schedule.head_only_lr is for epochs of the head alone: set schedule.head_only_epochs",
        )
        yield (
            schedule.shift_bn and schedule.head_only_epochs == 0,
            "schedule.shift_bn is for epochs of the head alone: set schedule.head_only_epochs",
        )
        yield (
            schedule.name == "step" and not schedule.steps,
            "schedule.name=step needs schedule.steps, e.g. {160 = 0.01, 180 = 0.0001}",
        )
        yield (
            schedule.name == "one-cycle" and schedule.warmup_epochs > 0,
            "schedule.name=one-cycle warms up by itself: drop warmup_epochs",
        )
        yield (
            not data.scale[0] <= data.scale[1] <= 1,
            f"data.scale={list(data.scale)} must ascend and end at 1 or below",
        )
        yield data.ratio[0] > data.ratio[1], f"data.ratio={list(data.ratio)} must ascend"
        yield (
            0 < data.eval_resize < data.size,
            f"data.eval_resize={data.eval_resize} is less than data.size={data.size}: raise it, or "
            "0",
        )
        yield data.band[0] > data.band[1], f"data.band={list(data.band)} must ascend"
        yield (
            data.few_images > data.many_images,
            f"data.few_images={data.few_images} is more than data.many_images={data.many_images}: "
            "lower the one or raise the other",
        )
        yield (
            data.band != (-1, 1) and not data.similarity,
            "data.band needs data.similarity, vectors of the classes",
        )
        yield (
            data.auxiliary_ratio > 0 and bool(data.budgets),
            "data.auxiliary_ratio and data.budgets exclude each other",
        )
        is_cached = data.features == "cache"
        yield (
            is_cached and (self.model.adapt != "head" or schedule.shift_bn),
            "data.features=cache needs a backbone that stands still: set model.adapt=head, and "
            "leave out schedule.shift_bn",
        )
        yield (
            is_cached and (self.augment.mixup > 0 or self.augment.cutmix > 0),
            "data.features=cache keeps features of single images: set augment.mixup=0 and "
            "augment.cutmix=0",
        )
        yield (
            is_cached and data.start_size > 0,
            "data.features=cache keeps features of one size of images: set data.start_size=0",
        )
        yield (
            data.start_size == 0 and data.ramp != (0, 0),
            "data.ramp is for data.start_size: set that too, or leave both out",
        )
        yield (
            data.start_size > data.size,
            f"data.start_size={data.start_size} is more than data.size={data.size}: lower it, or 0",
        )
        yield (
            data.start_size > 0 and not data.ramp[0] < data.ramp[1],
            "data.start_size needs data.ramp, the epochs from and to which images grow, not "
            f"{list(data.ramp)}",
        )
        yield (
            self.optim.nesterov and self.optim.momentum == 0,
            "optim.nesterov needs optim.momentum above 0",
        )
        yield (
            self.optim.nesterov and self.optim.name != "sgd",
            f"optim.nesterov is for optim.name=sgd, not {self.optim.name}",
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by value: the class with the keys of heads, losses and methods has no module."""
        return _unpickled, (self.model_dump(),)


@cache
def config_type(method: str = "plain") -> type[Config]:
    """Return the Config with the keys that heads, losses and the named method add to its sections.

    Raises ConfigError for a method that does not exist.
    """
    opened = {name: resolve_name(place)(method) for name, place in OPEN_SECTIONS.items()}
    fields: dict[str, Any] = {name: (section, section()) for name, section in opened.items()}
    return create_model("Config", __base__=Config, __module__=__name__, **fields)


def _unpickled(tree: dict[str, Any]) -> Config:
    return config_type(tree["method"]["name"]).model_validate(tree)


def never_reached(config: Config) -> list[str]:
    """Return the settings for epochs that a run does not reach: no error, but worth a note."""
    last, schedule = config.train.epochs, config.schedule
    late: dict[str, float] = {}
    if schedule.name == "step":
        late |= {f"schedule.steps {epoch}": int(epoch) for epoch in schedule.steps}
    late["schedule.warmup_epochs"] = schedule.warmup_epochs
    late |= {f"loss.{name}": value for name, value in config.loss if name.endswith("_epoch")}
    return [name for name, epoch in late.items() if epoch >= last]


def load_config(
    recipe: str,
    overrides: Sequence[str] | Mapping[str, Any] = (),
    method: Callable[[int, int | None], Mapping[str, Any]] | None = None,
) -> Config:
    """Return the configuration of a recipe with `section.key=value` on top.

    recipe: a name, or the path of a .toml file. overrides: texts `section.key=value`, or values by
    `section.key`. method: from the epochs of the recipe, and those of the overrides or None, to the
    settings that come between the two, by `section.key`: see `fastlt.methods.method_settings`.
    Raises ConfigError that names the nearest key.
    """
    tree = read_recipe(recipe)
    if isinstance(overrides, Mapping):
        changes = [(key.split("."), value) for key, value in overrides.items()]
    else:
        changes = [_parsed(override) for override in overrides]
    check_early(tree, changes, recipe)
    name = _last(changes, "method", "name")
    if name is not None:
        tree = merged(tree, {"method": {"name": name}})
        own = resolve_name(METHOD_SETTINGS)(name)
        changes = [*((key.split("."), value) for key, value in own.items()), *changes]
    if method is not None:
        epochs_set = _last(changes, "train", "epochs")
        longer = merged(tree, {"train": {"epochs": epochs_set}})
        epochs = checked(longer, recipe).train.epochs if epochs_set is not None else None
        between = method(checked(tree, recipe).train.epochs, epochs)
        changes = [*((key.split("."), value) for key, value in between.items()), *changes]
        tree = merged(tree, {"method": {"name": _last(changes, "method", "name") or _method(tree)}})
    for keys, value in changes:
        _set(tree, keys, value, config_type(_method(tree)))
    return checked(tree, recipe)


def check_settings(recipe: str, overrides: Sequence[str]) -> None:
    """Refuse what `load_config` would refuse at once, without importing torch; see check_early."""
    check_early(read_recipe(recipe), [_parsed(override) for override in overrides], recipe)


def check_early(
    tree: Mapping[str, Any], changes: Sequence[tuple[list[str], Any]], where: str
) -> None:
    """Refuse keys and values that are wrong whatever the method, without importing torch.

    Whether settings fit together, and those of methods, is checked with the whole. Raises
    ConfigError as that does.
    """
    early: dict[str, Any] = copy.deepcopy(dict(tree))
    known = list(early_names())
    for keys, value in changes:
        if keys[0] != "method":
            _set(early, keys, value, known=known)
    for name, field in Config.model_fields.items():
        table, section = early.get(name, {}), field.annotation
        if not isinstance(table, dict) or section is None:
            continue
        own = {key: value for key, value in table.items() if key in section.model_fields}
        try:
            section.model_validate(own)
        except ValidationError as error:
            found = error.errors()[0]
            found["loc"] = (name, *found["loc"])
            raise ConfigError(f"{where}: {_in_words(found, Config)}") from error


def early_names() -> Iterator[str]:
    """Yield the names `section.key` of all settings but those that methods add."""
    yield from setting_names(Config)
    for section, file in DECLARED_IN.items():
        for key in _added_keys(section, file):
            yield f"{section}.{key}"


def _added_keys(section: str, file: str) -> Iterable[str]:
    """Return the keys that are added to a section: of its class, where that is imported already.

    A script may have added losses or heads of its own to it.
    """
    place = OPEN_SECTIONS[section]
    if place.partition(":")[0] in sys.modules:
        own = Config.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
        return [key for key in resolve_name(place)("plain").model_fields if key not in own]
    return declared_keys(Path(__file__).parent / file, "Section")


def _last(changes: Sequence[tuple[list[str], Any]], *keys: str) -> Any:
    """Return the value that the last of the changes gives to a key; None where none does."""
    return next((value for key, value in reversed(changes) if key == [*keys]), None)


def _method(tree: Mapping[str, Any]) -> str:
    """Return the method that a tree names, whatever else may be wrong with the tree."""
    table = tree.get("method")
    name = table.get("name", "plain") if isinstance(table, dict) else "plain"
    return name if isinstance(name, str) else "plain"


def with_changes(config: Config, settings: Mapping[str, Any]) -> Config:
    """Return a configuration with other values for some `section.key`."""
    tree = config.model_dump()
    for key, value in settings.items():
        _set(tree, key.split("."), value, config_type(_method(tree)))
    return checked(tree, "settings")


def read_recipe(recipe: str, extended_by: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the tables of a recipe on top of those of the recipe that it `extends`.

    `extends` is a name, or a path beside the recipe's own file.
    """
    if recipe in extended_by:
        raise ConfigError(
            f"the recipe {recipe} extends itself: {' -> '.join([*extended_by, recipe])}"
        )
    text = _recipe_text(recipe)
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{recipe} is not valid TOML: {error}") from error
    base = tree.pop("extends", None)
    for key in OLD_KEYS:
        if Path(recipe).name != "config.toml" and _has(tree, key):
            _warn_of_old(key)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(
            f"{recipe}: extends = {base!r} must be the name of a recipe or the path of a .toml file"
        )
    if base.endswith(".toml"):
        base = str(Path(recipe).parent / base)
    return merged(read_recipe(base, (*extended_by, recipe)), tree)


def _recipe_text(recipe: str) -> str:
    path = Path(recipe)
    if path.suffix == ".toml":
        try:
            return path.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot read the recipe {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"the recipe {path} is not UTF-8 text") from error
    if recipe not in recipe_names():
        raise ConfigError(
            f"there is no recipe '{recipe}'{did_you_mean(recipe, recipe_names())}; recipes: "
            f"{', '.join(recipe_names())}"
        )
    return (resources.files("fastlt.recipes") / f"{recipe}.toml").read_text(encoding="utf-8")


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with fastlt."""
    files = resources.files("fastlt.recipes").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """Return `base` with `change` laid over it: tables are merged, all else is replaced."""
    result = dict(base)
    for key, value in change.items():
        is_table = isinstance(value, dict) and isinstance(result.get(key), dict) and key != "steps"
        result[key] = merged(result[key], value) if is_table else value
    return result


def with_settings(model: type[Tree], file: Path | None, overrides: Sequence[str]) -> Tree:
    """Return a tree of other sections than a training's.

    It is read from a .toml file if there is one, with `section.key=value` on top.
    """
    tree = read_recipe(str(file)) if file else {}
    if file:
        checked(tree, str(file), model)  # so that an error says whose it is
    for override in overrides:
        _set(tree, *_parsed(override), model)
    return checked(tree, "settings", model)


def checked(tree: dict[str, Any], where: str, model: type[Tree] | None = None) -> Any:
    """Return the tree as a model, by default the Config of its method.

    Raises ConfigError that says where the tree comes from, and which key is wrong.
    """
    kind: Any = model or config_type(_method(tree))
    tree = with_mask(tree)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_in_words(error.errors()[0], kind)}") from error


def with_mask(tree: dict[str, Any]) -> dict[str, Any]:
    """Return a tree in which a mask takes the place of the keys of version 0.1.0."""
    loss = tree.get("loss")
    if not isinstance(loss, dict) or not {"directions", "few_shot_below"} & loss.keys():
        return tree
    loss = dict(loss)
    if "mask" in loss:
        raise ConfigError(
            "loss.mask takes the place of loss.directions and loss.few_shot_below: leave these out"
        )
    mask = "both"
    is_few, side = mask.startswith("few-shot"), mask.removeprefix("few-shot").lstrip("-") or "both"
    if "directions" in loss:
        given = loss.pop("directions")
        side = OLD_DIRECTIONS.get(given, given)
    below = loss.pop("few_shot_below", None)
    if isinstance(below, int):
        is_few = below > 0
        loss |= {"few_shot_images": below} if is_few else {}
    few = "few-shot" if side == "both" else f"few-shot-{side}"
    return {**tree, "loss": {**loss, "mask": few if is_few else side}}


def _has(tree: Mapping[str, Any], key: str) -> bool:
    """Return whether a tree has a key `section.key`."""
    section, name = key.split(".")
    table = tree.get(section)
    return isinstance(table, dict) and name in table


def _warn_of_old(key: str) -> None:
    warnings.warn(
        f"the setting {key} of fastlt 0.1 is now part of loss.mask: see the migration page",
        FutureWarning,
        stacklevel=4,
    )


def _in_words(error: Any, model: type[BaseModel]) -> str:
    key, value = ".".join(str(part) for part in error["loc"]), error["input"]
    if error["type"] == "extra_forbidden":
        if "." not in key and isinstance(value, dict):
            return f"there is no section [{key}]{did_you_mean(key, list(model.model_fields))}"
        return no_setting(key, list(setting_names(model)))
    message = str(error["msg"]).removeprefix("Value error, ")
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+,\d+", value) and "number" in message:
        message = f"a decimal point, not a comma, is needed: write {key}={value.replace(',', '.')}"
    elif error["type"] == "literal_error":
        message = _of_literal(key, value, error["ctx"]["expected"])
    return f"{key} = {value!r}: {message}" if key else message


def _of_literal(key: str, value: Any, expected: str) -> str:
    """Return which values a key may have, in words, and the line with the one that was meant."""
    words = re.findall(r"'([^']*)'", expected)
    if isinstance(value, bool):
        meant = ["on" if value else "off"]
    else:
        meant = difflib.get_close_matches(str(value).lower(), words, n=1)
    write = f"; write {key}={meant[0]}" if meant and meant[0] in words and "." in key else ""
    return f"it is one of {expected.replace(' or ', ', ')}{write}"


def _parsed(override: str) -> tuple[list[str], Any]:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        example = f": write {override}=VALUE" if override in early_names() else ""
        raise ConfigError(f"'{override}' is not of the form section.key=value{example}")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string, so that nobody has to quote twice in a shell
    return key.strip().split("."), value


def _set(
    tree: dict[str, Any],
    keys: list[str],
    value: Any,
    model: type[BaseModel] | None = None,
    known: Sequence[str] = (),
) -> None:
    """Set a key of a tree. Raises ConfigError where it is none of the model, nor of `known`."""
    name = ".".join(keys)
    known = known or list(setting_names(model))
    if name in OLD_KEYS and "loss.mask" in known:
        if model is not None:
            _warn_of_old(name)
    elif name not in known:
        raise ConfigError(_of_another_method(name) or no_setting(name, known, as_text(value)))
    section = tree.setdefault(keys[0], {})
    if isinstance(section, dict):  # anything else is refused when the whole is checked
        for key in keys[1:-1]:
            section = section.setdefault(key, {})
        section[keys[-1]] = _of_type(value, field_of(model or Config, *keys))


def field_of(model: Any, *keys: str) -> Any:
    """Return the field of a setting; None where there is no such key."""
    field = None
    for key in keys:
        field = model.model_fields.get(key)
        if field is None:
            return None
        model = field.annotation
    return field


def _of_type(value: Any, field: Any) -> Any:
    """Return `0.5,0.5,0.5` as a list where the setting is one; anything else as it is."""
    if field is None or get_origin(field.annotation) is not tuple or not isinstance(value, str):
        return value
    try:
        return tomllib.loads(f"value = [{value}]")["value"] if "," in value else value
    except tomllib.TOMLDecodeError:
        return value


def as_text(value: Any) -> str:
    """Return a value as it is written after `section.key=`; "" for a table, which is quoted."""
    if isinstance(value, dict):
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _of_another_method(name: str) -> str:
    """Return the sentence that a key is of other methods than the one that is trained, or ""."""
    section, _, key = name.partition(".")
    if section != "method":
        return ""
    files = sorted((Path(__file__).parent / "methods").glob("*.py"))
    of = [
        file.stem.replace("_", "-") for file in files if key in declared_keys(file, "MethodConfig")
    ]
    return (
        f"there is no setting '{name}' without method.name={' or '.join(of)}: add --method {of[0]}"
        if of
        else ""
    )


def setting_names(model: type[BaseModel] | None = None) -> Iterator[str]:
    """The names `section.key` of all settings, by default those of a plain training."""
    model = model or config_type()
    for section, field in model.model_fields.items():
        yield from names_below(section, field.annotation)


def names_below(section: str, kind: Any) -> Iterator[str]:
    """Yield the names of the keys of a section, those of sections within it included."""
    for key, field in kind.model_fields.items():
        if is_section(field.annotation):
            yield from names_below(f"{section}.{key}", field.annotation)
        else:
            yield f"{section}.{key}"


def is_section(kind: Any) -> bool:
    """Return whether a setting is a table of others."""
    return isinstance(kind, type) and issubclass(kind, Section)


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Return ", did you mean 'x'?" for the known word nearest to a misspelt one, or nothing."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f", did you mean '{near[0]}'?" if near else ""


def as_override(key: str, value: str) -> str:
    """Return `key=value` with the value quoted, whatever it contains."""
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def to_toml(config: Section) -> str:
    """Return a configuration as TOML text."""
    return tomli_w.dumps(config.model_dump(mode="json"))


def flat(config: Config) -> dict[str, Any]:
    """Return the values of a configuration by `section.key`."""
    tree = config.model_dump()
    return {name: _value_of(tree, name) for name in setting_names(type(config))}


def _value_of(tree: Any, name: str) -> Any:
    for key in name.split("."):
        tree = tree[key]
    return tree
