import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.command import fastlt
from rich.console import Console
from typer.testing import CliRunner

from fastlt.cli import app
from fastlt.errors import UserError
from fastlt.utils.results_file import check_place
from fastlt_benchmarks.loss.contenders import (
    Inputs,
    Problem,
    Size,
    all_contenders,
    make_graph,
    plain,
)
from fastlt_benchmarks.loss.run import COLUMNS, Grid, choose, run_grid
from fastlt_benchmarks.loss.table import TABLE_WIDTH, table
from fastlt_benchmarks.loss.trials import Bench, Trial, attempt, find_faults, measure, start
from fastlt_benchmarks.timing import (
    Ceilings,
    Pace,
    Pass,
    bounded_memory,
    copies_beyond_cache,
    peak_bytes,
)

CPU = torch.device("cpu")
HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CONTENDERS = {contender.name: contender for contender in all_contenders(CPU)}
TINY = ["--quick", "--rows=32", "--classes=40", "--classes=60", "--width=16", "--dtype=float32"]


def bench_of(*contenders, dtype=torch.float32) -> Bench:
    return Bench(list(contenders), dtype, CPU, Pace(2, 2, 0), Ceilings(1e10, 1e11))


def quiet(text: str, share: float = 0) -> None:
    pass


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> tuple[str, Path, list[dict[str, str]]]:
    """What a run over two sizes printed, its folder, and its rows."""
    out = tmp_path_factory.mktemp("results")
    ended = CliRunner().invoke(app, ["bench-loss", *TINY, "--out", str(out)])
    assert ended.exit_code == 0, ended.output
    (path,) = out.glob("loss-*.csv")
    return ended.output, out, list(csv.DictReader(path.open()))


def test_every_contender_has_a_row_at_every_size_with_its_context(tiny_run):
    _, _, rows = tiny_run
    expected = [contender.name for contender in all_contenders(HERE) if not contender.is_compiled]
    assert [row["contender"] for row in rows if row["classes"] == "60"] == expected
    assert len(rows) == 2 * len(expected)
    assert list(rows[0]) == [*COLUMNS, "machine", "torch", "python", "date", "command"]
    assert {row["width"] for row in rows if row["family"] == "linear"} == {"16"}
    assert {row["width"] for row in rows if row["family"] == "logits"} == {""}


def test_a_row_has_either_all_figures_or_a_reason(tiny_run):
    _, _, rows = tiny_run
    measured = [row for row in rows if not row["reason"]]
    assert {"ours-logits", "mask-logits", "ours-linear", "release-linear", "plain-linear"} <= {
        row["contender"] for row in measured
    }
    for row in measured:
        for phase in ("forward", "backward", "both"):
            low, middle, high = (
                float(row[f"{phase}_{figure}"]) for figure in ("p20_ms", "ms", "p80_ms")
            )
            assert 0 < low <= middle <= high
        assert int(row["repetitions"]) >= 10 and int(row["extra_bytes"]) >= 0
        floor = float(row["floor_ms"])
        assert float(row["percent_of_floor"]) == pytest.approx(
            100 * floor / float(row["both_ms"]), rel=1e-3
        )
        work = 8 if row["family"] == "logits" else 6 * 16
        ceiling = float(row["copy_gb_per_s"] or row["product_tflop_per_s"]) * (
            1e9 if row["family"] == "logits" else 1e12
        )
        assert floor == pytest.approx(1e3 * work * 32 * int(row["classes"]) / ceiling, rel=1e-3)
    assert all(not row["both_ms"] and not row["loss"] for row in rows if row["reason"])


def test_all_contenders_agree_in_the_loss(tiny_run):
    _, _, rows = tiny_run
    for family in ("logits", "linear"):
        for silences in ("True", "False"):
            for classes in ("40", "60"):
                same = {"family": family, "silences": silences, "classes": classes, "reason": ""}
                losses = [
                    float(row["loss"])
                    for row in rows
                    if all(row[name] == value for name, value in same.items())
                ]
                assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-4)


def test_the_method_stands_above_the_tables_and_all_fits_100_columns(tiny_run):
    printed, _, _ = tiny_run
    text = " ".join(printed.split())
    assert (
        text.index("one pass gives all three")
        < text.index("20th to 80th percentile")
        < text.index("logits: N=32, C=40")
    )
    assert (
        "6 N C D FLOP" in text
        and "the gradient's work in the forward" in text
        and "eager PyTorch with a dense N x C mask" in text
    )
    assert "linear: N=32, C=60, D=16, float32" in text
    assert max(map(len, printed.splitlines())) <= 100


