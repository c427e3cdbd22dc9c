"""The configuration: one tree of values, read from a recipe, changed by `section.key=value`, kept
in RUN/config.toml.
"""

import difflib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fastlt.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

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

# Of a run that goes on: what says how it is trained, not what.
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
)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


Tree = TypeVar("Tree", bound=Section)


class ModelConfig(Section):
    name: str = "resnet32"  # resnet20, resnet32, ... (6n + 2, for CIFAR), or any timm model
    pretrained: bool = False  # timm's weights for the name, unless `weights` names others
    weights: str = ""  # a RUN folder, or a local safetensors file, with backbone weights
    drop_path: Share = 0.0
    # timm backbones: computed anew in the backward pass; less memory, a third more work
    checkpoint_activations: bool = False
    # scaled: linear, with a factor per class; class-parallel: linear, and each rank holds a part of
    # the classes
    head: Literal["linear", "cosine", "scaled", "class-parallel"] = "linear"
    head_scale: Positive = 30.0  # of the cosine head
    scale_alone: bool = False  # of the scaled head the factors learn, and nothing else
    sync_bn: bool = False  # batch norm over the images of all GPUs
    # a RUN folder, or a local safetensors file: `weight` (T or C, D), and `bias`, to start the head
    # from, e.g. CLIP text features
    head_weights: str = ""


class DataConfig(Section):
    pack: str = ""  # a folder, or an address such as s3://bucket/pack
    # further packs whose training images are added: folder -> weight of each of its images
    mix: dict[str, Positive] = {}
    # of shards of a pack at an address that are kept on the local disk; for each address
    cache_gb: Positive = 100.0
    engine: Literal["auto", "resident", "dali", "ffcv", "torch"] = "auto"
    # of training images; auto: gpu with DALI, region, or else exact
    decode: Literal["auto", "region", "exact", "gpu"] = "auto"
    # stop at a training image that cannot be decoded; else another one of its class takes its place
    strict: bool = False
    workers: Annotated[int, Field(ge=0, le=512)] = 2
    prefetch: Several = 2  # batches ahead, of the dali engine
    # of the dali engine: share of the JPEGs that a GPU's decoding hardware takes
    hw_decoder_load: Share = 0.65
    # a folder in which small images are kept decoded, in memory once for all trainings that name it
    shared: str = ""
    batch: Several = 128  # over all ranks
    size: Several = 32  # pixels a side
    crop: Literal["random-resized-crop", "pad-crop", "centre-crop"] = "pad-crop"
    padding: Count = 4
    scale: tuple[Positive, Positive] = (0.08, 1.0)
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    flip: bool = True
    eval_resize: Count = 0  # shorter side before the centre crop; 0: as `size`
    mean: tuple[Finite, Finite, Finite] = (0.485, 0.456, 0.406)
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    auxiliary: bool = True  # false: train on the targets alone
    # auxiliary classes of each target: the first so many, nearest first by `similarity`; -1: all
    neighbours: OrAll = -1
    # of the auxiliary classes, drawn at random by train.seed
    auxiliary_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    # FILE.npz or FILE.npz:KEY with names and vectors of the classes, which say how near two are
    similarity: str = ""
    # cosines of target and neighbour by `similarity`; others are left out
    band: tuple[Cosine, Cosine] = (
        -1,
        1,
    )
    # random: a control, in which each target silences as many, but any others
    pairs: Literal["given", "random"] = "given"
    target_sampling: Literal["once", "class-balanced", "square-root"] = "once"
    budget: Several = 50  # images per auxiliary class and epoch
    budgets: dict[str, Count] = {}  # the same for single auxiliary classes, by name
    # > 0: auxiliary per target images, for budget
    auxiliary_ratio: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    # times that an image comes in a row, each time cut anew; an epoch has as many images as without
    repeats: Several = 1
    start_size: Count = 0  # progressive resizing: pixels a side at first; 0: `size` from the start
    # epochs between which the side grows from start_size to size
    ramp: tuple[Count, Count] = (
        0,
        0,
    )
    drop_last: bool = False


class AugmentConfig(Section):
    """On the compute device, after the crop."""

    mixup: Annotated[float, Field(ge=0)] = 0.0  # alpha of the Beta distribution; 0: off
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    randaugment: Annotated[int, Field(ge=0, le=10)] = 0  # magnitude; 0: off
    randaugment_ops: Several = 2
    # of brightness, contrast, saturation and hue
    jitter: tuple[Share, Share, Share, HalfTurn] = (
        0,
        0,
        0,
        0,
    )
    erasing: Share = 0.0  # probability per image


