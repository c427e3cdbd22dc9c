import csv
import itertools
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.command import fastlt
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from fastlt.cli import app
from fastlt.config import load_config
from fastlt.data.engines.ffcv.native import has_ffcv
from fastlt.decode.region import has_region
from fastlt.errors import UserError
from fastlt.packing.collection import ImageRef
from fastlt.packing.encode import read_bytes
from fastlt_benchmarks.loaders.contenders import all_contenders, all_limits
from fastlt_benchmarks.loaders.images import (
    Choice,
    choose_images,
    in_pages,
    pack_in,
    temporary_folder,
    write_forms,
    write_stock_beton,
)
from fastlt_benchmarks.loaders.limits import Decoder, decodes, scaled, turbojpeg
from fastlt_benchmarks.loaders.peers import random_box
from fastlt_benchmarks.loaders.photos import draw_photo, write_photos
from fastlt_benchmarks.loaders.run import COLUMNS, choose, make_row, show
from fastlt_benchmarks.loaders.table import TABLE_WIDTH, table
from fastlt_benchmarks.loaders.trials import (
    Contender,
    Epoch,
    Source,
    Task,
    Trial,
    bounded,
    cpu_seconds,
    run_rounds,
)
from fastlt_benchmarks.loss.contenders import Unavailable

HERE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# a class of pictures that a crop does not change
COLOURS = np.array(list(itertools.product((30, 125, 220), repeat=3)))
SIZE, BATCH, ROUNDS = 40, 10, 1


def quiet(name: str, done: int) -> None:
    pass


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> Path:
    """A JPEG of each colour, of sizes that differ."""
    folder = tmp_path_factory.mktemp("colours")
    for i, colour in enumerate(COLOURS):
        pixels = np.broadcast_to(colour.astype(np.uint8), (90 + i, 140 - i, 3))
        (folder / str(i % 3)).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / str(i % 3) / f"{i}.jpg", quality=95)
    return folder


@pytest.fixture(scope="module")
def task(colours, tmp_path_factory) -> Task:
    folder = tmp_path_factory.mktemp("forms")
    forms = {contender.form for contender in all_contenders()}
    images = write_forms(
        choose_images(None, colours, 1000, 0, folder), forms, folder, Console(quiet=True)
    )
    return Task(images, SIZE, BATCH, 2, HERE)


@pytest.fixture(scope="module")
def trials(task) -> tuple[list[Trial], dict[str, list[list[torch.Tensor]]]]:
    """All contenders, measured, and the batches of each by epoch."""
    seen: dict[str, list[list[torch.Tensor]]] = {}

    def recorded(contender: Contender) -> Contender:
        def start(task: Task) -> Source:
            source = contender.start(task)
            epochs = seen.setdefault(contender.name, [])

            def epoch(number: int):
                epochs.append([])
                for batch in source.epoch(number):
                    epochs[-1].append(
                        batch.cpu().clone() if isinstance(batch, torch.Tensor) else batch
                    )
                    yield batch

            return Source(epoch, source.close)

        return replace(contender, start=start)

    made = [Trial(recorded(contender)) for contender in [*all_contenders(), *all_limits()]]
    run_rounds(made, task, ROUNDS, quiet)
    return made, seen


@pytest.fixture(scope="module")
def shown(trials, task, tmp_path_factory) -> tuple[str, Path, list[dict[str, str]]]:
    """What is printed at the end, the file and its rows."""
    path = tmp_path_factory.mktemp("results") / "data-cpu.csv"
    console = Console(width=TABLE_WIDTH)
    with console.capture() as capture:
        show(trials[0], task, ROUNDS, path, console)
    return capture.get(), path, list(csv.DictReader(path.open()))


@pytest.mark.slow
def test_whoever_is_installed_runs_and_the_others_say_what_is_missing(trials):
    reasons = {trial.contender.name: trial.reason for trial in trials[0]}
    missing = r"not installed|cannot be loaded|was not compiled|no FFmpeg"
    assert all(not reason or re.search(missing, reason) for reason in reasons.values()), reasons
    assert not reasons["pillow"] and not reasons["torch-exact"]
    if has_ffcv():
        assert not reasons["ffcv-stock"] and not reasons["ffcv-exact"] and not reasons["decoding"]
    if has_region():
        assert not reasons["torch-region"] and not reasons["torch-transcoded"]


