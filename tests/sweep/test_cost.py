"""What a sweep costs, measured on a small one."""

import csv

import pytest

pytest.importorskip("ray", reason="no ray here: it comes with the extra `sweep`")

from helpers.small_sweeps import write

from fastlt.errors import UserError
from fastlt_benchmarks.sweep import main


@pytest.mark.slow
def test_time_and_memory_are_measured(small_pack, tmp_path):
    file = write(tmp_path, "seed = [0, 1, 2]", epochs=30)
    main(file, small_pack, tmp_path / "out", tmp_path / "cost.csv")
    with (tmp_path / "cost.csv").open() as lines:
        (row,) = csv.DictReader(lines)
    assert (
        row["trials"] == "3"
        and float(row["seconds"]) > float(row["trials_seconds"]) / 3
        and float(row["ratio"]) > 1
    )
    assert 1 <= int(row["trainers"]) <= 3 and int(row["trainers_mib"]) > float(row["own_mib"]) > 50
    with pytest.raises(UserError, match="is there already"):
        main(file, small_pack, tmp_path / "out")
    with pytest.raises(UserError, match="ended with 2"):
        main(file, tmp_path / "nowhere", tmp_path / "other")