class LossConfig(Section):
    name: Literal[
        "neighbor-silencing",
        "balanced-ce",
        "ce",
        "focal",
        "class-balanced",
        "ldam",
        "label-aware-smoothing",
    ] = "neighbor-silencing"
    silence: Share = 0.1  # lambda_s: 1 = off, 0 = hard mask
    tau: Annotated[float, Field(ge=0)] = 1.0  # strength of the prior
    directions: Literal["both", "target_rows", "aux_rows"] = "both"
    # silence only around targets with fewer training images; 0: around all
    few_shot_below: Count = 0
    label_smoothing: BelowOne = 0.0
    gamma: Annotated[float, Field(ge=0)] = 2.0  # focal
    beta: BelowOne = 0.9999  # class-balanced, and the weights of DRW
    max_margin: Positive = 0.5  # LDAM
    drw_epoch: Count = 0  # LDAM: from this epoch on, re-weight the classes (DRW); 0: never
    smooth_head: BelowOne = 0.4  # label-aware smoothing, of the most frequent class
    smooth_tail: BelowOne = 0.1  # and of the rarest


class OptimConfig(Section):
    name: Literal["sgd", "adamw"] = "sgd"
    lr: Positive = 0.1
    # > 0: lr is per this many images, and scaled by batch / lr_base_batch ("blr" of the release:
    # 256)
    lr_base_batch: Count = 0
    momentum: Share = 0.9
    nesterov: bool = False
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 2e-4
    # learning rate per layer below the head, timm backbones
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    clip: Annotated[float, Field(ge=0)] = 0.0  # gradient norm; 0: off
    # rows of the head grow no longer than this share of the way from the shortest to the longest
    # that it starts with; 1: off
    max_norm: Share = 1.0
    accumulate: Several = 1  # batches per optimiser step
    # decay of averaged weights, which are then those evaluated and exported; 0: off
    ema: BelowOne = 0.0


class ScheduleConfig(Section):
    name: Literal["cosine", "step", "one-cycle"] = "cosine"
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    final_lr: Annotated[float, Field(ge=0)] = 0.0  # of cosine, as a share of lr
    # of step: epoch -> factor on lr from that epoch on
    steps: dict[Epoch, Annotated[float, Field(ge=0)]] = {}
    head_only_epochs: Count = 0  # the backbone is frozen for these first epochs
    # but for its batch-norm statistics, which follow the images of those epochs
    shift_bn: bool = False


class TrainConfig(Section):
    epochs: Several = 200
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    device: str = "auto"
    # auto: bf16 (fp16 where it has none) on a GPU, fp32 on a CPU
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"  # auto: on a GPU
    # reduce-overhead: by CUDA graphs, so that a GPU does not wait for a slow CPU; max-autotune: and
    # kernels that are sought longer
    compile_mode: Literal["default", "reduce-overhead", "max-autotune"] = "default"
    tf32: bool = True  # of float32 products on a GPU: 10 bits of mantissa, several times as fast
    channels_last: bool = True
    threads: Annotated[int, Field(ge=0, le=1024)] = 0  # of torch on a CPU; 0: as torch finds right
    eval_every: Several = 1  # epochs
    checkpoint_minutes: Positive = 10.0  # besides the one after each epoch
    checkpoint_steps: Count = 0  # and after as many steps; 0: by time alone
    keep: Several = 2  # checkpoints kept
    # steps in a row that are skipped because their gradient is not finite; more end the run
    max_skipped: Several = 10


