"""How quick forward and backward of EfficientNet-lite0 are on a CPU, with the gradient of depthwise
weights as torch has it and as we have it, in turn: `python -m fastlt_benchmarks.depthwise`.
"""

import copy
import statistics
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich import print as show
from torch import nn

from fastlt.models.backbones import import_timm
from fastlt.models.depthwise import quicken
from fastlt.utils.results_file import append_rows, check_file

NAME, BATCH = "tf_efficientnet_lite0", 64


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each, in turn.")] = 5,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    csv: Annotated[Path | None, typer.Option(help="Add the figures to this file.")] = None,
) -> None:
    """Measure images/s of forward and backward at several sizes."""
    if csv is not None:
        check_file(csv)
    torch.set_num_threads(threads)
    rows = [measured(size, rounds) | {"threads": threads} for size in (32, 64, 96, 128)]
    for row in rows:
        show(row)
    if csv is not None:
        append_rows(csv, rows, "python -m fastlt_benchmarks.depthwise")


def measured(size: int, rounds: int) -> dict[str, float | str]:
    """Return the median images/s of both ways at a size, and of their ratio round by round."""
    plain = import_timm(NAME).create_model(NAME, num_classes=50).train()
    plain = plain.to(memory_format=torch.channels_last)
    quick = copy.deepcopy(plain)
    quicken(quick)
    images = torch.randn(BATCH, 3, size, size).contiguous(memory_format=torch.channels_last)
    speeds = [[rate(model, images) for model in (plain, quick)] for _ in range(rounds + 1)][1:]
    return {
        "model": NAME,
        "batch": BATCH,
        "size": size,
        "torch_images_per_second": round(statistics.median(one for one, _ in speeds), 1),
        "own_images_per_second": round(statistics.median(other for _, other in speeds), 1),
        "ratio": round(statistics.median(other / one for one, other in speeds), 3),
    }


def rate(model: nn.Module, images: torch.Tensor) -> float:
    """Return images/s of a forward and backward pass."""
    began = time.perf_counter()
    model(images).sum().backward()
    return len(images) / (time.perf_counter() - began)


if __name__ == "__main__":
    typer.run(main)
