"""The keys that classes declare, read from the text of their file.

Losses and heads add keys to the configuration, and stand in files that import torch. A misspelt
key is refused before that takes its seconds.
"""

import ast
from functools import cache
from pathlib import Path


@cache
def declared_keys(file: Path, base: str) -> tuple[str, ...]:
    """Return the annotated names of all classes of a Python file that extend `base`, in its text.

    Classes within classes count, and those that extend one found before.
    """
    bases, keys = {base}, dict[str, None]()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef) and bases & {ast.unparse(one) for one in node.bases}:
            bases.add(node.name)
            keys |= dict.fromkeys(
                entry.target.id
                for entry in node.body
                if isinstance(entry, ast.AnnAssign) and isinstance(entry.target, ast.Name)
            )
    return tuple(keys)
