"""The types and defaults of settings in words, as the documentation and `fastlt settings` have
them.
"""

from collections.abc import Iterable, Iterator
from typing import Any, get_args, get_origin

from pydantic import BaseModel

WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text"}


def type_of(field: Any, quote: str = "") -> str:
    """Return the type of a key, with its bounds; quote stands around what is typed as it is."""
    return " ".join([in_words(field.annotation, quote), *bounds_of(field.metadata)])


def in_words(kind: Any, quote: str = "") -> str:
    """Return a type as a user of TOML would call it."""
    if kind in WORDS:
        return WORDS[kind]
    origin, arguments = get_origin(kind), get_args(kind)
    if hasattr(kind, "__metadata__"):
        return " ".join([in_words(kind.__origin__, quote), *bounds_of(kind.__metadata__)])
    if "Literal" in str(origin):
        return " | ".join(f"{quote}{value}{quote}" for value in arguments)
    if origin is tuple and arguments[-1] is not Ellipsis:
        each = list(dict.fromkeys(in_words(argument, quote) for argument in arguments))
        return f"list of {len(arguments)}: {' / '.join(each)}"
    if origin in (tuple, list):
        return f"list of {in_words(arguments[0], quote)}"
    if origin is dict:
        return "table" if Any in arguments else f"table of {in_words(arguments[1], quote)}"
    if "Union" in str(origin):
        return " or ".join(in_words(argument, quote) for argument in arguments)
    return "table"


def bounds_of(metadata: Iterable[Any]) -> Iterator[str]:
    """Yield the bounds among the constraints of a type."""
    flat = [each for part in metadata for each in (part, *getattr(part, "metadata", ()))]
    for attribute, words in (("ge", "from"), ("gt", "above"), ("le", "to"), ("lt", "below")):
        for each in flat:
            if (value := getattr(each, attribute, None)) is not None:
                yield f"{words} {value:.10g}"


def default_of(field: Any) -> str:
    """Return the default of a key as TOML has it; of a table that has keys of its own, a dash."""
    if field.is_required():
        return "needed"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(short(one) for one in value)}]"
    return short(value)


def short(value: Any) -> str:
    """Return a value as TOML has it, numbers with at most four digits."""
    if isinstance(value, str):
        return f'"{value}"'
    return f"{value:.4g}" if isinstance(value, float) else str(value)