def test_a_picture_is_drawn_beside_the_file(tiny_run):
    _, out, _ = tiny_run
    (path,) = out.glob("loss-*.png")
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_largest_figures_fit_the_table():
    row = dict.fromkeys(COLUMNS, 23456.7) | {
        "contender": "plain-compiled-linear",
        "dtype": "float32",
        "reason": "",
    }
    console = Console(width=TABLE_WIDTH)
    with console.capture() as capture:
        console.print(
            table(Size("linear", 16384, 10**6, 2048), [row | {"extra_bytes": 123_456_000_000}])
        )
    (line,) = (line for line in capture.get().splitlines() if "plain-compiled-linear" in line)
    assert line.split() == [
        "plain-compiled-linear",
        *["23457", "23457–23457"] * 3,
        "123.5",
        "GB",
        "23457",
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--contender=ours-linaer"], "did you mean 'ours-linear'"),
        (["--out=file"], "cannot write to file/loss-"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(arguments, said, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    ended = fastlt("bench-loss", *TINY, *arguments)
    assert ended.returncode == 2
    assert said in ended.stderr and len(ended.stderr.strip().splitlines()) == 1
    assert [path.name for path in tmp_path.rglob("*")] == ["file"]


def test_without_out_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    smallest = ["--quick", "--rows=8", "--classes=20", "--width=8", "--contender=ours-logits"]
    ended = CliRunner().invoke(app, ["bench-loss", *smallest])
    assert ended.exit_code == 0, ended.output
    assert "--out DIR keeps the figures" in ended.output and "ours-logits" in ended.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["--rows=0"], ["--classes=1"], ["--width=0"], ["--dtype=int8"], ["--rows=many"]]
)
def test_sizes_and_dtypes_that_are_none_are_refused(arguments):
    assert CliRunner().invoke(app, ["bench-loss", *arguments]).exit_code == 2


def test_a_file_of_another_benchmark_is_refused_at_once(tmp_path):
    path = tmp_path / "loss-cpu.csv"
    path.write_text("recipe,ratio\n")
    with pytest.raises(UserError, match="other columns"):
        check_place(path, COLUMNS)
    assert path.read_text() == "recipe,ratio\n"


def test_a_picture_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "loss-cpu.png").mkdir()
    with pytest.raises(UserError, match=r"loss-cpu\.png \(it is a folder\)"):
        check_place(tmp_path / "loss-cpu.csv", COLUMNS)
    assert [path.name for path in tmp_path.iterdir()] == ["loss-cpu.png"]


