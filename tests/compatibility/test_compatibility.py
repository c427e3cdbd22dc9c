"""What version 0.1.0 wrote is read, resumed and reported; two checkouts make the same."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from fastlt.config import load_config
from fastlt.evaluation.evaluate import evaluate_run
from fastlt.models.export import load_exported
from fastlt.packing.reader import open_pack
from fastlt.packing.writer import verify_pack
from fastlt.reports.run import write_report
from fastlt.training.loop import train

OLD = Path(__file__).with_name("version-0.1.0")


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A copy of the old pack and RUN, whose pack is a relative path, as the working folder."""
    shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(tmp_path / "old")
    return tmp_path / "old"


def test_an_old_pack_is_read_and_sound(old):
    pack = open_pack(old / "pack")
    assert (len(pack.train), len(pack.val)) == (110, 24)
    assert pack.space.target_names == ["a", "b", "c", "d"] and len(pack.space.pairs) == 4
    assert verify_pack(old / "pack", Console(quiet=True)) == 4


def test_an_old_run_is_evaluated_and_reported(old):
    result = json.loads((old / "run/result.json").read_text())
    assert evaluate_run(old / "run")["top1"] == pytest.approx(result["top1"], abs=5)
    assert write_report(old / "run").stat().st_size > 10_000
    model, names = load_exported(old / "run/model.safetensors")
    assert names == ["a", "b", "c", "d"] and not model.training


def test_an_old_run_is_resumed_by_the_engine_that_it_had(old):
    """Its config.toml says `torch`, which was the resident engine for small images."""
    config = load_config(str(old / "run/config.toml"))
    assert config.data.engine == "torch"
    before = load_file(old / "run/model.safetensors")
    console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    train(config, old / "run", console)
    said = console.export_text()
    assert "resumed from step-00000028: epoch 3" in said
    assert "it is resumed with data.engine=resident" in said and "loader resident" in said
    after = load_file(old / "run/model.safetensors")
    assert after.keys() == before.keys()
    for name, tensor in after.items():  # other processors round otherwise
        torch.testing.assert_close(tensor, before[name], rtol=1e-2, atol=1e-3)


@pytest.mark.slow
def test_this_version_makes_what_another_one_makes():
    """FASTLT_BEFORE names the checkout of another version."""
    before = os.environ.get("FASTLT_BEFORE")
    if not before:
        pytest.skip("set FASTLT_BEFORE to the checkout of another version to compare with")
    from compatibility.compare import compare

    assert compare(Path(before), Path(__file__).resolve().parents[2]) == []
