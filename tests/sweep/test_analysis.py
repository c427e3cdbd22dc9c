"""What a sweep says, of figures that are known."""

import csv
import math

import numpy as np
import pytest

from fastlt.errors import UserError
from fastlt.evaluation.significance import holm, t_test
from fastlt.sweep.analysis import read_study
from fastlt.sweep.report import write_sweep_report


@pytest.fixture
def study(tmp_path):
    def make(figure, baseline="", status="finished"):
        text = (
            'recipe = "demo"\n[axes]\nsilence = [1, 0.1]\nneighbours = [0, 2]\nseed = [0, 1, '
            f"2]\n{baseline}"
        )
        (tmp_path / "sweep.toml").write_text(text)
        with (tmp_path / "results.csv").open("w", newline="") as file:
            rows = [
                {
                    "silence": s,
                    "neighbours": n,
                    "seed": seed,
                    "run": f"silence={s if n else 1},neighbours={n},seed={seed}",
                    "status": status,
                    "note": "",
                    "top1": figure(s, n, seed),
                    "many": 50,
                    "medium": 40,
                    "few": "",
                    "epochs": 2,
                    "images": 100,
                    "seconds": 36,
                    "settings": '["loss.silence=0.1"]',
                }
                for s in (1, 0.1)
                for n in (0, 2)
                for seed in (0, 1, 2)
            ]
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
        return tmp_path

    return make


def test_of_one_seed_or_of_equal_differences_there_is_no_test():
    assert t_test(np.array([1.0])) is None and t_test(np.array([1.0, 1.0, 1.0])) is None
    # t = 3.464 of two degrees
    assert t_test(np.array([1.0, 2.0, 3.0])) == pytest.approx(0.0742, abs=1e-4)


def test_holm_corrects_for_the_number_of_tests():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == {"a": 0.03, "c": 0.06, "b": 0.06}


def test_effects_differences_and_cost(study):
    out = study(
        lambda s, n, seed: 40 + n + (1 if n and s < 1 else 0) + 0.1 * seed * (1 + n),
        "[baseline]\nneighbours = 0",
    )
    found = read_study(out)
    assert found.baseline == ("1", "0") and found.ranked[0] == ("0.1", "2")
    by_neighbours = found.effect("neighbours")
    assert by_neighbours["0"]["top1"].mean == pytest.approx(40.1) and by_neighbours["2"][
        "top1"
    ].mean == pytest.approx(42.8)
    # over seeds, not over the other axis
    assert by_neighbours["2"]["top1"].deviation == pytest.approx(0.3)
    assert math.isnan(by_neighbours["0"]["few"].mean)
    assert found.by_size == ["neighbours", "silence"]
    # ("0.1", "0") are the baseline's own runs
    assert set(found.differences) == {
        ("1", "2"),
        ("0.1", "2"),
    }
    assert found.differences["0.1", "2"].mean == pytest.approx(3.2)
    assert found.cost()["runs"] == 9 and found.cost()["cpu_hours"] == pytest.approx(9 * 36 / 3600)


def test_what_was_not_measured_is_neither_baseline_nor_best(study):
    found = read_study(
        study(
            lambda s, n, seed: "" if (s, n) == (1, 0) else 40 + n + s,
            "[baseline]\nneighbours = 0\nseed = 1",
        )
    )
    assert found.baseline == ("0.1", "0")  # the first that is there
    out = study(lambda s, n, seed: "" if n == 0 else 40 + n + s, "[baseline]\nneighbours = 0")
    assert read_study(out).baseline is None and not read_study(out).differences
    assert "The baseline was not measured." in write_sweep_report(out).read_text()


def test_by_default_the_baseline_is_the_first_point(study):
    found = read_study(study(lambda s, n, seed: 50 - n + seed))
    assert (
        found.baseline == ("1", "0")
        and found.is_baseline(("0.1", "0"))
        and not found.is_baseline(("1", "2"))
    )
    page = write_sweep_report(found.out).read_text()
    assert page.count("the same runs") == 1 and page.count(">baseline<") == 1


def test_the_page_answers_and_names_what_is_missing(study):
    out = study(lambda s, n, seed: "" if (s, n, seed) == (1, 2, 0) else 40 + n + 0.3 * seed + s)
    page = write_sweep_report(out, ["neighbours", "silence"]).read_text()
    assert "The best of 4 points is silence = 1, neighbours = 2." in page
    assert "fastlt train demo --data PACK --out RUN loss.silence=0.1" in page
    assert (
        "http://" not in page.replace("http://www.w3.org", "")
        and "https://" not in page
        and "<link" not in page
    )
    assert (out / "effects.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(UserError, match="there is no axis 'depth'"):
        write_sweep_report(out, ["depth", "silence"])
    with pytest.raises(UserError, match="--axes names two axes"):
        write_sweep_report(out, ["silence"])


def test_of_one_value_there_is_no_effect_to_draw(study):
    out = study(lambda s, n, seed: 40 + seed if (s, n) == (1, 2) else "")
    assert (
        "silence = 1, neighbours = 2" in write_sweep_report(out).read_text()
        and not (out / "effects.png").exists()
    )


def test_before_a_trial_has_ended_there_is_no_report(study):
    with pytest.raises(UserError, match=r"no trial of .* has a result: .* says why"):
        read_study(study(lambda *_: ""))
    out = study(lambda *_: "")
    (out / "results.csv").unlink()
    with pytest.raises(UserError, match="has no results yet"):
        read_study(out)


def test_a_search_has_no_default_baseline_and_its_ranges_are_drawn(tmp_path):
    axes = "optim.lr = {low = 0.01, high = 1, log = true}\nsilence = [0.1, 1]"
    (tmp_path / "sweep.toml").write_text(
        f'recipe = "demo"\n[axes]\n{axes}\n[search]\nkind = "random"\ntrials = 5\n'
    )
    rates = [0.012345678901, 0.1234567890123, 0.5, 0.02, 0.9]
    with (tmp_path / "results.csv").open("w", newline="") as file:
        rows = [
            {
                "optim.lr": rate,
                "silence": 1,
                "seed": 0,
                "run": f"r{i}",
                "status": "finished" if i < 4 else "stopped early",
                "note": "",
                "top1": 40 + i,
                "many": "",
                "medium": "",
                "few": 30,
                "epochs": 2,
                "images": 9,
                "seconds": 3,
                "settings": '["data.pack=\\"p\\"", "optim.lr=0.1"]',
            }
            for i, rate in enumerate(rates)
        ]
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    found = read_study(tmp_path)
    # the fifth was stopped
    assert found.baseline is None and found.by_size == ["optim.lr"] and len(found.points) == 4
    page = write_sweep_report(tmp_path).read_text()
    assert "optim.lr = 0.02" in page and "0.1235" in page and "0.1234567890123" not in page
    assert (
        "baseline itself" not in page
        and ">baseline<" not in page
        and "1 stopped early" in page
        and "It has one seed alone" in page
        and 'id="heat"' not in page
    )
    assert "fastlt train demo --data PACK --out RUN optim.lr=0.1" in page
    with pytest.raises(UserError, match=r"optim\.lr is a range"):
        write_sweep_report(tmp_path, ["optim.lr", "silence"])
