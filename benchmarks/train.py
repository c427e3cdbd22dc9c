"""How much the loop costs: images/s of `fastlt train` over images/s of bare forward, backward and step on resident data."""

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from fastlt.config import Config, as_override, load_config
from fastlt.data.pack import PackOptions, write_pack
from fastlt.data.source import read_collection
from fastlt.prepare import Trainer, prepare
from fastlt.train import forward_of, is_compiled, make_input, open_packs, train_step
from fastlt_benchmarks.results_file import append_rows

WARM_UP = 5  # steps; the first ones allocate memory, and compile where that is on


def run_bench_train(
    recipe: str, settings: list[str], data: str | None, steps: int, rounds: int, csv: Path | None, console: Console
) -> None:
    """The two are measured in turn, so that a machine that grows slower grows slower for both; the ratio is of each pair."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = Console(quiet=True)
        place = data or str(random_pack(Path(folder), load_config(recipe, settings), quiet))
        config = load_config(recipe, [*settings, as_override("data.pack", place)])
        trainer = prepare(config, Path(folder) / "run", open_packs(config.data))
        try:
            measured = measure(trainer, steps, rounds, console)
        finally:
            trainer.train_loader.close()
            trainer.val_loader.close()
    show(measured, trainer, recipe, console)
    if csv is not None:
        append_rows(csv, [row(measured, trainer, recipe, steps)])
        console.print(f"added to {csv}")


class Round(NamedTuple):
    bare: float  # images/s
    loop: float
    waited: float  # share of the loop's time in which the device had nothing to do, for want of images


def measure(trainer: Trainer, steps: int, rounds: int, console: Console) -> list[Round]:
    waits = Waits(trainer.device)
    bare, loop = bare_steps(trainer), loop_steps(trainer, waits)
    for step in (bare, loop):
        timed(step, WARM_UP, trainer)
    measured = []
    with console.status("measuring") as status:
        for i in range(rounds):
            (speed, _), _ = timed(bare, steps, trainer), waits.seconds()
            loop_speed, seconds = timed(loop, steps, trainer)
            measured.append(Round(speed, loop_speed, waits.seconds() / seconds))
            status.update(f"measuring: round {i + 1} of {rounds}, bare {speed:,.0f}, loop {loop_speed:,.0f} images/s")
    return measured


def timed(step: Iterator[int], steps: int, trainer: Trainer) -> tuple[float, float]:
    """Images/s of the next steps, and their seconds."""
    wait_for(trainer.device)
    began = time.perf_counter()
    images = sum(itertools.islice(step, steps))
    wait_for(trainer.device)
    seconds = time.perf_counter() - began
    return images / seconds, seconds


class Waits:
    """How long the device had nothing to do between the end of a step and the arrival of the next images.

    A GPU says so itself: a mark that it passes at the end of a step, and one that is set when the images are there. Where it is
    still at work by then, it passes both at once.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[tuple[Any, Any]] = []
        self.ended: Any = None

    def end_step(self) -> None:
        self.ended = self._mark()

    def images_arrive(self) -> None:
        if self.ended is not None:
            self.marks.append((self.ended, self._mark()))

    def seconds(self) -> float:
        """Since the last look; the first wait of a measurement, in which others were measured, is not counted."""
        marks, self.marks, self.ended = self.marks, [], None
        if self.device.type == "cuda":
            return sum(begun.elapsed_time(over) for begun, over in marks) / 1000
        return sum(over - begun for begun, over in marks)

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        mark = torch.cuda.Event(enable_timing=True)
        mark.record()
        return mark


def loop_steps(trainer: Trainer, waits: Waits) -> Iterator[int]:
    """The trainer's own loop: loader, augmentation, loss, backward, step. Yields the images of each step."""
    forward = forward_of(trainer, 0)
    for epoch in itertools.count():
        trainer.at.step_in_epoch = 0
        for batch, pixels in trainer.train_loader.iterate(trainer.plan.epoch(epoch)):
            waits.images_arrive()
            train_step(trainer, forward, batch, pixels)
            waits.end_step()
            trainer.at.step, trainer.at.step_in_epoch = trainer.at.step + 1, trainer.at.step_in_epoch + 1
            yield len(batch.labels)