@pytest.mark.slow
def test_all_see_every_image_once_an_epoch_in_batches_of_the_same_shape(trials):
    for trial in trials[0]:
        if trial.reason or trial.contender.kind == "limit":
            continue
        assert len(trials[1][trial.contender.name]) == 1 + ROUNDS
        for batches in trials[1][trial.contender.name]:
            assert [tuple(batch.shape) for batch in batches] == [
                (n, SIZE, SIZE, 3) for n in (10, 10, 7)
            ]
            assert {batch.dtype for batch in batches} == {torch.uint8}
            means = torch.cat(batches).double().mean(dim=(1, 2)).numpy()
            nearest = np.abs(means[:, None] - COLOURS).sum(axis=2).argmin(axis=1)
            assert sorted(nearest) == list(range(27)), trial.contender.name
            assert np.abs(means - COLOURS[nearest]).max() < 6


@pytest.mark.slow
def test_limits_decode_every_image(trials):
    for trial in trials[0]:
        if trial.contender.kind == "limit" and not trial.reason:
            assert [sum(batches) for batches in trials[1][trial.contender.name]] == [27] * (
                1 + ROUNDS
            )


@pytest.mark.slow
def test_every_contender_has_a_row_with_all_figures_or_a_reason(shown):
    rows = shown[2]
    assert [row["contender"] for row in rows] == [
        contender.name for contender in [*all_contenders(), *all_limits()]
    ]
    assert list(rows[0]) == [*COLUMNS, "machine", "torch", "python", "date", "command"]
    assert {
        (row["images"], row["size"], row["batch"], row["rounds"], row["source"]) for row in rows
    } == {("27", "40", "10", "1", "folder")}
    for row in rows:
        if row["reason"]:
            assert not row["images_per_s"] and not row["ratio_to_pillow"]
            continue
        low, middle, high = (float(row[f"images_per_s{end}"]) for end in ("_min", "", "_max"))
        assert 0 < low <= middle <= high and float(row["first_images_per_s"]) > 0
        assert float(row["cpu_s_per_1000_images"]) >= 0
        assert float(row["ratio_to_pillow"]) > 0
    assert {row["contender"]: row for row in rows}["pillow"]["ratio_to_pillow"] == "1.0"


@pytest.mark.slow
def test_the_table_names_them_all_and_fits_100_columns(shown):
    printed, path, rows = shown
    assert max(map(len, printed.replace(str(path), "").splitlines())) <= 100 + 2 * len(str(path))
    for row in rows:
        (line, *_) = (
            line for line in printed.splitlines() if line.split()[:1] == [row["contender"]]
        )
        assert ("-" in line.split()[1]) == bool(row["reason"])
        if row["reason"]:
            assert f"{row['contender']}: {row['reason'][:20]}" in printed


def test_the_largest_figures_fit_the_table():
    row = dict.fromkeys(COLUMNS, 123456.7) | {
        "contender": "torch-transcoded",
        "kind": "ours",
        "reason": "",
    }
    console = Console(width=TABLE_WIDTH)
    with console.capture() as capture:
        console.print(table([row]))
    assert "123,457 123,457–123,457" in capture.get()


