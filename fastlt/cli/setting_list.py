"""All settings of a training, with what the documentation says of them."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from fastlt.config import Config, config_type, did_you_mean, is_section
from fastlt.errors import ConfigError
from fastlt.utils.key_words import default_of, type_of


class Setting(NamedTuple):
    """A key of the configuration."""

    name: str
    """`section.key`."""
    section: str
    """The section; of the keys of a method, `method, with method.name=NAME`."""
    type: str
    default: str
    meaning: str


def listed_settings() -> list[Setting]:
    """Return all settings, those of heads, losses and methods included, in their order."""
    from fastlt.methods import method_names, section

    found = [
        setting
        for name, field in config_type().model_fields.items()
        for setting in settings_of(name, name, field.annotation)
    ]
    own = Config.model_fields["method"].annotation.model_fields  # type: ignore[union-attr]
    for method in method_names():
        title = f"method, with method.name={method}"
        found += settings_of("method", title, section(method), leave_out=own)
    return found


def settings_of(
    section: str, title: str, kind: Any, leave_out: dict[str, Any] | None = None
) -> Iterator[Setting]:
    """Yield the settings of a section."""
    for key, field in kind.model_fields.items():
        if key in (leave_out or {}):
            continue
        name = f"{section}.{key}"
        if is_section(field.annotation):
            yield from settings_of(name, name, field.annotation)
            continue
        meaning = " ".join((field.description or "").split()).replace("`", "")
        if name in NAMED:
            meaning += f" One of {', '.join(NAMED[name]())}."
        yield Setting(name, title, type_of(field), default_of(field), meaning)


def matching(settings: list[Setting], wanted: str | None) -> list[Setting]:
    """Return the settings of a section, or those whose name or meaning contains a word.

    wanted: the section, the name of a key, or the word; None: all. Raises ConfigError that names
    the nearest where nothing is found.
    """
    if wanted is None:
        return settings
    word = wanted.lower().strip()
    of_section = [one for one in settings if one.name.partition(".")[0] == word]
    found = of_section or [
        one for one in settings if word in one.name.lower() or word in one.meaning.lower()
    ]
    if found:
        return found
    known = dict.fromkeys(part for one in settings for part in (*one.name.split("."), one.name))
    raise ConfigError(
        f"no setting's name or meaning contains '{wanted}'"
        f"{did_you_mean(word, list(known)) or ': `fastlt settings` without a word lists all'}"
    )


def loss_names() -> list[str]:
    """Return the names of the losses."""
    from fastlt.losses import LOSSES

    return [*LOSSES]


def mask_names() -> list[str]:
    """Return the names of the masks."""
    from fastlt_kernels.graph import MASKS

    return [*MASKS]


def head_names() -> list[str]:
    """Return the names of the heads."""
    from fastlt.models.heads import HEADS

    return [*HEADS]


def engine_names() -> list[str]:
    """Return the names of the engines."""
    from fastlt.data.engines.choice import NAMES

    return [*NAMES]


def method_files() -> list[str]:
    """Return the names of the methods that are files."""
    from fastlt.methods import method_names

    return method_names()


# keys whose values are the names of what the code finds
NAMED = {
    "loss.name": loss_names,
    "loss.mask": mask_names,
    "model.head": head_names,
    "data.engine": engine_names,
    "method.name": method_files,
}
