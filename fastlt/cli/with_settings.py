"""Commands that take `section.key=value`: an option that is a setting is answered with the line."""

from __future__ import annotations

from typing import Any

from typer.core import TyperCommand

from fastlt.config import early_names
from fastlt.errors import ConfigError
from fastlt.utils.near_keys import near_keys


class WithSettings(TyperCommand):
    """A command after whose arguments come settings."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line. Raises ConfigError for `--epochs 2` and the like."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            # by its name: some versions of Typer bring a click of their own
            if type(error).__name__ == "NoSuchOption":
                where = "after the recipe" if ctx.info_name == "train" else "in its place"
                answer = of_option(error.option_name, given, where)  # type: ignore[attr-defined]
                if answer:
                    raise ConfigError(answer) from error
            raise


def of_option(option: str, given: list[str], where: str) -> str:
    """Return the sentence for an option that is a setting; "" where it is near none.

    given: the whole command line, for the value. where: the setting is to be written.
    """
    at = next((i for i, word in enumerate(given) if word.partition("=")[0] == option), None)
    if at is None:  # -lr is taken for -l -r
        at = next((i for i, word in enumerate(given) if word.startswith(option)), len(given))
    word, equals, value = (given[at] if at < len(given) else option).partition("=")
    if not equals:
        value = value_after(given[at + 1 :])
    keys = near_keys(word.lstrip("-"), list(early_names()))
    if not keys:
        return ""
    lines = " or ".join(f"{key}={value}" for key in keys[:3])
    return f"there is no option {word}: write {lines} {where}"


def value_after(words: list[str]) -> str:
    """Return the value of an option, from what comes after it; of a flag, true."""
    is_value = bool(words) and not words[0].startswith("--") and "=" not in words[0]
    return words[0] if is_value else "true"