@pytest.mark.slow
def test_a_picture_is_drawn_beside_the_file(shown):
    assert shown[1].with_suffix(".png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


def test_the_command_measures_generated_photos_and_leaves_nothing_behind(
    tmp_path, tmp_path_factory, monkeypatch
):
    temporary = tmp_path_factory.mktemp("t")  # a short path: workers open sockets in it
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setattr("fastlt_benchmarks.loaders.run.QUICK_IMAGES", 12)
    options = [
        "--quick",
        "--size=32",
        "--rounds=1",
        "--workers=1",
        "--contender=torch-exact",
        f"--out={tmp_path / 'out'}",
    ]
    ended = CliRunner().invoke(app, ["bench-data", *options])
    assert ended.exit_code == 0, ended.output
    text = " ".join(ended.output.split())
    assert (
        text.index("12 generated photos")
        < text.index("pair by pair within a round")
        < text.index("12 images to 32 x 32")
    )
    assert max(map(len, ended.output.splitlines())) <= 100
    (path,) = (tmp_path / "out").glob("data-*.csv")
    assert [row["contender"] for row in csv.DictReader(path.open())] == [
        "torch-exact",
        "decoding",
        "decoding-scaled",
    ]
    assert path.with_suffix(".png").is_file()
    assert list(temporary.iterdir()) == []


def test_tuning_ends_in_a_line_that_training_takes(colours):
    ended = CliRunner().invoke(
        app, ["bench-data", "--tune", f"--images={colours}", "--size=32", "--rounds=1"]
    )
    assert ended.exit_code == 0, ended.output
    line = ended.output.strip().splitlines()[-1]
    data = load_config("cifar100-lt", line.split()).data
    assert line.startswith(f"data.engine={data.engine} data.workers={data.workers}")
    assert data.engine in ("torch", "ffcv", "dali") and data.workers >= 1
    assert "data.engine=torch data.workers=1 " in ended.output


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--images=nowhere"], "there is no folder nowhere"),
        (["--images=empty"], "there are no images below empty"),
        (["--images=pngs"], "none of the 2 images in pngs is a sound JPEG"),
        (["--data=empty"], "empty is not a pack"),
        (["--data=empty", "--images=empty"], "exclude each other"),
        (
            ["--contender=pilow"],
            "there is no 'pilow': it must be one of pillow, simplejpeg, torch-exact",
        ),
        (["--tune", "--contender=pillow"], "leave --contender out"),
        (["--out=file"], "cannot write to file/data-"),
    ],
)
def test_bad_input_is_told_before_anything_is_measured(options, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for folder in ("empty", "pngs", "out"):
        (tmp_path / folder).mkdir()
    for name in "ab":
        Image.new("RGB", (20, 20)).save(tmp_path / "pngs" / f"{name}.png")
    ended = CliRunner().invoke(app, ["bench-data", "--out=out", *options])
    assert isinstance(ended.exception, UserError) and said in str(ended.exception)
    assert list((tmp_path / "out").iterdir()) == []


def test_bad_input_is_one_sentence_and_code_2(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = fastlt("bench-data", "--images=nowhere")
    assert ended.returncode == 2 and "there is no folder nowhere" in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    "option", ["--size=0", "--batch=0", "--workers=0", "--rounds=0", "--size=many"]
)
def test_counts_that_are_none_are_refused(option):
    assert CliRunner().invoke(app, ["bench-data", option]).exit_code == 2


def test_a_file_of_another_benchmark_is_refused(tmp_path):
    (tmp_path / "data-cpu.csv").write_text("recipe,ratio\n")
    ended = CliRunner().invoke(app, ["bench-data", f"--out={tmp_path}"])
    if HERE.type == "cpu":
        assert isinstance(ended.exception, UserError) and "other columns" in str(ended.exception)
        assert (tmp_path / "data-cpu.csv").read_text() == "recipe,ratio\n"


# ---- the images


def test_what_not_everybody_can_decode_is_left_out(tmp_path):
    pixels = Image.fromarray(draw_photo(0))
    for name in ("first", "second"):
        pixels.save(tmp_path / f"{name}.jpg")
    pixels.convert("L").save(tmp_path / "grey.jpeg")
    pixels.convert("CMYK").save(tmp_path / "cmyk.jpg")
    pixels.save(tmp_path / "disguised.jpg", format="PNG")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "first.jpg").read_bytes()[:-2000])
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no image")
    choice = choose_images(None, tmp_path, 100, 0, tmp_path)
    left = {"first", "second", "grey"} | (set() if turbojpeg() else {"cut"})
    assert {Path(ref.path).stem for ref in choice.refs} == left
    assert (
        f"{len(left)} photos of the folder" in choice.what
        and f"{7 - len(left)} that are no sound JPEG" in choice.what
    )


def test_of_too_many_images_evenly_spaced_ones_are_taken(colours):
    choice = choose_images(None, colours, 5, 0, colours)
    assert [Path(ref.path) for ref in choice.refs] == [
        sorted(colours.rglob("*.jpg"))[i] for i in (0, 6, 13, 19, 26)
    ]
    assert "5 of 27" in choice.what


def test_the_images_of_a_pack_are_its_training_split_byte_for_byte(task, tmp_path):
    choice = choose_images(str(task.images.pack.path), None, 100, 0, tmp_path)
    again = pack_in(tmp_path / "again", choice.refs, transcode=False)
    split = task.images.split
    assert [bytes(again.train.read(i)) for i in range(27)] == [
        bytes(split.read(i)) for i in range(27)
    ]
    assert choice.source == "pack"


def test_of_a_pack_at_an_address_the_shards_with_the_images_are_fetched(
    task, tmp_path, monkeypatch
):
    fsspec = pytest.importorskip(
        "fsspec", reason="no fsspec here: it comes with the extra `remote`"
    )
    monkeypatch.setenv("FASTLT_CACHE", str(tmp_path / "cache"))
    fsspec.filesystem("memory").put(str(task.images.pack.path), "/far/images", recursive=True)
    choice = choose_images("memory://far/images", None, 5, 0, tmp_path)
    split = task.images.split
    assert [read_bytes(ref) for ref in choice.refs] == [
        bytes(split.read(i)) for i in (0, 6, 13, 19, 26)
    ]
    assert "5 of 27 photos of the pack memory://far/images" in choice.what


