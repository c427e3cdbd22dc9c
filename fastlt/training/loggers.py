"""Where the figures of a training go besides the RUN: TensorBoard, W&B, MLflow and Trackio.

A logger never stops a training: one that fails, or does not answer, is told in one line and left
out. What a service calls a run is kept in RUN/loggers.json, so that a resumed run goes on there;
a step that it has got already is not sent again, as services cannot take figures back.
"""

import json
import os
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from netrc import NetrcParseError, netrc
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Protocol
from urllib.parse import urlsplit
from urllib.request import getproxies

from rich.console import Console
from rich.markup import escape

from fastlt.config import Config, flat, to_toml
from fastlt.errors import MissingExtra, UserError
from fastlt.utils.files import is_disk_full, write_text
from fastlt.utils.run_files import FIGURES

KEPT = "loggers.json"
PATIENCE = 120.0  # seconds for a call: then a logger counts as dead
ONLINE_PATIENCE = 3.0  # seconds for a connection that says whether there is a network
PROJECT = "fastlt"
BATCH = 100  # parameters that MLflow takes at a time
LONGEST_PARAMETER = 500  # characters, of MLflow's older servers


class Logger(Protocol):
    """One run in one place. It is opened with the RUN, the configuration, and what is kept of it.

    kept: a dictionary, written to the RUN, in which a logger notes what it needs to go on; `step`
    in it is the last one that was logged, as it is given.
    """

    takes_back: ClassVar[bool]  # whether it replaces steps that come again

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log the figures of an epoch, which has ended with a step."""

    def finish(self, figures: Mapping[str, float], report: Path | None) -> None:
        """Log the result's figures, and report.html where there is one."""

    def close(self) -> None:
        """Let go of a run; one that has not finished goes on later."""


class TensorBoard:
    """Events in the RUN."""

    takes_back: ClassVar[bool] = True

    def __init__(self, run: Path, config: Config, kept: dict[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.events = SummaryWriter(str(run), purge_step=step + 1)
        self.step = step
        if step == 0:
            # as code, for it is shown as Markdown
            text = "".join(f"    {line}\n" for line in to_toml(config).splitlines())
            self.events.add_text("config", text)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log the figures of an epoch."""
        self.step = step
        for name, value in values.items():
            self.events.add_scalar(name, value, step)

    def finish(self, figures: Mapping[str, float], report: Path | None) -> None:
        """Log the result's figures at the last step."""
        for name, value in figures.items():
            self.events.add_scalar(f"result/{name}", value, self.step)

    def close(self) -> None:
        """Write what is left."""
        self.events.close()


class WandB:
    """Weights & Biases: WANDB_PROJECT and the like say where; offline, the run is below RUN/wandb.

    `wandb sync RUN/wandb/offline-run-*` sends it later.
    """

    takes_back: ClassVar[bool] = False

    def __init__(self, run: Path, config: Config, kept: dict[str, Any], step: int) -> None:
        import wandb

        kept.setdefault("id", secrets.token_hex(4))
        mode: Any = wandb_mode()
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=kept["id"],
            resume="allow",
            dir=run,
            mode=mode,
            config=flat(config),
            settings=wandb.Settings(init_timeout=60, console="off", silent=True),
        )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log the figures of an epoch."""
        self.run.log(dict(values), step=step)

    def finish(self, figures: Mapping[str, float], report: Path | None) -> None:
        """Log the result's figures as the summary, and the report as a file of the run."""
        self.run.summary.update({f"result/{name}": value for name, value in figures.items()})
        if report is not None:
            copied = shutil.copy(report, self.run.dir)
            self.run.save(copied, base_path=self.run.dir, policy="now")

    def close(self) -> None:
        """End the run's process."""
        self.run.finish()


def wandb_mode() -> str:
    """Return WANDB_MODE; where it is not set, offline without a login or a network."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    address = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    return "online" if has_login(address) and is_reachable(address) else "offline"


def has_login(address: str) -> bool:
    """Return whether there is a key for W&B, where `wandb login` and its users put it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        found = netrc(os.environ.get("NETRC"))
    except (OSError, NetrcParseError):
        return False
    return found.authenticators(urlsplit(address).hostname or "") is not None


class MLflow:
    """MLflow: the server of MLFLOW_TRACKING_URI, or else files in RUN/mlruns."""

    takes_back: ClassVar[bool] = False

    def __init__(self, run: Path, config: Config, kept: dict[str, Any], step: int) -> None:
        # a server that does not answer is given up in seconds, not in minutes
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        own = (run / "mlruns").resolve().as_uri()
        if "MLFLOW_TRACKING_URI" not in os.environ:
            # MLflow asks for a database in place of files, unless it is told that they are wanted
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow import MlflowClient

        self.client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or own)
        if "id" not in kept:
            created = self.client.create_run(self.experiment(), run_name=run.name)
            kept["id"] = created.info.run_id
            self.parameters(kept["id"], config)
        self.id = kept["id"]
        self.client.update_run(self.id, status="RUNNING")
        self.has_finished = False

    def experiment(self) -> str:
        """Return the experiment, which is made where there is none of its name."""
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self.client.get_experiment_by_name(name)
        return found.experiment_id if found else self.client.create_experiment(name)

    def parameters(self, run: str, config: Config) -> None:
        """Log the configuration."""
        from mlflow.entities import Param

        found = [
            Param(key, str(value)[:LONGEST_PARAMETER])
            for key, value in flat(config).items()
            if str(value)
        ]
        for first in range(0, len(found), BATCH):
            self.client.log_batch(run, params=found[first : first + BATCH])

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log figures of a step."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        found = [Metric(name, value, now, step) for name, value in values.items()]
        self.client.log_batch(self.id, metrics=found)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log the figures of an epoch."""
        self.metrics(values, step)

    def finish(self, figures: Mapping[str, float], report: Path | None) -> None:
        """Log the result's figures, and the report as an artifact."""
        self.metrics({f"result/{name}": value for name, value in figures.items()}, 0)
        if report is not None:
            self.client.log_artifact(self.id, str(report))
        self.has_finished = True

    def close(self) -> None:
        """Say how the run has ended."""
        self.client.set_terminated(self.id, "FINISHED" if self.has_finished else "KILLED")


