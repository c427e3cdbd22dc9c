"""`fastlt doctor`: what is installed here, for bug reports."""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, requires, version
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from fastlt.cli.app import app, console
from fastlt.errors import UserError

BASE = ("fastlt", "torch", "triton", "numpy", "torchvision")
ABSENT = "not installed"
OPTIONAL = re.compile(r"""([\w.-]+).*\bextra == ["'](\w+)["']""")  # a requirement of an extra
PLATFORMS = {
    "linux": "Linux: all of fastlt runs here",
    "darwin": "macOS: everything runs, on the CPU alone; Triton kernels, DALI and the GPU (mps) "
    "are not used",
    "win32": "Windows: fastlt does not run here; use it within WSL 2 (Linux)",
}


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Print versions, GPUs, engines and what is missing: for bug reports."""
    found = examine()
    if as_json:
        print(json.dumps(found, indent=1))
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    for section, entries in found.items():
        table.add_row(f"[bold]{section}[/]", "")
        for name, value in entries.items():
            table.add_row(f"  {escape(name)}", escape(str(value)), end_section=False)
    console.print(table, highlight=False)


def examine() -> dict[str, dict[str, Any]]:
    """Return what is installed here, section by section; nothing is compiled or run on a GPU."""
    return {
        "versions": {"Python": platform.python_version()}
        | {name: installed(name) for name in BASE},
        "machine": machine(),
        "GPU": gpus(),
        "optional libraries": optional(),
        "JPEG decoder": decoders(),
        "engines": engines(),
    }


def installed(name: str) -> str:
    """Return the version of a package, or "not installed"."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ABSENT


def machine() -> dict[str, Any]:
    """Return the platform, what works on it, and the cores of this process."""
    from fastlt.utils.pool import cores

    supported = PLATFORMS.get(sys.platform, f"{sys.platform}: not tried")
    return {"platform": platform.platform(), "support": supported, "CPU cores": cores()}


def gpus() -> dict[str, str]:
    """Return each GPU with its memory, and the driver."""
    try:
        import torch
    except ImportError:
        return {"GPU": "unknown, as torch is not installed"}
    if not torch.cuda.is_available():
        has_mps = torch.backends.mps.is_available()
        return {
            "GPU": "no GPU" + (", for mps is not supported: the CPU is used" if has_mps else "")
        }
    found = {}
    for number in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(number)
        found[f"GPU {number}"] = f"{about.name}, {about.total_memory / 2**30:.0f} GiB"
    return found | {"driver": driver(), "CUDA of torch": str(torch.version.cuda)}


def driver() -> str:
    """Return the version of the NVIDIA driver, or "unknown"."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        ended = subprocess.run(query, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return next(iter(ended.stdout.split()), "unknown")


def optional() -> dict[str, str]:
    """Return the version of each library that an extra brings, or how to install it."""
    try:
        found = [OPTIONAL.match(line) for line in requires("fastlt") or []]
    except PackageNotFoundError:
        return {"unknown": "fastlt runs from its source, without being installed"}
    pairs = sorted((match[1], match[2]) for match in found if match and match[2] != "dev")
    extras = dict(reversed(pairs))  # library -> extra, of several the first
    return {
        name: f"not installed: pip install fastlt[{extras[name]}]" if state == ABSENT else state
        for name, state in ((name, installed(name)) for name in sorted(extras))
    }


def decoders() -> dict[str, str]:
    """Return which parts of fastlt's own JPEG decoder were compiled."""
    from fastlt.decode.region import check_transcoder, region_obstacle

    return {
        "of regions": region_obstacle("data.decode=region") or "available",
        "transcoder": available(lambda: check_transcoder("fastlt pack --transcode")),
    }


def engines() -> dict[str, str]:
    """Return for each engine of the loader "available", or what is in its way."""
    try:
        import torch

        from fastlt.data.engines.choice import ENGINES
        from fastlt.data.engines.dali import import_dali
        from fastlt.data.engines.ffcv.native import import_ffcv
        from fastlt.data.engines.gpu import torchvision_decoder
    except ImportError as error:
        return {"unknown": f"{error.name} is not installed"}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    libraries = {"ffcv": import_ffcv, "dali": import_dali}
    found = {
        name: available(libraries[name]) if name in libraries else "available"
        for name in dict.fromkeys(engine.name for engine in ENGINES)
    }
    return found | {"torch with data.decode=gpu": available(lambda: torchvision_decoder(device))}


def available(check: Callable[[], object]) -> str:
    """Return "available", or the sentence of the UserError that the check raises."""
    try:
        check()
    except UserError as error:
        return str(error)
    return "available"