def test_every_form_holds_the_same_images(task):
    split = task.images.split
    assert [Path(path).read_bytes() for path in task.images.files] == [
        bytes(split.read(i)) for i in range(len(split))
    ]
    if task.images.transcoded is not None:
        other = task.images.transcoded.train
        assert (other.height == split.height).all() and (other.width == split.width).all()
    if has_ffcv():
        check_stock(task)


def check_stock(task: Task) -> None:
    from ffcv.reader import Reader

    assert task.images.stock is not None
    reader, file, split = (
        Reader(str(task.images.stock)),
        task.images.stock.read_bytes(),
        task.images.split,
    )
    images = reader.metadata["f0"]
    starts, sizes = images["data_ptr"].tolist(), reader.alloc_table["size"].tolist()
    assert [file[start : start + size] for start, size in zip(starts, sizes, strict=True)] == [
        bytes(split.read(i)) for i in range(len(split))
    ]
    assert (images["height"] == split.height).all() and (images["width"] == split.width).all()


def test_ffcv_is_told_the_sides_as_stored_not_upright(tmp_path):
    if not has_ffcv():  # which takes seconds, so not for all who collect tests
        pytest.skip("needs FFCV")
    from ffcv.reader import Reader

    exif = Image.Exif()
    exif[274] = 6  # a quarter turn
    Image.new("RGB", (80, 50)).save(tmp_path / "turned.jpg", exif=exif)
    split = pack_in(
        tmp_path / "pack", [ImageRef("turned", 0, str(tmp_path / "turned.jpg"))], transcode=False
    ).train
    assert (split.height[0], split.width[0]) == (80, 50)
    images = Reader(str(write_stock_beton(split, tmp_path / "stock.beton"))).metadata["f0"]
    assert (images["height"][0], images["width"][0]) == (50, 80)


def test_no_image_lies_across_the_end_of_a_page():
    sizes = np.array([30, 40, 50, 100, 1, 99])
    starts = in_pages(10, sizes, 100)
    assert starts.tolist() == [10, 40, 100, 200, 300, 301]
    assert ((starts // 100) == ((starts + sizes - 1) // 100)).all()


def test_images_that_do_not_fit_the_disk_are_told_beforehand(tmp_path):
    choice = Choice([ImageRef("huge", 0, "huge", 0, 10**18)], "folder", "")
    with pytest.raises(UserError, match="name another folder with TMPDIR"):
        write_forms(choice, {"files"}, tmp_path, Console(quiet=True))
    assert list(tmp_path.iterdir()) == []


def test_generated_photos_are_the_same_again_and_as_large_as_photos(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, second = write_photos(tmp_path / "a", 8), write_photos(tmp_path / "b", 8)
    assert [Path(ref.path).read_bytes() for ref in first] == [
        Path(ref.path).read_bytes() for ref in second
    ]
    assert all(max(Image.open(ref.path).size) == 500 for ref in first)
    assert 60_000 < np.mean([Path(ref.path).stat().st_size for ref in first]) < 110_000


@pytest.mark.parametrize("stop", [KeyboardInterrupt, lambda: os.kill(os.getpid(), signal.SIGTERM)])
def test_temporary_files_go_whatever_ends_the_run(stop):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises((KeyboardInterrupt, SystemExit)), temporary_folder() as folder:
        (folder / "file").write_text("")
        ending = stop()
        if ending is not None:
            raise ending
        threading.Event().wait(10)  # until the signal is seen
    assert not folder.exists()
    assert signal.getsignal(signal.SIGTERM) is before


# ---- the measurement


def fake(name: str, epoch, **options) -> Contender:
    return Contender(name, "", "ours", "pack", lambda task: Source(epoch), **options)


def whole(number: int):
    yield torch.zeros(27, SIZE, SIZE, 3, dtype=torch.uint8)


@pytest.mark.parametrize("forks", [False, True])
@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (torch.zeros(20, SIZE, SIZE, 3, dtype=torch.uint8), "it gave 20 of 27 images"),
        (torch.zeros(27, 3, SIZE, SIZE, dtype=torch.uint8), "it gave (27, 3, 40, 40) torch.uint8"),
        (torch.zeros(27, SIZE, SIZE, 3), "it gave (27, 40, 40, 3) torch.float32"),
    ],
)
def test_who_does_not_do_the_work_has_a_reason_and_no_figures(task, batch, reason, forks):
    bad, good = (
        Trial(fake("bad", lambda number: iter([batch]), forks=forks)),
        Trial(fake("good", whole, forks=forks)),
    )
    run_rounds([bad, good], task, 2, quiet)
    assert (bad.reason, bad.first, bad.later) == (reason, None, [])
    assert (good.reason, len(good.later)) == ("", 2)


def test_who_fails_in_a_later_round_keeps_no_figures_either_and_is_closed(task):
    closed = []

    def epoch(number: int):
        if number == 1:
            raise ValueError("no such luck\nand more")
        yield from whole(number)

    trial = Trial(
        Contender(
            "late", "", "ours", "pack", lambda task: Source(epoch, lambda: closed.append(True))
        )
    )
    run_rounds([trial], task, 2, quiet)
    assert (trial.reason, trial.first, trial.later, closed) == (
        "ValueError: no such luck",
        None,
        [],
        [True],
    )


def test_contenders_take_turns(task):
    order = []

    def noted(name: str):
        def epoch(number: int):
            order.append((name, number))
            yield from whole(number)

        return Trial(fake(name, epoch))

    run_rounds([noted("a"), noted("b")], task, 1, quiet)
    assert order == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]


