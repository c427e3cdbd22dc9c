"""Triton's interpreter, quicker."""

import functools
import inspect
from typing import Any


@functools.cache
def builtins_of(package: Any, is_builtin: Any) -> list[str]:
    """Return the names of Triton's built-in functions in a module or class of its language."""
    return [name for name, member in inspect.getmembers(package) if is_builtin(member)]


def look_for_builtins_once() -> None:
    """Have the interpreter look for the functions that it replaces once a process.

    It does so at each call of a function within a kernel, which takes a third of its time.
    """
    from triton.language import core
    from triton.runtime import interpreter

    def patch_builtin(package: Any, builder: Any, scope: Any) -> None:
        for name in builtins_of(package, core.is_builtin):
            member = getattr(package, name)
            if core.is_builtin(member):  # not replaced yet
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch_builtin
