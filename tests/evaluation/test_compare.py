"""Runs side by side."""

import json
import shutil

import numpy as np
import pytest
from rich.console import Console

from fastlt.config import load_config
from fastlt.errors import UserError
from fastlt.evaluation.compare import compare
from fastlt.training.loop import train


@pytest.fixture(scope="module")
def run(small_pack, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "first"
    config = load_config(
        "demo",
        [
            f"data.pack={small_pack}",
            "train.epochs=1",
            "data.size=16",
            "data.batch=8",
            "loss.silence=0.3",
        ],
    )
    train(config, out, Console(quiet=True))
    return out


def said(*runs):
    console = Console(record=True, width=220)
    compare(runs, console)
    return console.export_text()


def test_figures_settings_and_chance(run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(run, other)
    text = (other / "config.toml").read_text()
    (other / "config.toml").write_text(text.replace("silence = 0.3", "silence = 0.5"))
    result = json.loads((other / "result.json").read_text())
    (other / "result.json").write_text(json.dumps({**result, "top1": result["top1"] + 2.5}))
    told = said(run, other)
    assert "+2.5" in told and "loss.silence" in told and "data.pack" not in told
    assert (
        "other has 0 images right that first has wrong, and 0 the other way round: within chance"
        in told
    )
    with np.load(other / "val_predictions.npz") as arrays:
        changed = {**arrays, "predicted": arrays["label"]}
    np.savez(other / "val_predictions.npz", **changed)
    wrong = len(changed["label"]) - round(result["top1"] / 100 * len(changed["label"]))
    told = said(run, other)
    # of so many coins
    assert (
        f"other has {wrong} images right that first has wrong" in told
        and f"p = {2 * 0.5**wrong:.2g}" in told
    )


def test_what_cannot_be_compared_is_said(run, tmp_path):
    with pytest.raises(UserError, match="needs two runs"):
        said(run)
    with pytest.raises(UserError, match="is named twice"):
        said(run, run)
    with pytest.raises(UserError, match="there is no run at"):
        said(run, tmp_path / "nowhere")
    other = tmp_path / "other"
    shutil.copytree(run, other)
    (other / "val_predictions.npz").unlink()
    assert "no test of their difference" in said(run, other)


def test_several_tests_are_corrected_for_and_long_names_are_not_cut(run, tmp_path):
    others = [tmp_path / f"{'long-' * 12}{i}" for i in range(3)]
    for i, other in enumerate(others):
        shutil.copytree(run, other)
        with np.load(other / "val_predictions.npz") as arrays:
            changed = {**arrays, "predicted": arrays["label"] if i else arrays["predicted"]}
        np.savez(other / "val_predictions.npz", **changed)
    console = Console(record=True, width=80)
    compare([run, *others], console)
    told = console.export_text()
    assert told.count("corrected for 3 tests (Holm)") == 3 and "…" not in told


def copy_of(run, place, seed, silence, top1):
    shutil.copytree(run, place)
    text = (place / "config.toml").read_text()
    for old, new in (("silence = 0.3", f"silence = {silence}"), ("seed = 0", f"seed = {seed}")):
        text = text.replace(old, new)
    (place / "config.toml").write_text(text)
    result = json.loads((place / "result.json").read_text())
    (place / "result.json").write_text(json.dumps({**result, "top1": top1}))
    return place


def test_kinds_of_several_seeds_are_compared_seed_by_seed(run, tmp_path):
    places = [
        copy_of(run, tmp_path / f"{silence}-{seed}", seed, silence, top1)
        for silence, tops in ((1, (50, 52, 51)), (0.1, (53, 54, 55)))
        for seed, top1 in enumerate(tops)
    ]
    told = said(*places)
    assert "0.1-0 - 1-0: +3.0 points over 3 seeds, from +2.0 to +4.0 (95 %, bootstrap)" in told
    assert "t = 5.2" in told and "p = 0.25 by flipping signs" in told
    assert "51.0 ± 1.0" in told and "loss.silence" in told
    assert "train.seed" not in told and "McNemar" not in told
    told = said(*places, copy_of(run, tmp_path / "again", 0, 1, 50))  # which is one to pair with?
    assert "McNemar" in told


def test_runs_of_other_packs_are_other_kinds(run, tmp_path):
    places = [
        copy_of(run, tmp_path / f"{pack}-{seed}", seed, 0.3, 50 + seed)
        for pack in ("one", "other")
        for seed in range(2)
    ]
    for place in places[2:]:
        text = (place / "config.toml").read_text()
        (place / "config.toml").write_text(text.replace('pack = "', 'pack = "other/', 1))
    told = said(*places)
    assert "other-0 - one-0: +0.0 points over 2 seeds" in told and "data.pack" in told
