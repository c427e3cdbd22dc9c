"""The comparison of related systems: what is run, and what its table says."""

import pytest
from rich.console import Console

from fastlt.methods import method_names
from fastlt.methods.presets import PRESETS
from fastlt.studies import related
from fastlt.studies.protocol import ReproduceOptions
from fastlt.studies.related import RELATED, cost_table, parameters_of, ratio, related_methods


def test_every_method_that_is_compared_exists():
    assert set(RELATED) <= {*method_names(), *PRESETS}


def rows_of(name, seconds, memory, tops):
    return [
        {
            "control": name,
            "seed": seed,
            "top1": top,
            "many": top,
            "medium": top,
            "few": top,
            "seconds": seconds,
            "peak_memory": memory,
            "parameters": 1234,
        }
        for seed, top in enumerate(tops)
    ]


def test_costs_are_multiples_of_the_first():
    first, other = rows_of("ce", 10.0, 100, [40, 42]), rows_of("come", 35.0, 150, [44, 46])
    assert ratio(other, first, "seconds") == 3.5
    console = Console(width=160)
    with console.capture() as capture:
        console.print(cost_table([*first, *other]))
    line = next(line for line in capture.get().splitlines() if "come" in line)
    for word in ("45.0 ± 1.4", "3.50", "1.50", "1,234"):
        assert word in line


@pytest.mark.slow
def test_methods_are_trained_on_the_long_tail_and_costed(shared_data, tmp_path, monkeypatch):
    few = {name: RELATED[name] for name in ("ce", "balanced-softmax", "angular")}
    monkeypatch.setattr(related, "RELATED", few)
    source = f"cifar100:{shared_data / 'cifar100'}"
    settings = ["model.name=resnet8", "train.eval_every=9"]
    options = ReproduceOptions(source, tmp_path, 1, 1, 1, settings)
    rows = related_methods(options, Console(quiet=True))
    assert [row["control"] for row in rows] == list(few)
    assert all(row["top1"] > 1 and row["peak_memory"] > 1e8 for row in rows)
    # angular has no biases, but a scale
    assert rows[2]["parameters"] == rows[0]["parameters"] - 100 + 1
    assert parameters_of(tmp_path / "ce-seed0/model.safetensors") == rows[0]["parameters"]
