"""tools/gpu.sh, with its sizes for a CPU."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastlt_benchmarks.engines import report_faults

ROOT = Path(__file__).resolve().parents[2]


class Quiet:
    def print(self, *args, **kwargs):
        pass


@pytest.mark.slow
def test_steps_run_and_their_figures_are_kept(tmp_path):
    chosen = {"SMALL": "1", "STEPS": "doctor,engines,train", "OUT": str(tmp_path)}
    environment = {**os.environ, **chosen, "PYTHON": sys.executable}
    done = subprocess.run(
        [ROOT / "tools/gpu.sh"], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "== doctor: passed" in done.stdout and "== loss" not in done.stdout
    with (tmp_path / "engines.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {"exact"} <= {row["decode"] for row in rows if row["engine"] == "torch"}
    assert (tmp_path / "train.csv").stat().st_size > 0


def test_a_step_that_fails_is_named(tmp_path):
    environment = {**os.environ, "STEPS": "cifar-ce", "OUT": str(tmp_path), "SMALL": "1"}
    environment |= {"FASTLT_SHARED": str(tmp_path / "nothing"), "PYTHON": sys.executable}
    done = subprocess.run(
        [ROOT / "tools/gpu.sh"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "no CIFAR-100 at" in done.stdout and "failed: cifar-ce" in done.stdout


def test_an_engine_that_trains_otherwise_is_a_fault():
    sound = {"engine": "torch", "decode": "exact", "loss": 0.5, "skipped_steps": 0}
    rows = [sound, {**sound, "engine": "dali", "loss": 0.55}]
    assert report_faults(rows, Quiet()) == []
    rows += [{**sound, "loss": 2.1}, {**sound, "skipped_steps": 3}]
    assert len(report_faults(rows, Quiet())) == 2
