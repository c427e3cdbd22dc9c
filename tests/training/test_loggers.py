import json
import os
import threading
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import fastlt.training.loggers as loggers
from fastlt.config import load_config
from fastlt.errors import MissingExtra, UserError
from fastlt.training.loggers import (
    KEPT,
    Loggers,
    check_loggers,
    has_login,
    is_reachable,
    wandb_mode,
    within,
)
from fastlt.training.loop import train
from fastlt.utils.signals import Stopped

CONFIG = load_config("demo")
SMALL = [
    "model.name=resnet8",
    "data.size=16",
    "data.eval_resize=16",
    "data.batch=16",
    "train.epochs=3",
    "train.eval_every=1",
    "data.workers=0",
    "train.threads=1",
]


class Noted:
    """A logger that notes what it is given."""

    takes_back = False
    calls: ClassVar[list[tuple]] = []

    def __init__(self, run, config, kept, step):
        kept.setdefault("id", "first")
        self.calls.append(("begin", kept["id"], step))

    def scalars(self, values, step):
        self.calls.append(("scalars", dict(values), step))

    def finish(self, figures, report):
        self.calls.append(("finish", dict(figures), report and report.name))

    def close(self):
        self.calls.append(("close",))


@pytest.fixture
def noted(monkeypatch):
    monkeypatch.setattr(Noted, "calls", [])
    monkeypatch.setitem(loggers.LOGGERS, "wandb", Noted)
    monkeypatch.setattr(loggers, "find_spec", lambda name: find_spec("tensorboard"))
    return Noted.calls


def needs(library: str):
    is_there = find_spec(library) is not None
    return pytest.mark.skipif(not is_there, reason=f"{library} is not installed: fastlt[{library}]")


def config_of(pack: Path, *settings: str):
    place = f"data.pack={json.dumps(str(pack))}"
    return load_config("cifar100-siblings", [*SMALL, place, *settings])


def stop_after(epochs: int):
    """Return a function for on_epoch that stops a run after an epoch."""

    def stop(record):
        if record["epoch"] + 1 == epochs:
            raise Stopped("enough")

    return stop


def scalars(run: Path, name: str) -> list[tuple[int, float]]:
    found = EventAccumulator(str(run))
    found.Reload()
    return [(one.step, one.value) for one in found.Scalars(name)]


def test_tensorboard_gets_config_epochs_and_result(small_pack, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(Stopped):
        train(config_of(small_pack), run, Console(quiet=True), stop_after(1))
    result = train(config_of(small_pack), run, Console(quiet=True))
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps, losses = zip(*scalars(run, "loss"), strict=True)
    assert list(steps) == [record["step"] for record in records] == [8, 16, 24]
    assert losses == pytest.approx([record["loss"] for record in records], rel=1e-6)
    assert scalars(run, "result/top1")[0][1] == pytest.approx(result["top1"])


def test_no_logger_leaves_no_events(small_pack, tmp_path):
    train(config_of(small_pack, "train.loggers=[]"), tmp_path / "run", Console(quiet=True))
    assert not list((tmp_path / "run").glob("events*"))
    assert not (tmp_path / "run" / KEPT).exists()


def test_a_resumed_run_is_the_same_one_and_logs_no_step_twice(small_pack, tmp_path, noted):
    run, config = tmp_path / "run", config_of(small_pack, "train.loggers=wandb")
    with pytest.raises(Stopped):
        train(config, run, Console(quiet=True), stop_after(2))
    kept = json.loads((run / KEPT).read_text())["wandb"]
    assert kept["id"] == "first"
    (run / KEPT).write_text(json.dumps({"wandb": {"id": "other", "step": kept["step"] + 8}}))
    train(config, run, Console(quiet=True))
    begun = [call[1] for call in noted if call[0] == "begin"]
    assert begun == ["first", "other"]
    # the third epoch ends at a step that the service says it has got
    assert [call[2] for call in noted if call[0] == "scalars"] == [8, 16]
    finish = next(call for call in noted if call[0] == "finish")
    assert finish[1]["top1"] >= 0 and finish[2] == "report.html"
    assert [call[0] for call in noted].count("close") == 2


def test_loggers_may_change_when_a_run_is_resumed(small_pack, tmp_path, noted):
    run = tmp_path / "run"
    with pytest.raises(Stopped):
        train(config_of(small_pack), run, Console(quiet=True), stop_after(1))
    train(config_of(small_pack, "train.loggers=wandb,tensorboard"), run, Console(quiet=True))
    assert [call[2] for call in noted if call[0] == "scalars"] == [16, 24]


@pytest.mark.parametrize("where", ["__init__", "scalars", "finish", "close"])
def test_a_logger_that_fails_is_told_and_left_out(
    where, small_pack, tmp_path, noted, monkeypatch, capsys
):
    def fail(*given):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(Noted, where, fail)
    result = train(config_of(small_pack, "train.loggers=wandb"), tmp_path / "run", Console())
    said = capsys.readouterr().out
    assert result["top1"] >= 0
    assert said.count("the logger wandb has failed, and is left out: no\n") == 1


def test_a_logger_that_does_not_answer_is_left_out(tmp_path, noted, monkeypatch, capsys):
    never = threading.Event()
    monkeypatch.setattr(Noted, "scalars", lambda self, values, step: never.wait())
    monkeypatch.setattr(loggers, "PATIENCE", 0.05)
    with Loggers(("wandb",), tmp_path, CONFIG, 0, Console()) as group:
        group.scalars({"loss": 1.0}, 8)
        group.scalars({"loss": 1.0}, 16)
    said = capsys.readouterr().out
    never.set()
    assert said.count("no answer within 0.05 s") == 1


def test_within_raises_what_the_call_raises():
    def interrupted():
        raise SystemExit(3)

    with pytest.raises(RuntimeError, match="SystemExit"):
        within(5, interrupted)
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 / 0)