class Trackio:
    """Trackio: its local folder, which TRACKIO_DIR may name; `trackio show` shows it."""

    takes_back: ClassVar[bool] = False

    def __init__(self, run: Path, config: Config, kept: dict[str, Any], step: int) -> None:
        import trackio

        # runs go by their names there
        self.name = kept.setdefault("name", f"{run.name}-{secrets.token_hex(3)}")
        self.run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=self.name,
            config=flat(config),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log the figures of an epoch."""
        self.run.log(dict(values), step=step)

    def finish(self, figures: Mapping[str, float], report: Path | None) -> None:
        """Log the result's figures, and the report as an artifact."""
        self.run.log({f"result/{name}": value for name, value in figures.items()})
        if report is not None:
            self.run.log_artifact(report, name=f"{self.name}-report", type="report")

    def close(self) -> None:
        """Write what is left."""
        self.run.finish()


LOGGERS: dict[str, Callable[..., Logger]] = {
    "tensorboard": TensorBoard,
    "wandb": WandB,
    "mlflow": MLflow,
    "trackio": Trackio,
}


def check_loggers(names: Sequence[str]) -> None:
    """Raise MissingExtra where the library of a logger is not installed."""
    for name in names:
        found = find_spec(name)
        if found is None or found.origin is None:  # a folder of that name here is no library
            raise MissingExtra(
                f"train.loggers names {name}, which is not installed: pip install 'fastlt[{name}]',"
                " or leave it out"
            )


def is_reachable(address: str) -> bool:
    """Return whether a connection to an address, or to the proxy that leads there, is possible."""
    to = urlsplit(address)
    proxy = getproxies().get(to.scheme)
    if proxy:
        to = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = to.port or (443 if to.scheme == "https" else 80)
    try:
        with socket.create_connection((to.hostname or "", port), timeout=ONLINE_PATIENCE):
            return True
    except OSError:
        return False


class Loggers:
    """The loggers of a run, a context manager.

    Of several ranks the first one has them; `names` of the others are none. step: the one that the
    run stands at.
    """

    def __init__(
        self, names: Sequence[str], run: Path, config: Config, step: int, console: Console
    ) -> None:
        self.run, self.config, self.step, self.console = run, config, step, console
        self.names = dict.fromkeys(names)
        self.open: dict[str, Logger] = {}
        self.kept = read_kept(run / KEPT)

    def __enter__(self) -> "Loggers":
        for name in self.names:
            kept = self.kept.setdefault(name, {})

            def begin(name: str = name, kept: dict[str, Any] = kept) -> None:
                self.open[name] = LOGGERS[name](self.run, self.config, kept, self.step)

            self.attempt(name, begin)
        self.keep()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for name, logger in [*self.open.items()]:
            self.attempt(name, logger.close)

    def scalars(self, record: Mapping[str, Any], step: int) -> None:
        """Log those values of an epoch's record that are numbers with a point."""
        values = {name: value for name, value in record.items() if isinstance(value, float)}
        for name, logger in [*self.open.items()]:
            kept = self.kept[name]
            if logger.takes_back or step > kept.get("step", -1):
                self.attempt(name, partial(logger.scalars, values, step))
                kept["step"] = step
        self.keep()

    def finish(self, result: Mapping[str, Any]) -> None:
        """Log the figures of a result, and the report of the run, which is written for them."""
        figures = {name: float(result[name]) for name in FIGURES if result.get(name) is not None}
        report = self.written_report() if self.open.keys() - {"tensorboard"} else None
        for name, logger in [*self.open.items()]:
            self.attempt(name, partial(logger.finish, figures, report))

    def written_report(self) -> Path | None:
        """Return report.html; None where it cannot be written, which is no fault of a logger."""
        from fastlt.reports.run import write_report

        try:
            return write_report(self.run)
        except UserError:
            return None

    def attempt(self, name: str, call: Callable[[], None]) -> None:
        """Call a logger; where it fails, or takes too long, say so and leave it out."""
        try:
            within(PATIENCE, call)
        except Exception as error:
            if isinstance(error, OSError) and is_disk_full(error):
                raise
            self.open.pop(name, None)
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.console.print(
                f"[yellow]note:[/] the logger {name} has failed, and is left out: "
                f"{escape(reason[:200])}",
                highlight=False,
                soft_wrap=True,
            )

    def keep(self) -> None:
        """Write what a resumed run needs."""
        kept = {name: values for name, values in self.kept.items() if values}
        if kept:
            write_text(self.run / KEPT, json.dumps(kept, indent=1) + "\n")


def read_kept(file: Path) -> dict[str, dict[str, Any]]:
    """Return what earlier starts of a run have kept; nothing where it is not there or damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def within(seconds: float, call: Callable[[], None]) -> None:
    """Call a function; raise TimeoutError where it takes longer than so many seconds.

    It goes on by itself then, but does not keep the process from ending.
    """
    errors: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True, name="logger")
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:g} s")
    if errors:
        raise errors[0] if isinstance(errors[0], Exception) else RuntimeError(repr(errors[0]))
