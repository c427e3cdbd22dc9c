"""RUN/trial.json: the origin of a trial, how often it was begun, and how long it took.

The origin is the commit of the source and the node.

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
    """One more attempt at a trial; its time adds to that of those before."""

    def __init__(self, run: Path, node: str) -> None:
        before = read_attempts(run)
        self.path = run / FILE
        self.origin = {"commit": commit(), "node": node, "attempts": before.get("attempts", 0) + 1}
        self.seconds, self.began = before.get("seconds", 0.0), time.monotonic()
        self.note()

    def note(self) -> None:
        """Write the time so far."""
        write_text(
            self.path,
            json.dumps(
                {**self.origin, "seconds": round(self.seconds + time.monotonic() - self.began, 2)}
            )
            + "\n",
        )


def read_attempts(run: Path) -> dict[str, Any]:
    """Return what is known of the attempts at a trial; empty where none has begun."""
    try:
        found = json.loads((run / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@cache
def commit() -> str:
    """Return the commit of the source where it is a clone, with + where it was changed since."""
    here = Path(__file__).parent
    try:
        described = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return described.stdout.strip() if described.returncode == 0 else ""