class Config(Section):
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        for wrong, message in self._misfits():
            if wrong:
                raise ValueError(message)
        return self

    def _misfits(self) -> Iterator[tuple[bool, str]]:
        """What each value alone does not tell: (whether it is so, what to do about it)."""
        loss, data, schedule = self.loss, self.data, self.schedule
        mixes = bool(self.augment.mixup or self.augment.cutmix or loss.label_smoothing)
        yield (
            loss.name == "ldam" and self.model.head != "cosine",
            "loss.name=ldam needs model.head=cosine, as its margins are angles",
        )
        yield (
            self.model.head == "class-parallel" and loss.name not in LINEAR_LOSSES,
            f"model.head=class-parallel does not go with loss.name={loss.name}: choose one of "
            f"{', '.join(LINEAR_LOSSES)}",
        )
        yield (
            self.model.scale_alone and self.model.head != "scaled",
            "model.scale_alone is for model.head=scaled: set it to false",
        )
        yield (
            self.optim.max_norm < 1 and self.model.head not in ("linear", "scaled"),
            f"optim.max_norm is for linear heads, not for model.head={self.model.head}: set it to "
            "1",
        )
        yield (
            schedule.shift_bn and schedule.head_only_epochs == 0,
            "schedule.shift_bn is for epochs of the head alone: set schedule.head_only_epochs",
        )
        yield (
            loss.drw_epoch > 0 and loss.name != "ldam",
            "loss.drw_epoch is for loss.name=ldam: set it to 0",
        )
        yield (
            mixes and loss.name not in LINEAR_LOSSES,
            f"loss.name={loss.name} does not go with mixup, cutmix or label smoothing: switch them "
            "off",
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
            data.band != (-1, 1) and not data.similarity,
            "data.band needs data.similarity, vectors of the classes",
        )
        yield (
            data.auxiliary_ratio > 0 and bool(data.budgets),
            "data.auxiliary_ratio and data.budgets exclude each other",
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

    def never_comes(self) -> list[str]:
        """Settings for epochs that the run does not reach: no error, for a first look is short, but
        worth a word.
        """
        last, steps = self.train.epochs, self.schedule.steps if self.schedule.name == "step" else {}
        late: dict[str, float] = {f"schedule.steps {epoch}": int(epoch) for epoch in steps}
        late |= {
            "schedule.warmup_epochs": self.schedule.warmup_epochs,
            "loss.drw_epoch": self.loss.drw_epoch,
        }
        return [name for name, epoch in late.items() if epoch >= last]


# linear in the label, so mixed and smoothed labels are defined
LINEAR_LOSSES = (
    "neighbor-silencing",
    "balanced-ce",
    "ce",
)


def load_config(
    recipe: str,
    overrides: Sequence[str] = (),
    method: Callable[[int, int | None], Mapping[str, Any]] | None = None,
) -> Config:
    """A recipe's name or the path of a .toml file, with `section.key=value` on top.

    Raises UserError that names the nearest key.

    method: the recipe's epochs, and those of the overrides, to the settings that come between the
    two.
    """
    tree = read_recipe(recipe)
    changes = [_parsed(override) for override in overrides]
    if method is not None:
        asked = next(
            (value for keys, value in reversed(changes) if keys == ["train", "epochs"]), None
        )
        epochs = (
            checked(merged(tree, {"train": {"epochs": asked}}), recipe).train.epochs
            if asked is not None
            else None
        )
        between = method(checked(tree, recipe).train.epochs, epochs)
        changes = [*((key.split("."), value) for key, value in between.items()), *changes]
    for keys, value in changes:
        _set(tree, keys, value)
    return checked(tree, recipe)


def read_recipe(recipe: str, extended_by: tuple[str, ...] = ()) -> dict[str, Any]:
    """The tables of a recipe on top of those of the recipe that it `extends`, a name or a path
    beside its own file.
    """
    if recipe in extended_by:
        raise UserError(
            f"the recipe {recipe} extends itself: {' -> '.join([*extended_by, recipe])}"
        )
    text = _recipe_text(recipe)
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{recipe} is not valid TOML: {error}") from error
    base = tree.pop("extends", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise UserError(
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
            raise UserError(f"cannot read the recipe {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"the recipe {path} is not UTF-8 text") from error
    if recipe not in recipe_names():
        raise UserError(
            f"there is no recipe '{recipe}'{did_you_mean(recipe, recipe_names())}; recipes: "
            f"{', '.join(recipe_names())}"
        )
    return (resources.files("fastlt.recipes") / f"{recipe}.toml").read_text(encoding="utf-8")


def recipe_names() -> list[str]:
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
    """A tree of sections of its own, from a .toml file if there is one, with `section.key=value` on
    top.
    """
    tree = read_recipe(str(file)) if file else {}
    if file:
        checked(tree, str(file), model)  # so that an error says whose it is
    for override in overrides:
        _set(tree, *_parsed(override), model)
    return checked(tree, "settings", model)


def checked(tree: dict[str, Any], where: str, model: type[Tree] = Config) -> Tree:  # type: ignore[assignment]
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {_in_words(error.errors()[0], model)}") from error


def _in_words(error: Any, model: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"there is no setting '{key}'{did_you_mean(key, list(setting_names(model)))}"
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{key} = {error['input']!r}: {message}" if key else message


def _parsed(override: str) -> tuple[list[str], Any]:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise UserError(f"'{override}' is not of the form section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string, so that nobody has to quote twice in a shell
    return key.strip().split("."), value


def _set(
    tree: dict[str, Any], keys: list[str], value: Any, model: type[BaseModel] = Config
) -> None:
    name = ".".join(keys)
    known = list(setting_names(model))
    if name not in known:
        raise UserError(f"there is no setting '{name}'{did_you_mean(name, known)}")
    section = tree.setdefault(keys[0], {})
    if isinstance(section, dict):  # anything else is refused when the whole is checked
        section[keys[1]] = value


def setting_names(model: type[BaseModel] = Config) -> Iterator[str]:
    for section, field in model.model_fields.items():
        for key in field.annotation.model_fields:  # type: ignore[union-attr]
            yield f"{section}.{key}"


def did_you_mean(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f", did you mean '{near[0]}'?" if near else ""


def as_override(key: str, value: str) -> str:
    """`key=value` with the value quoted, whatever it contains."""
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def to_toml(config: Section) -> str:
    return tomli_w.dumps(config.model_dump(mode="json"))


def flat(config: Config) -> dict[str, Any]:
    """`section.key` -> value."""
    return {
        f"{section}.{key}": value
        for section, values in config.model_dump().items()
        for key, value in values.items()
    }
