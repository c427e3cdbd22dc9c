"""Compare two checkouts of fastlt on one machine: packs, weights of short runs, and figures must be
the same.

usage: python tests/compatibility/compare.py BEFORE [AFTER]     each the root of a checkout; AFTER
is this one by default

Both are installed, without their dependencies, into a temporary folder. Exit code 1 where they
differ.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve()


def recorded(checkout: Path, folder: Path) -> dict[str, dict[str, str]]:
    """Install a checkout into `folder` and return what record.py prints for it."""
    site = folder / "site"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--target",
            str(site),
            str(checkout),
        ],
        check=True,
    )
    done = subprocess.run(
        [sys.executable, str(HERE.with_name("record.py")), str(folder / "cases")],
        check=True,
        stdout=subprocess.PIPE,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(site)},
    )
    return json.loads(done.stdout)


def differences(before: dict[str, dict[str, str]], after: dict[str, dict[str, str]]) -> list[str]:
    """Return a line for each case and entry of `before` that `after` lacks or has otherwise."""
    return [
        f"{case}: {entry}"
        for case, entries in before.items()
        for entry, value in entries.items()
        if after.get(case, {}).get(entry) != value
    ]


def compare(before: Path, after: Path) -> list[str]:
    """Return where two checkouts differ; empty where they agree."""
    with tempfile.TemporaryDirectory() as temporary:
        folders = Path(temporary) / "before", Path(temporary) / "after"
        for folder in folders:
            folder.mkdir()
        found = [
            recorded(checkout, folder)
            for checkout, folder in zip((before, after), folders, strict=True)
        ]
    for case, entries in found[0].items():
        print(f"{case}: {len(entries)} entries compared")
    return differences(*found)


if __name__ == "__main__":
    different = compare(
        Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else HERE.parents[2]
    )
    print("\n".join(["they differ in:", *different]) if different else "all are the same")
    sys.exit(bool(different))
