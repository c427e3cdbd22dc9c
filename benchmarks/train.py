"""The costs of the loop: images/s of `fastlt train` over those of bare steps.

Bare steps are forward, backward and step on resident data.
"""

import itertools
import resource
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from fastlt.config import Config, as_override, load_config
from fastlt.errors import UserError
from fastlt.packing.sources import read_collection
from fastlt.packing.writer import PackOptions, write_pack
from fastlt.training.inputs import is_compiled
from fastlt.training.loop import open_packs
from fastlt.training.setup import Trainer, prepare
from fastlt.utils.results_file import append_rows, check_file
from fastlt_benchmarks.timing import measure_ceilings
from fastlt_benchmarks.train_steps import Marks, bare_steps, flops_per_image, loop_steps

WARM_UP = 5  # steps; the first ones allocate memory, and compile where that is on
PARTS = {
    "wait": "waiting for images",
    "input": "to the device, augmentation",
    "forward": "forward and loss",
    "backward": "backward",
    "optimiser": "optimiser",
}


class Round(NamedTuple):
    """A measurement of each in turn, in images/s, and the seconds of the loop by part."""

    eager: float
    compiled: float | None
    loop: float
    parts: dict[str, float]

    @property
    def bare(self) -> float:
        """The images/s of the bare steps that the loop is like."""
        return self.compiled or self.eager


class Work(NamedTuple):
    """What is known of the work of an image."""

    flops_per_image: float
    # FLOP/s that a large matrix product of the run's dtype reaches on a GPU; on a CPU it is no
    # bound
    ceiling: float | None
    peak_mb: float


def run_bench_train(
    recipe: str,
    settings: list[str],
    data: str | None,
    steps: int,
    rounds: int,
    csv: Path | None,
    console: Console,
) -> None:
    """Measure loop and bare steps in turn, and print the ratio of each pair.

    So a machine that grows slower grows slower for all.
    """
    with place_of(recipe, settings, data, csv) as (folder, pack):
        config = load_config(recipe, [*settings, pack])
        with prepare(config, folder / "run", open_packs(config.data)) as trainer:
            flops = flops_per_image(trainer)
            measured = measure(trainer, steps, rounds, console)
            work = Work(flops, ceiling_of(trainer), peak_memory_mb(trainer.device))
    show(measured, work, trainer, recipe, console)
    if csv is not None:
        append_rows(csv, [row(measured, work, trainer, recipe, steps)])
        console.print(f"added to {csv}")


