"""RUN/trial.json: by which source and on which node a trial was trained, how often it was begun,
and how long it took.

What a killed attempt did after its last epoch is not counted.
"""

import json
import subprocess
import time
from functools import cache
from pathlib import Path
from typing import Any

from fastlt.utils.files import write_text

FILE = "trial.json"


class Attempt:
    """One more of a trial; its time adds to that of those before."""

    def __init__(self, run: Path, node: str) -> None:
        before = read_attempts(run)
        self.path = run / FILE
        self.told = {"commit": commit(), "node": node, "attempts": before.get("attempts", 0) + 1}
        self.seconds, self.began = before.get("seconds", 0.0), time.monotonic()
        self.note()

    def note(self) -> None:
        write_text(
            self.path,
            json.dumps(
                {**self.told, "seconds": round(self.seconds + time.monotonic() - self.began, 2)}
            )
            + "\n",
        )


def read_attempts(run: Path) -> dict[str, Any]:
    """Empty where none has begun."""
    try:
        found = json.loads((run / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@cache
def commit() -> str:
    """Of the source that is running, where it is a clone; with + where it was changed since."""
    here = Path(__file__).parent
    try:
        told = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return told.stdout.strip() if told.returncode == 0 else ""