def test_a_full_disk_is_no_fault_of_a_logger(tmp_path, noted, monkeypatch):
    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Noted, "scalars", full)
    with (
        Loggers(("wandb",), tmp_path, CONFIG, 0, Console(quiet=True)) as group,
        pytest.raises(OSError, match="No space left"),
    ):
        group.scalars({"loss": 1.0}, 8)


def test_a_damaged_record_of_loggers_is_begun_anew(tmp_path, noted):
    (tmp_path / KEPT).write_text("{")
    with Loggers(("wandb",), tmp_path, CONFIG, 0, Console(quiet=True)):
        pass
    assert json.loads((tmp_path / KEPT).read_text()) == {"wandb": {"id": "first"}}


def test_a_missing_library_names_its_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(loggers, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install 'fastlt\[mlflow\]'"):
        check_loggers(("mlflow",))


def test_a_folder_of_that_name_is_no_library(tmp_path, monkeypatch):
    (tmp_path / "trackio").mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(MissingExtra, match="trackio"):
        check_loggers(("trackio",))


def test_loggers_are_a_list_or_a_bare_word():
    assert load_config("demo").train.loggers == ("tensorboard",)
    assert load_config("demo", ["train.loggers=wandb"]).train.loggers == ("wandb",)
    assert load_config("demo", ["train.loggers=wandb,mlflow"]).train.loggers == ("wandb", "mlflow")
    assert load_config("demo", ['train.loggers=["trackio"]']).train.loggers == ("trackio",)
    assert load_config("demo", ["train.loggers=[]"]).train.loggers == ()
    with pytest.raises(UserError, match="'tensorboard', 'wandb', 'mlflow', 'trackio'"):
        load_config("demo", ["train.loggers=wandbb"])


@pytest.fixture
def no_login(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in [one for one in os.environ if one.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    return tmp_path / "netrc"


def test_wandb_is_offline_without_a_login_or_a_network(no_login, monkeypatch):
    assert wandb_mode() == "offline"
    no_login.write_text("machine api.wandb.ai login user password key\n")
    no_login.chmod(0o600)
    assert has_login("https://api.wandb.ai") and not has_login("https://wandb.example.org")
    monkeypatch.setattr(loggers, "is_reachable", lambda address: False)
    assert wandb_mode() == "offline"
    monkeypatch.setattr(loggers, "is_reachable", lambda address: True)
    assert wandb_mode() == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert wandb_mode() == "disabled"


def test_an_address_nobody_listens_at_is_not_reachable(no_login):
    assert not is_reachable("http://127.0.0.1:9")


@needs("wandb")
def test_wandb_offline_goes_on_as_one_run(small_pack, tmp_path, no_login):
    run, config = tmp_path / "run", config_of(small_pack, "train.loggers=wandb")
    with pytest.raises(Stopped):
        train(config, run, Console(quiet=True), stop_after(1))
    train(config, run, Console(quiet=True))
    places = sorted((run / "wandb").glob("offline-run-*"))
    name = json.loads((run / KEPT).read_text())["wandb"]["id"]
    assert places and all(place.name.endswith(name) for place in places)
    assert any((place / "files" / "report.html").is_file() for place in places)


@needs("mlflow")
def test_mlflow_holds_config_epochs_result_and_report(small_pack, tmp_path, monkeypatch):
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run, config = tmp_path / "run", config_of(small_pack, "train.loggers=mlflow")
    with pytest.raises(Stopped):
        train(config, run, Console(quiet=True), stop_after(1))
    name = json.loads((run / KEPT).read_text())["mlflow"]["id"]
    client = MlflowClient((run / "mlruns").resolve().as_uri())
    assert client.get_run(name).info.status == "KILLED"
    result = train(config, run, Console(quiet=True))
    found = client.get_run(name)
    assert found.info.status == "FINISHED" and found.data.params["optim.lr"] == "0.1"
    assert [one.step for one in client.get_metric_history(name, "loss")] == [8, 16, 24]
    assert found.data.metrics["result/top1"] == pytest.approx(result["top1"])
    assert [one.path for one in client.list_artifacts(name)] == ["report.html"]


@needs("mlflow")
def test_an_mlflow_server_that_is_not_there_stops_nothing(
    small_pack, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    config = config_of(small_pack, "train.loggers=mlflow", "train.epochs=1")
    assert train(config, tmp_path / "run", Console())["top1"] >= 0
    assert "the logger mlflow has failed, and is left out" in capsys.readouterr().out


@needs("trackio")
def test_trackio_goes_on_as_one_run(small_pack, tmp_path, monkeypatch):
    import trackio.sqlite_storage as storage
    import trackio.utils as trackio_utils

    for module in (trackio_utils, storage):  # it reads TRACKIO_DIR once, as it is imported
        if hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    monkeypatch.setenv("TRACKIO_PROJECT", "fastlt-test")
    run, config = tmp_path / "run", config_of(small_pack, "train.loggers=trackio")
    with pytest.raises(Stopped):
        train(config, run, Console(quiet=True), stop_after(1))
    train(config, run, Console(quiet=True))
    name = json.loads((run / KEPT).read_text())["trackio"]["name"]
    rows = storage.SQLiteStorage.get_logs("fastlt-test", name)
    assert [row["step"] for row in rows if "loss" in row] == [8, 16, 24]
    assert any("result/top1" in row for row in rows)