def test_rows_that_are_done_survive_an_interruption(tmp_path):
    def stops_at_60(problem):
        if problem.size.classes == 60:
            raise KeyboardInterrupt
        return plain(problem)

    path = tmp_path / "loss-cpu.csv"
    bench = bench_of(
        CONTENDERS["ours-logits"], replace(CONTENDERS["plain-logits"], prepare=stops_at_60)
    )
    with pytest.raises(KeyboardInterrupt):
        run_grid(bench, Grid([8], [40, 60], [16]), path, Console(quiet=True))
    assert [(row["contender"], row["classes"]) for row in csv.DictReader(path.open())] == [
        ("ours-logits", "40"),
        ("plain-logits", "40"),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_who_solves_another_problem_is_found_out_and_not_measured(dtype):
    """A plain loss that claims to silence: wrong in loss and gradients, in every dtype."""
    names = [
        "ours-logits",
        "mask-logits",
        "plain-logits",
        "ours-linear",
        "mask-linear",
        "release-linear",
    ]
    honest = [CONTENDERS[name] for name in names]
    liar = replace(CONTENDERS["plain-linear"], silences=True)
    bench = bench_of(*honest, liar, dtype=dtype)
    find_faults(bench, quiet)
    assert {name: bench.faults[name] for name in names} == dict.fromkeys(names, "")
    assert "wrong on a small problem: loss is off by" in bench.faults[liar.name]
    trials, _ = measure(bench, Size("linear", 8, 40, 16), quiet)
    assert [len(trial.passes) for trial in trials] == [2, 2, 2, 0]


def test_silencing_left_out_is_found_out_even_with_the_prior_right():
    def without_graph(problem):
        empty = make_graph(2, CPU, torch.Generator()).from_pairs(
            problem.graph.num_targets, problem.graph.num_classes, []
        )
        return CONTENDERS["ours-logits"].prepare(replace(problem, graph=empty))

    bench = bench_of(
        replace(CONTENDERS["ours-logits"], prepare=without_graph), dtype=torch.bfloat16
    )
    find_faults(bench, quiet)
    assert "loss is off by" in bench.faults["ours-logits"]


def test_a_contender_that_fails_is_a_row_with_the_reason():
    def fails(problem):
        raise ValueError("no such luck\nand more")

    bench = bench_of(replace(CONTENDERS["plain-logits"], prepare=fails), CONTENDERS["mask-logits"])
    failed, measured = measure(bench, Size("logits", 8, 40, None), quiet)[0]
    assert (failed.reason, failed.passes, failed.loss) == ("ValueError: no such luck", [], None)
    assert len(measured.passes) == 2


def test_a_mask_that_does_not_fit_says_what_it_would_need():
    classes, nothing = 10_000_000, torch.zeros(1)
    graph = make_graph(24, CPU, torch.Generator())
    problem = Problem(
        Size("linear", 1, classes, 1),
        torch.float32,
        CPU,
        graph,
        nothing,
        [Inputs((nothing,), nothing)],
    )
    trial = Trial(CONTENDERS["release-linear"])
    attempt(trial, lambda: start(trial, problem))
    assert (trial.reason, trial.extra_bytes) == (
        "its dense C x C mask does not fit",
        4 * classes**2,
    )


def test_inputs_that_do_not_fit_are_a_reason():
    with bounded_memory(CPU):
        (trial,), ceiling = measure(
            bench_of(CONTENDERS["ours-logits"]), Size("logits", 10**10, 100, None), quiet
        )
    assert (trial.reason, ceiling) == ("the inputs: out of memory", None)


def test_a_quick_run_compiles_nothing_that_is_not_named():
    every = list(CONTENDERS.values())
    assert not any(contender.is_compiled for contender in choose(every, [], quick=True))
    assert [
        c.name for c in choose(every, ["plain-compiled-linear", "ours-linear"], quick=True)
    ] == [
        "ours-linear",
        "plain-compiled-linear",
    ]
    assert choose(every, [], quick=False) == every
    with pytest.raises(UserError, match="must be one of ours-logits"):
        choose(every, ["xyz"], quick=True)


def test_the_problem_is_silenced_like_a_real_one():
    graph = make_graph(6000, CPU, torch.Generator().manual_seed(0))
    degrees = graph.indptr.diff()
    assert graph.num_targets == 1000
    assert int(degrees[:1000].max()) <= 8
    assert set(degrees[1000:].tolist()) == {1, 2}
    assert graph.num_pairs / 5000 == pytest.approx(1.37, abs=0.01)
    assert [
        make_graph(classes, CPU, torch.Generator()).num_classes for classes in range(2, 30)
    ] == list(range(2, 30))


def test_logits_are_measured_once_for_all_widths():
    grid = Grid([8], [40], [16, 32])
    assert grid.sizes({"logits", "linear"}) == [
        Size("logits", 8, 40, None),
        Size("linear", 8, 40, 16),
        Size("linear", 8, 40, 32),
    ]
    assert grid.sizes({"logits"}) == [Size("logits", 8, 40, None)]


def test_the_peak_counts_what_is_held_at_once():
    def work():
        first = torch.ones(1_000_000)
        second = first + 1
        del first
        return second + 1

    assert peak_bytes(work, CPU) == pytest.approx(8_000_000, abs=1000)  # scalars are tensors too
    assert peak_bytes(lambda: None, CPU) == 0


def test_passes_are_repeated_often_and_long_enough_but_not_for_ever():
    pace = Pace(least=3, most=6, seconds=1)
    assert [pace.is_enough([Pass(0, 0, 400.0)] * n) for n in range(5)] == [
        False,
        False,
        False,
        True,
        True,
    ]
    assert [pace.is_enough([Pass(0, 0, 1.0)] * n) for n in (5, 6)] == [False, True]


def test_a_round_of_inputs_is_larger_than_the_cache():
    for nbytes in (500_000, 3_000_000, 10**9):
        assert copies_beyond_cache(nbytes, CPU) * nbytes > 64 * 2**20
    assert copies_beyond_cache(10**9, CPU) == 1
