"""`fastlt fit`: from a folder of images to a model in use, with nothing else to be known."""

import json
import shlex
import time
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from fastlt.errors import UserError
from fastlt.packing.collect import collect
from fastlt.packing.holdout import Together
from fastlt.packing.reader import open_pack
from fastlt.packing.writer import PackOptions, write_pack
from fastlt.reports.run import write_report
from fastlt.studies.fit_choices import (
    Choice,
    Plan,
    configured,
    device_of,
    measured_here,
    plan_of,
    start_choices,
)
from fastlt.studies.probe import PROBE, ProbeOptions, run_probe
from fastlt.utils.commands import run_command
from fastlt.utils.files import write_text
from fastlt.utils.run_files import BEST, FIT, METRICS, read_result, result_of

PACK, BASELINE = "pack", "baseline"  # in RUN
# images whose features are computed before the training at most, and of a second of --budget
PROBED, PROBED_A_SECOND = 20_000, 5
# settings that change what the features of images are
OF_FEATURES = ("model.args", "model.pooling", "model.projection", "data.mean", "data.std")
HOLDOUT = 0.2


class FitOptions(NamedTuple):
    """The options of the command."""

    images: Path
    out: Path
    auxiliary: Path | None = None
    pairs: Path | None = None
    val: Path | None = None
    test: Path | None = None
    groups: Path | None = None
    holdout: float = HOLDOUT
    weights: str | None = None
    model: str | None = None
    budget: float | None = None  # seconds
    baseline: bool = True
    settings: tuple[str, ...] = ()

    def described(self) -> dict[str, Any]:
        """Return what a RUN was made from, as its file keeps it."""
        values = self._asdict()
        del values["out"]
        return {name: str(v) if isinstance(v, Path) else v for name, v in values.items()}


def run_fit(options: FitOptions, console: Console) -> bool:
    """Pack, choose, train the baseline and the long-tail recipe, and compare them.

    What has been done in RUN is not done again. Returns whether all has finished; a training that
    was stopped goes on when this is called again. Raises UserError where RUN was made otherwise, or
    a training fails.
    """
    began = time.monotonic()
    if (plan := kept_plan(options)) is not None:
        pack = packed(options, console)
    else:
        # first, as nothing is packed for weights that are not there
        start = start_choices(options.weights, options.model, device_of())
        pack = packed(options, console)
        plan = chosen(options, pack, start, console, time.monotonic() - began)
        write_plan(options, plan)
    print_plan(plan, options, console)
    probe(plan, options, pack, console)
    runs = {"long-tail recipe": options.out}
    overrides = [*(one.override for one in plan.choices), *options.settings]
    if plan.baseline and options.baseline:
        baseline = options.out / BASELINE
        alone = ["loss.name=ce", "data.auxiliary=false"]
        if not trained(baseline, pack, [*overrides, *alone], console):
            return False
        runs = {"plain baseline": baseline, **runs}
    elif options.baseline:
        console.print(f"the plain baseline is left out: {plan.why_no_baseline}", highlight=False)
    if not trained(options.out, pack, overrides, console):
        return False
    write_report(options.out, baseline=runs.get("plain baseline"))
    console.print(comparison(runs))
    return True


# --- pack and plan


def packed(options: FitOptions, console: Console) -> Path:
    """Return the pack in RUN, written if it is not there yet."""
    place = options.out / PACK
    if place.is_dir():
        console.print(f"{place} is there already", highlight=False)
        return place
    collection = collect(
        target=options.images,
        auxiliary=None if options.auxiliary is None else str(options.auxiliary),
        val=options.val,
        test=options.test,
        holdout=0.0 if options.val is not None else options.holdout,
        pairs=options.pairs,
        together=None if options.val is not None else Together(options.groups, near=True),
    )
    return write_pack(collection, PackOptions(out=place, drop_leaks=True), console)


def chosen(
    options: FitOptions, place: Path, start: list[Choice], console: Console, took: float
) -> Plan:
    """Return what is trained and how, by measuring a few steps. took: seconds of packing."""
    budget = None if options.budget is None else max(1.0, options.budget - took)
    with console.status("measuring a few steps"):
        return plan_of(open_pack(str(place)), start, options.settings, budget, measured_here)


