import csv

import pytest
import torch
from PIL import Image
from rich.console import Console

from fastlt.errors import UserError
from fastlt_benchmarks import train
from fastlt_benchmarks.regions import write_images
from fastlt_benchmarks.repeated import Control, spread, table, train_all
from fastlt_benchmarks.results_file import append_rows
from fastlt_benchmarks.siblings import CONTROLS
from fastlt_benchmarks.train import run_bench_train

SMALL = ["model.name=resnet8", "data.size=16", "data.batch=16"]


def test_both_rates_are_printed_and_kept_with_their_context(small_pack, tmp_path, capsys):
    path = tmp_path / "train.csv"
    run_bench_train("cifar100-siblings", SMALL, str(small_pack), steps=5, rounds=2, csv=path, console=Console())
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


def test_a_pack_at_an_address(small_pack, tmp_path, monkeypatch):
    fsspec = pytest.importorskip("fsspec", reason="no fsspec here: it comes with the extra `remote`")
    monkeypatch.setenv("FASTLT_CACHE", str(tmp_path / "cache"))
    fsspec.filesystem("memory").put(str(small_pack), "/far/pack", recursive=True)
    run_bench_train("cifar100-siblings", SMALL, "memory://far/pack", 5, 1, tmp_path / "train.csv", Console(quiet=True))
    (row,) = csv.DictReader((tmp_path / "train.csv").open())
    assert float(row["loop_images_per_second"]) > 0


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


def test_controls_are_trained_seed_by_seed_and_read_again(small_pack, tmp_path):
    settings = [*SMALL, "train.epochs=1"]
    controls = {
        "as it is": Control(small_pack, settings),
        "alone": Control(small_pack, [*settings, "data.auxiliary=false", "loss.name=balanced-ce"]),
    }
    rows = train_all("cifar100-siblings", controls, tmp_path, 2, 2, Console(quiet=True))
    assert [(row["control"], row["seed"]) for row in rows] == [("as it is", 0), ("alone", 0), ("as it is", 1), ("alone", 1)]
    assert (tmp_path / "as-it-is-seed1/result.json").is_file() and all(0 <= row["top1"] <= 100 for row in rows)
    assert train_all("cifar100-siblings", controls, tmp_path, 2, 2, Console(quiet=True)) == rows
    with pytest.raises(UserError, match=r"ended with code 2: .*no setting"):
        train_all("cifar100-siblings", {"wrong": Control(small_pack, ["no.such=1"])}, tmp_path, 1, 1, Console(quiet=True))


def test_images_to_compare_regions_by_are_jpegs_of_every_fifth_class(shared_data, tmp_path):
    write_images(shared_data / "cifar100", tmp_path, Console(quiet=True))
    classes = sorted(path.name for path in (tmp_path / "train").iterdir())
    assert (len(classes) == 20 and classes[:2] == ["apple", "beetle"]) or classes[:2] == ["apple", "bed"]
    images = sorted((tmp_path / "train/apple").iterdir())
    with Image.open(images[0]) as image:
        assert len(images) == 400 and image.size == (96, 96) and image.format == "JPEG"
    assert len(list((tmp_path / "test/apple").iterdir())) == 100
