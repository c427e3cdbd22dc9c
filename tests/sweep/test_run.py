"""Sweeps on a real Ray: what is trained, what is not trained again, what kills leave."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

pytest.importorskip("ray", reason="no ray here: it comes with the extra `sweep`")

from helpers.small_sweeps import PATIENCE, command_line, epochs_of, session_of, table, until, write

from fastlt.errors import UserError
from fastlt.packing.sources import read_collection
from fastlt.packing.writer import PackOptions, write_pack
from fastlt.sweep.run import run_sweep


def swept(file, pack, out, resume=False, settings=()):
    console = Console(record=True, width=200)
    rows = run_sweep(file, str(pack), out, list(settings), None, resume, console)
    return rows, console.export_text()


@pytest.mark.slow
def test_a_grid_is_trained_once_and_what_has_finished_is_not_run_again(small_pack, tmp_path):
    out = tmp_path / "out"
    file = write(tmp_path, "silence = [0.1, 1]\nneighbours = [0, 1]\nseed = [0, 1]")
    rows, said = swept(file, small_pack, out)
    assert "6 runs (2 more are the same as others), 0 of them finished before" in said
    assert (
        len(rows) == 8
        and {row["status"] for row in rows} == {"finished"}
        and len(list((out / "runs").iterdir())) == 6
    )
    assert not (out / "decoded").exists()  # of use while something is left alone
    written = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/result.json")}
    assert len(written) == 6
    kept = table(out)
    assert [row["run"] for row in kept] == [row["run"] for row in rows] and all(
        float(row["top1"]) >= 0 for row in kept
    )
    assert {row["commit"] for row in kept} != {""} or not (
        Path(__file__).parents[2] / ".git"
    ).exists()
    with pytest.raises(UserError, match="holds a sweep already: go on with it by --resume"):
        swept(file, small_pack, out)
    swept(
        write(tmp_path, "silence = [0.1, 1, 0]\nneighbours = [0, 1]\nseed = [0, 1]"),
        small_pack,
        out,
        resume=True,
    )
    assert {path: path.stat().st_mtime_ns for path in written} == written and len(
        list(out.glob("runs/*/result.json"))
    ) == 8
    alone = json.loads(
        (out / "runs" / "silence=0.1,neighbours=1,seed=1" / "result.json").read_text()
    )
    command = json.loads(
        next(row for row in kept if row["run"] == "silence=0.1,neighbours=1,seed=1")["settings"]
    )
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "fastlt",
            "train",
            "demo",
            "--data",
            str(small_pack),
            "--out",
            str(tmp_path / "again"),
            *command,
        ],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert ended.returncode == 0, ended.stderr
    assert (
        json.loads((tmp_path / "again" / "result.json").read_text())["per_class"]
        == alone["per_class"]
    )


@pytest.mark.slow
def test_what_was_trained_otherwise_is_not_taken_for_the_same(small_pack, tmp_path):
    swept(write(tmp_path, "seed = [0]"), small_pack, tmp_path / "out")
    with pytest.raises(
        UserError, match=r"was trained with other settings \(train\.epochs = 1, not 2\)"
    ):
        swept(write(tmp_path, "seed = [0]", epochs=2), small_pack, tmp_path / "out", resume=True)
    assert (
        swept(write(tmp_path, "seed = [0]"), small_pack, tmp_path / "out", resume=True)[0][0][
            "status"
        ]
        == "finished"
    )


@pytest.mark.slow
def test_where_no_trial_has_a_result_that_is_an_error(small_pack, tmp_path):
    with pytest.raises(UserError, match=r"no trial has a result: .*none\.safetensors"):
        swept(write(tmp_path, 'model.weights = ["none.safetensors"]'), small_pack, tmp_path / "out")
    assert [row["status"] for row in table(tmp_path / "out")] == ["failed"]


@pytest.mark.slow
def test_a_trial_that_fails_is_reported_and_stops_no_other(small_pack, tmp_path):
    rows, said = swept(
        write(tmp_path, 'model.weights = ["none.safetensors", ""]\nseed = [0, 1]'),
        small_pack,
        tmp_path / "out",
    )
    assert [row["status"] for row in rows] == ["failed", "failed", "finished", "finished"]
    assert (
        all("none.safetensors" in row["note"] for row in rows[:2])
        and "2 failed, 2 finished" in said
    )
    assert said.count("failed: ") == 2


@pytest.mark.slow
def test_what_cannot_be_swept_is_refused_at_once(small_pack, tmp_path, monkeypatch):
    file, out = write(tmp_path / "s", "seed = [0]"), tmp_path / "out"
    with pytest.raises(UserError, match=r"there is no pack at .*nowhere"):
        swept(file, tmp_path / "nowhere", out)
    with pytest.raises(UserError, match=r"there is no pack at .*else"):
        swept(
            write(tmp_path / "p", 'pack = ["PACK", "else"]'.replace("PACK", str(small_pack))),
            small_pack,
            out,
        )
    with pytest.raises(
        UserError, match=r"a trial asks for 1000 cores and 0 GPUs, which no machine has \("
    ):
        swept(write(tmp_path / "c", "seed = [0]", more="[resources]\ncpus = 1000"), small_pack, out)
    for address, why in (
        ("nobody", "it must be HOST:PORT"),
        (f"127.0.0.1:{free_port()}", "no answer from"),
    ):
        with pytest.raises(UserError, match=why):
            run_sweep(file, str(small_pack), out, [], address, False, Console(quiet=True))
    with pytest.raises(UserError, match="holds other things than a sweep"):
        swept(file, small_pack, small_pack)
    monkeypatch.chdir(small_pack.parent)
    # nothing of the above is in the way
    rows, _ = swept(write(tmp_path / "r", f'pack = ["{small_pack.name}"]'), small_pack, out)
    assert rows[0]["status"] == "finished"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_what_was_trained_on_another_pack_is_not_taken_for_the_same(
    small_pack, image_folders, tmp_path
):
    collection = read_collection(
        image_folders / "target", None, image_folders / "val", None, None, None
    )
    write_pack(collection, PackOptions(out=tmp_path / "other", workers=1), Console(quiet=True))
    file, out = write(tmp_path, "seed = [0]\nsilence = [0.1, 1]"), tmp_path / "out"
    swept(file, small_pack, out)
    with pytest.raises(UserError, match="was trained on another pack than"):
        swept(file, tmp_path / "other", out, resume=True)
    _, said = swept(write(tmp_path, "seed = [0]\nsilence = [0.1]"), small_pack, out, resume=True)
    assert "1 finished run in" in said and len(list(out.glob("runs/*/result.json"))) == 2


@pytest.mark.slow
def test_random_and_optuna_searches_have_as_many_trials_as_asked(small_pack, tmp_path):
    axes = "optim.lr = {low = 0.01, high = 0.1, log = true}\nsilence = [0.1, 0.5]"
    rows, _ = swept(
        write(tmp_path / "r", axes, more='[search]\nkind = "random"\ntrials = 3'),
        small_pack,
        tmp_path / "random",
    )
    assert [row["status"] for row in rows] == ["finished"] * 3
    pytest.importorskip("optuna")
    file = write(tmp_path / "o", axes, more='[search]\nkind = "optuna"\ntrials = 3')
    rows, _ = swept(file, small_pack, tmp_path / "optuna")
    assert [row["status"] for row in rows] == ["finished"] * 3
    file.write_text(file.read_text().replace("trials = 3", "trials = 5"))
    more, _ = swept(file, small_pack, tmp_path / "optuna", resume=True)
    assert len(more) == 5 and [row["run"] for row in more[:3]] == [row["run"] for row in rows]
    shutil.rmtree(tmp_path / "optuna/runs" / more[1]["run"])  # as if it had been killed
    again, _ = swept(file, small_pack, tmp_path / "optuna", resume=True)
    assert [row["run"] for row in again] == [row["run"] for row in more] and {
        row["status"] for row in again
    } == {"finished"}


@pytest.mark.slow
def test_what_is_behind_ends_early(small_pack, tmp_path):
    more = "[search]\nstop_early = true\ngrace = 1\n[resources]\nparallel = 1"
    file = write(tmp_path, "optim.lr = [0.1, 1e-9, 1e-8, 1e-7]\nseed = [0]", epochs=30, more=more)
    rows, _ = swept(file, small_pack, tmp_path / "out")
    states = [row["status"] for row in rows]
    assert (
        set(states) <= {"finished", "stopped early"}
        and "finished" in states
        and "stopped early" in states
    )
    ended = next(row for row in rows if row["status"] == "stopped early")
    assert ended["epochs"] < 30 and ended["top1"] is not None


def begun(small_pack, tmp_path, epochs=40, more=""):
    """A sweep in a process of its own, killed later; each of two trials has gone through some
    epochs.
    """
    file, out = (
        write(tmp_path, "seed = [0, 1]\nsilence = [0.1, 0.5]", epochs=epochs, more=more),
        tmp_path / "out",
    )
    command = [
        sys.executable,
        "-m",
        "fastlt",
        "sweep",
        str(file),
        "--data",
        str(small_pack),
        "--out",
        str(out),
    ]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    until(lambda: any(epochs_of(run) >= 3 for run in out.glob("runs/*")), process)
    return command, out, process


def trainers(process) -> list[int]:
    """Processes of Ray that train for this sweep."""
    return [
        pid for pid in session_of(process.pid) if command_line(pid).startswith(b"ray::ImplicitFunc")
    ]


@pytest.mark.slow
def test_a_trial_whose_process_is_killed_goes_on_from_its_checkpoint(small_pack, tmp_path):
    _, out, process = begun(small_pack, tmp_path)
    victims = trainers(process)
    assert victims
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    assert [row["status"] for row in table(out)] == ["finished"] * 4
    assert all(epochs_of(run) == 40 for run in out.glob("runs/*"))
    assert any("resumed from" in (run / "log.txt").read_text() for run in out.glob("runs/*"))


@pytest.mark.slow
def test_a_trial_that_was_retried_often_enough_has_failed(small_pack, tmp_path):
    command, out, process = begun(small_pack, tmp_path, more="[resources]\nretries = 0")
    victims = trainers(process)
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    said, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, said
    states = [row["status"] for row in table(out)]
    assert states.count("failed") == len(victims) and states.count("finished") == 4 - len(victims)
    assert all(row["note"] for row in table(out) if row["status"] == "failed")
    ended = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    rows = table(out)
    assert [row["status"] for row in rows] == ["finished"] * 4
    assert sorted(row["attempts"] for row in rows) == ["1"] * (4 - len(victims)) + ["2"] * len(
        victims
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_sweep_that_is_asked_to_stop_says_how_to_go_on(small_pack, tmp_path, number):
    command, out, process = begun(small_pack, tmp_path)
    process.send_signal(number)
    said, _ = process.communicate(timeout=PATIENCE)
    assert (
        process.returncode == 0
        and "stopped: call the same command with --resume" in said
        and "Traceback" not in said
    ), said
    assert (out / "results.csv").is_file()
    ended = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 0 and [row["status"] for row in table(out)] == ["finished"] * 4, (
        ended.stdout + ended.stderr
    )


@pytest.mark.slow
def test_a_killed_sweep_goes_on_and_runs_nothing_twice(small_pack, tmp_path):
    command, out, process = begun(small_pack, tmp_path, epochs=12)
    until(lambda: any((run / "result.json").is_file() for run in out.glob("runs/*")), process)
    workers = trainers(process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    until(lambda: not any(command_line(worker) for worker in workers))
    done = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/result.json")}
    assert 0 < len(done) < 4
    ended = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert f"4 runs, {len(done)} of them finished before" in ended.stdout
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert [row["status"] for row in table(out)] == ["finished"] * 4
    assert all(epochs_of(run) == 12 for run in out.glob("runs/*"))