def test_who_hangs_is_given_up_and_ends_at_its_next_batch():
    release, ended = threading.Event(), threading.Event()

    def hangs(beat):
        beat(0)
        release.wait(20)
        try:
            beat(1)
        finally:
            ended.set()

    timer = threading.Timer(1.0, release.set)
    timer.start()
    with pytest.raises(Unavailable, match=r"gave nothing for 0\.1 s"):
        bounded(hangs, lambda done: None, patience=0.1)
    assert ended.wait(20)


def test_cpu_time_of_living_children_counts():
    code = "import time\nwhile time.process_time() < 0.3: pass\nprint('done', flush=True)\ninput()"
    before, own = cpu_seconds(), time.process_time()
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None and child.stdin is not None
        assert child.stdout.readline() == "done\n"
        alive = cpu_seconds() - before - (time.process_time() - own)
        child.stdin.close()
        child.wait()
    gone = cpu_seconds() - before - (time.process_time() - own)
    assert alive > 0.25 and gone > 0.25


def test_ratios_are_pair_by_pair(task):
    def trial(name: str, *rates: float) -> Trial:
        contender = Contender(name, "", "peer", "pack", lambda task: Source(whole))
        return Trial(
            contender, first=Epoch(1, 5, 1), later=[Epoch(1, rate, 0.027) for rate in rates]
        )

    fast, pillow = trial("fast", 20, 90, 40), trial("pillow", 10, 30, 40)
    row = make_row(fast, [fast, pillow], task, 3)
    assert (row["ratio_to_pillow"], row["ratio_to_ffcv_stock"], row["images_per_s"]) == (
        2,
        None,
        40,
    )
    assert (row["images_per_s_min"], row["images_per_s_max"], row["cpu_s_per_1000_images"]) == (
        20,
        90,
        1,
    )


def test_named_contenders_are_chosen_in_the_usual_order():
    assert [c.name for c in choose(all_contenders(), ["dali", "pillow"])] == ["pillow", "dali"]
    assert len(choose(all_contenders(), [])) == len(all_contenders())


# ---- the limits


def test_decoding_is_scaled_to_what_is_not_below_the_size():
    sides = np.array([[500, 375], [1001, 2000], [100, 90], [224, 224], [1800, 1800]])
    assert scaled(sides, 224).tolist() == [
        [500, 375],
        [251, 500],
        [100, 90],
        [224, 224],
        [225, 225],
    ]
    assert scaled(sides, None) is sides


@pytest.mark.skipif(turbojpeg() is None, reason="needs libturbojpeg")
def test_the_limit_decodes_the_image_and_notices_damage(tmp_path):
    pixels = draw_photo(3)
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95)
    data, (height, width) = (tmp_path / "a.jpg").read_bytes(), pixels.shape[:2]
    decoder = Decoder(turbojpeg())
    assert decoder.decode(data, width, height)
    assert (
        np.abs(
            decoder.pixels.reshape(pixels.shape).astype(int)
            - np.asarray(Image.open(tmp_path / "a.jpg"))
        ).mean()
        < 2
    )
    assert decoder.decode(data, -(-width // 2), -(-height // 2))
    assert decodes(data, width, height) and not decodes(data[:-3000], width, height)


def test_random_boxes_lie_inside():
    random.seed(0)
    for height, width in ((1, 1), (500, 20), (20, 500), (375, 500)):
        for _ in range(50):
            top, left, h, w = random_box(height, width)
            assert (
                0 <= top <= top + h <= height and 0 <= left <= left + w <= width and h > 0 and w > 0
            )