def kept_plan(options: FitOptions) -> Plan | None:
    """Return the plan of a RUN that was begun; None where there is none.

    Raises UserError where it was begun with other images or options.
    """
    path = options.out / FIT
    if not path.is_file():
        if options.out.is_dir() and any(options.out.iterdir()) and not is_begun(options.out):
            raise UserError(
                f"{options.out} holds something that is not of `fastlt fit`: name another folder "
                "with --out"
            )
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        kept, plan = found["options"], found["plan"]
        choices = [Choice(*one) for one in plan["choices"]]
        known = Plan(choices, plan["epochs"], plan["baseline"], plan["why_no_baseline"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): remove {options.out}") from error
    now = json.loads(json.dumps(options.described()))
    if differ := [name for name, value in now.items() if value != kept.get(name)]:
        before, wanted = (
            "none" if values.get(differ[0]) is None else values[differ[0]] for values in (kept, now)
        )
        raise UserError(
            f"{options.out} was begun with another {shown_as(differ[0])} ({before}, not {wanted}): "
            "name another folder with --out, or call it as before"
        )
    return known


def shown_as(name: str) -> str:
    """Return an argument of the command as it is typed."""
    return {"images": "IMAGES", "settings": "list of settings"}.get(name, f"--{name}")


def is_begun(out: Path) -> bool:
    """Return whether a folder holds the pack at most, which comes first; what is hidden was cut."""
    return {path.name for path in out.iterdir() if not path.name.startswith(".")} <= {PACK}


def write_plan(options: FitOptions, plan: Plan) -> None:
    """Keep options and plan in RUN, so that the same command goes on."""
    kept = {"options": options.described(), "plan": plan._asdict()}
    write_text(options.out / FIT, json.dumps(kept, indent=1) + "\n")


def print_plan(plan: Plan, options: FitOptions, console: Console) -> None:
    """Print every choice with its reason, and the settings of the user's own."""
    table = Table("setting", "value", "because", title="chosen; set any yourself: KEY=VALUE")
    for one in plan.choices:
        table.add_row(one.key, str(one.value), one.reason)
    for setting in options.settings:
        key, _, value = setting.partition("=")
        table.add_row(key, value, "you set it")
    console.print(table)


def probe(plan: Plan, options: FitOptions, pack: Path, console: Console) -> None:
    """Print how far the features of a pretrained backbone go without training, if not done before.

    It is left out where the backbone starts at random, or its features would take long.
    """
    found = open_pack(str(pack))
    config = configured(plan.choices, options.settings, found)
    model = config.model
    if not (model.weights or model.pretrained) or (options.out / PROBE).is_file():
        return
    images = len(found.train) + len(found.val)
    affordable = PROBED if options.budget is None else round(PROBED_A_SECOND * options.budget)
    if images > min(PROBED, affordable):
        console.print(
            f"the probe of {images:,} images is left out: see `fastlt probe "
            f"{shlex.quote(str(pack))} --backbone {model.name}`",
            highlight=False,
            soft_wrap=True,
        )
        return
    own = tuple(one for one in options.settings if one.startswith(OF_FEATURES))
    wanted = ProbeOptions(
        str(pack), model.name, model.weights, config.data.size, out=options.out, settings=own
    )
    run_probe(wanted, console)


# --- training


def trained(run: Path, pack: Path, overrides: list[str], console: Console) -> bool:
    """Train into a RUN, from where it stopped, and return whether it has finished.

    Raises UserError where the training fails.
    """
    if result_of(run) is not None:
        return True
    words = ["train", "fit", "--data", str(pack), "--out", str(run), *overrides]
    console.print(f"\n[bold]$ fastlt {shlex.join(words)}[/]", highlight=False, soft_wrap=True)
    if code := run_command(*words):
        raise UserError(f"the training in {run} ended with code {code}: see above")
    if result_of(run) is None:
        console.print("the same `fastlt fit` goes on from there", highlight=False)
        return False
    return True


def comparison(runs: dict[str, Path]) -> Table:
    """Return the figures of the last and of the best epoch of each run."""
    table = Table("", "top-1", "balanced", *METRICS[1:], title="on validation images, in percent")
    table.columns[0].no_wrap = True
    for name, run in runs.items():
        result = read_result(run)
        best = result["best"]
        for row, figures in ((name, result), (f"  best, epoch {best['epoch']}", best)):
            values = [figures.get(key) for key in ("top1", "balanced_accuracy", *METRICS[1:])]
            table.add_row(row, *("-" if v is None else f"{v:.1f}" for v in values))
    return table


def print_ending(run: Path, console: Console) -> None:
    """Print where the report is, and the line to call for predictions."""
    result = read_result(run)
    best = result["best"].get("balanced_accuracy") or 0.0
    is_best_better = (run / BEST).is_file() and best > (result["balanced_accuracy"] or 0.0)
    place = run / BEST if is_best_better else run
    note = "  # the best epoch; RUN alone is the last one" if is_best_better else ""
    console.print(f"report: {run / 'report.html'}", highlight=False, soft_wrap=True)
    console.print(
        f"predict: [bold]fastlt predict {shlex.quote(str(place))} IMAGES[/]{note}",
        highlight=False,
        soft_wrap=True,
    )
