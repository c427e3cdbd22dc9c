"""What kinds of adaptation cost, measured beside the whole model."""

import csv

from helpers.method_cases import need_timm
from rich.console import Console

from fastlt_benchmarks.adapt import run_bench_adapt


def test_kinds_stand_beside_full(small_pack, tmp_path, capsys):
    need_timm()
    settings = ["model.name=test_vit", "data.size=32", "data.batch=8", "data.workers=0"]
    kinds, path = ["head", "norm", "adaptformer"], tmp_path / "adapt.csv"
    run_bench_adapt(
        "cifar100-siblings", kinds, settings, str(small_pack), 5, 2, path, Console(width=120)
    )
    assert "model.adapt" in capsys.readouterr().out
    rows = {row["adapt"]: row for row in csv.DictReader(path.open())}
    assert list(rows) == ["full", *kinds]
    trained = {name: int(row["trained_parameters"]) for name, row in rows.items()}
    memory = {name: float(row["memory_mb"]) for name, row in rows.items()}
    assert trained["head"] < trained["norm"] < trained["adaptformer"] < trained["full"]
    assert memory["head"] < memory["norm"] < memory["full"]
    assert rows["full"]["speed_over_full"] == "1.0" and float(rows["head"]["steps_per_second"]) > 0
