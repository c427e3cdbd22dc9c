import csv

import pytest
import torch
from rich.console import Console

from fastlt.errors import UserError
from fastlt_benchmarks import train
from fastlt_benchmarks.results_file import append_rows
from fastlt_benchmarks.siblings import CONTROLS, spread, table
from fastlt_benchmarks.train import run_bench_train

SMALL = ["model.name=resnet8", "data.size=16", "data.batch=16"]


def test_both_rates_are_printed_and_kept_with_their_context(small_pack, tmp_path, capsys):
    path = tmp_path / "train.csv"
    run_bench_train("cifar100-siblings", SMALL, small_pack, steps=5, rounds=2, csv=path, console=Console())
    printed = capsys.readouterr().out
    assert "bare forward + backward + step" in printed and "fastlt train" in printed and "loop / bare" in printed
    (row,) = csv.DictReader(path.open())
    assert float(row["bare_images_per_second"]) > 0 and float(row["loop_images_per_second"]) > 0
    assert 0 <= float(row["waited"]) < 1 and "waited for images" in printed
    assert row["machine"] and row["torch"] and row["command"].startswith("fastlt ")


def test_waiting_is_from_the_end_of_a_step_to_the_arrival_of_images(monkeypatch):
    now = iter([1.0, 1.5, 4.0, 4.25, 9.0])
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(now))
    waits = train.Waits(torch.device("cpu"))
    waits.images_arrive()  # nobody was waiting yet
    for _ in range(2):
        waits.end_step()
        waits.images_arrive()
    waits.end_step()
    assert waits.seconds() == 0.75
    waits.images_arrive()  # something else was measured meanwhile
    assert waits.seconds() == 0


def test_a_pack_is_made_where_none_is_given(tmp_path):
    run_bench_train("cifar100-lt", SMALL, None, steps=5, rounds=1, csv=tmp_path / "train.csv", console=Console(quiet=True))
    (row,) = csv.DictReader((tmp_path / "train.csv").open())
    assert (row["model"], row["batch"], row["size"]) == ("resnet8", "16", "16")


def test_rows_of_another_benchmark_are_not_mixed_in(tmp_path):
    append_rows(tmp_path / "a.csv", [{"x": 1}])
    append_rows(tmp_path / "a.csv", [{"x": 2}])
    assert [row["x"] for row in csv.DictReader((tmp_path / "a.csv").open())] == ["1", "2"]
    with pytest.raises(UserError, match="other columns"):
        append_rows(tmp_path / "a.csv", [{"y": 1}])


def test_the_table_of_controls_has_mean_and_deviation_and_no_zero_for_an_empty_group():
    rows = [
        {"control": name, "top1": 50.0 + seed, "many": 60.0, "medium": 1.0, "few": None} for name in CONTROLS for seed in range(3)
    ]
    assert spread([50.0, 51.0, 52.0]) == "51.0 ± 1.0"
    assert spread([None, None]) == "-"
    assert table(rows).row_count == len(CONTROLS)