@contextmanager
def place_of(
    recipe: str, settings: list[str], data: str | None, csv: Path | None
) -> Iterator[tuple[Path, str]]:
    """Yield a folder for runs that are measured, and the setting of their pack: of random images
    where none is named.

    Raises UserError before anything is measured where the figures cannot be kept, or the head needs
    other processes.
    """
    if csv is not None:
        check_file(csv)
    config = load_config(recipe, settings)
    if config.model.head == "class-parallel":
        raise UserError(
            "bench-train measures one process, which has no classes to share: set model.head=linear"
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pack = data or str(random_pack(folder, config, Console(quiet=True)))
        yield folder, as_override("data.pack", pack)


def measure(trainer: Trainer, steps: int, rounds: int, console: Console) -> list[Round]:
    """Return the rounds."""
    marks = Marks(trainer.device)
    eager, loop = bare_steps(trainer, compiled=False), loop_steps(trainer, marks)
    compiled = (
        bare_steps(trainer, compiled=True) if is_compiled(trainer.config, trainer.device) else None
    )
    with console.status("warming up") as status:
        for step in (eager, compiled, loop):
            if step is not None:
                timed(step, WARM_UP, trainer)
        measured = []
        for i in range(rounds):
            bare, bare_compiled = (
                timed(eager, steps, trainer),
                timed(compiled, steps, trainer) if compiled else None,
            )
            marks.seconds()
            measured.append(
                Round(bare, bare_compiled, timed(loop, steps, trainer), marks.seconds())
            )
            last = measured[-1]
            status.update(
                f"measuring: round {i + 1} of {rounds}, bare {last.bare:,.0f}, loop "
                f"{last.loop:,.0f} images/s"
            )
    return measured


def timed(step: Iterator[int], steps: int, trainer: Trainer) -> float:
    """Return images/s of the next steps."""
    wait_for(trainer.device)
    began = time.perf_counter()
    images = sum(itertools.islice(step, steps))
    wait_for(trainer.device)
    return images / (time.perf_counter() - began)


def wait_for(device: torch.device) -> None:
    """Wait until the device has done its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ceiling_of(trainer: Trainer) -> float | None:
    """Return the FLOP/s that the device reaches, None where it is not measured."""
    on_gpu = trainer.device.type == "cuda"
    return measure_ceilings(trainer.dtype, trainer.device, quick=False).product if on_gpu else None


def peak_memory_mb(device: torch.device) -> float:
    """Return the most GPU memory that torch has held; on a CPU, that of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def random_pack(folder: Path, config: Config, console: Console) -> Path:
    """Write a pack of random images in the size of the recipe: 100 targets with auxiliaries.

    JPEG, or PNG where they are small.
    """
    rng = np.random.default_rng(0)
    ending = "png" if config.data.size <= 64 else "jpg"
    for split, prefix, count in (("target", "t", 20), ("auxiliary", "a", 20), ("val", "t", 1)):
        for name in range(100):
            (folder / split / f"{prefix}{name:03}").mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(
                    0, 256, (config.data.size, config.data.size, 3), dtype=np.uint8
                )
                Image.fromarray(pixels).save(
                    folder / split / f"{prefix}{name:03}" / f"{i}.{ending}"
                )
    pairs = folder / "pairs.csv"
    pairs.write_text(
        "target,auxiliary\n" + "".join(f"t{name:03},a{name:03}\n" for name in range(100)),
        encoding="utf-8",
    )
    collection = read_collection(
        folder / "target", folder / "auxiliary", folder / "val", pairs, None, None
    )
    return write_pack(collection, PackOptions(out=folder / "pack"), console)


def show(
    measured: list[Round], work: Work, trainer: Trainer, recipe: str, console: Console
) -> None:
    """Print the rounds."""
    title = f"{recipe}: {trainer.config.model.name}, batch {trainer.config.data.batch}"
    speeds = Table("", "images/s, median", "min", "max", title=title)
    for name, values in (
        ("bare forward + backward + step", [round.eager for round in measured]),
        ("the same, compiled", [round.compiled for round in measured if round.compiled]),
        ("fastlt train", [round.loop for round in measured]),
    ):
        if values:
            speeds.add_row(
                name,
                f"{statistics.median(values):,.0f}",
                f"{min(values):,.0f}",
                f"{max(values):,.0f}",
            )
    console.print(speeds)
    ratios = sorted(round.loop / round.bare for round in measured)
    console.print(
        f"loop / bare, pair by pair: {statistics.median(ratios):.3f} (from {ratios[0]:.3f} to "
        f"{ratios[-1]:.3f})"
    )
    parts = Table(
        "of a step's time", "%", title=f"fastlt train, loader {trainer.train_loader.engine_name}"
    )
    for part, share in shares(measured).items():
        parts.add_row(PARTS[part], f"{100 * share:.1f}")
    console.print(parts)
    speed = work.flops_per_image * statistics.median(round.loop for round in measured)
    used = (
        f", {speed / work.ceiling:.0%} of what a large matrix product reaches"
        if work.ceiling
        else ""
    )
    console.print(
        f"{work.flops_per_image / 1e9:.3g} GFLOP an image: {speed / 1e12:.3g} TFLOP/s{used}; peak "
        f"memory {work.peak_mb:,.0f} MB",
        highlight=False,
    )


def shares(measured: list[Round]) -> dict[str, float]:
    """Return the share of each part, median over the rounds."""
    return {
        part: statistics.median(
            round.parts.get(part, 0.0) / sum(round.parts.values()) for round in measured
        )
        for part in PARTS
    }


def row(
    measured: list[Round], work: Work, trainer: Trainer, recipe: str, steps: int
) -> dict[str, object]:
    """Return the figures as a row."""
    config, loop = trainer.config, statistics.median(round.loop for round in measured)
    compiled = [round.compiled for round in measured if round.compiled]
    return {
        "recipe": recipe,
        "model": config.model.name,
        "batch": config.data.batch,
        "size": config.data.size,
        "precision": str(trainer.dtype).removeprefix("torch."),
        "loader": trainer.train_loader.engine_name,
        "decode": trainer.train_loader.decode,
        "steps": steps,
        "rounds": len(measured),
        "bare_images_per_second": round(statistics.median(one.eager for one in measured), 1),
        "bare_compiled_images_per_second": round(statistics.median(compiled), 1)
        if compiled
        else "",
        "loop_images_per_second": round(loop, 1),
        "ratio": round(statistics.median(one.loop / one.bare for one in measured), 4),
        **{part: round(share, 4) for part, share in shares(measured).items()},
        "gflop_per_image": round(work.flops_per_image / 1e9, 4),
        "utilisation": round(work.flops_per_image * loop / work.ceiling, 4) if work.ceiling else "",
        "peak_memory_mb": round(work.peak_mb),
    }