def bare_steps(trainer: Trainer) -> Iterator[int]:
    """Forward, cross entropy, backward and step on one batch that lies on the device; compiled where the loop is."""
    config, device = trainer.config, trainer.device
    batch = next(trainer.plan.epoch(0))
    pixels = torch.randint(0, 256, (len(batch.labels), config.data.size, config.data.size, 3), dtype=torch.uint8)
    labels = torch.from_numpy(batch.labels) % trainer.space.num_classes
    images, target, _, _ = make_input(config, pixels, labels, torch.Generator().manual_seed(0), device)
    forward = torch.compile(bare_loss) if is_compiled(config, device) else bare_loss
    while True:
        with torch.autocast(device.type, trainer.dtype, enabled=trainer.dtype != torch.float32):
            loss = forward(trainer.model, images, target)
        loss.backward()
        trainer.updater.optimizer.step()
        trainer.updater.optimizer.zero_grad()
        yield len(target)


def bare_loss(model: torch.nn.Module, images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(model(images), target)


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def random_pack(folder: Path, config: Config, console: Console) -> Path:
    """100 target classes, each with an auxiliary, of random images in the size of the recipe: JPEG, or PNG where they are small."""
    rng = np.random.default_rng(0)
    ending = "png" if config.data.size <= 64 else "jpg"
    for split, prefix, count in (("target", "t", 20), ("auxiliary", "a", 20), ("val", "t", 1)):
        for name in range(100):
            (folder / split / f"{prefix}{name:03}").mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (config.data.size, config.data.size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / split / f"{prefix}{name:03}" / f"{i}.{ending}")
    pairs = folder / "pairs.csv"
    pairs.write_text("target,auxiliary\n" + "".join(f"t{name:03},a{name:03}\n" for name in range(100)), encoding="utf-8")
    collection = read_collection(folder / "target", folder / "auxiliary", folder / "val", pairs, None, None)
    return write_pack(collection, PackOptions(out=folder / "pack"), console)


def show(measured: list[Round], trainer: Trainer, recipe: str, console: Console) -> None:
    table = Table(
        "", "images/s, median", "min", "max", title=f"{recipe}: {trainer.config.model.name}, batch {trainer.config.data.batch}"
    )
    bare, loop, waited = (list(values) for values in zip(*measured, strict=True))
    for name, values in (("bare forward + backward + step", bare), ("fastlt train", loop)):
        table.add_row(name, f"{statistics.median(values):,.0f}", f"{min(values):,.0f}", f"{max(values):,.0f}")
    console.print(table)
    ratios = sorted(pair.loop / pair.bare for pair in measured)
    console.print(f"loop / bare, pair by pair: {statistics.median(ratios):.3f} (from {ratios[0]:.3f} to {ratios[-1]:.3f})")
    console.print(
        f"the device waited for images for {statistics.median(waited):.1%} of the time ({trainer.train_loader.engine_name})"
    )


def row(measured: list[Round], trainer: Trainer, recipe: str, steps: int) -> dict[str, object]:
    bare, loop, waited = zip(*measured, strict=True)
    return {
        "recipe": recipe, "model": trainer.config.model.name, "batch": trainer.config.data.batch, "size": trainer.config.data.size,
        "loader": trainer.train_loader.engine_name, "decode": trainer.train_loader.decode, "steps": steps, "rounds": len(measured),
        "bare_images_per_second": round(statistics.median(bare), 1), "loop_images_per_second": round(statistics.median(loop), 1),
        "ratio": round(statistics.median(pair.loop / pair.bare for pair in measured), 4),
        "waited": round(statistics.median(waited), 4),
    }  # fmt: skip
