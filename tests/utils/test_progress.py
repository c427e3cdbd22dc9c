import io

from rich.console import Console
from rich.progress import BarColumn, TextColumn

from fastlt.training.messages import progress_bar
from fastlt.utils.progress import EVERY, Bar, rated_progress


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def bar_in_a_file(clock: Clock) -> tuple[Bar, io.StringIO]:
    file = io.StringIO()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:g}"))
    return Bar(*columns, console=Console(file=file), get_time=clock), file


def test_a_file_gets_a_plain_line_a_minute():
    clock = Clock()
    bar, file = bar_in_a_file(clock)
    with bar:
        task = bar.add_task("packing", total=10)
        for _ in range(5):
            clock.now += EVERY / 2
            bar.advance(task)
    assert file.getvalue().splitlines() == ["packing 2", "packing 4"]


def test_a_short_task_leaves_nothing_in_a_file():
    clock = Clock()
    bar, file = bar_in_a_file(clock)
    with bar:
        bar.update(bar.add_task("packing", total=1), completed=1)
    assert file.getvalue() == ""


def test_a_terminal_gets_a_bar_and_no_lines():
    clock, file = Clock(), io.StringIO()
    console = Console(file=file, force_terminal=True, width=80)
    bar = Bar(BarColumn(), console=console, get_time=clock)
    with bar:
        task = bar.add_task("packing", total=10)
        clock.now += 2 * EVERY
        bar.advance(task)
    assert "━" in file.getvalue()


def test_the_line_of_a_training_names_epoch_loss_rate_and_time_left():
    clock, file = Clock(), io.StringIO()
    bar = progress_bar(Console(file=file))
    bar.get_time, bar.last = clock, clock()
    with bar:
        task = bar.add_task("", total=100, rate=0.0, note="")
        for done in (1, 2, 3):
            clock.now += EVERY
            note = f"epoch {done} loss 1.234 train 5.0"
            bar.update(task, completed=done, rate=1234.0, note=note)
    line = file.getvalue().splitlines()[-1]
    assert "epoch 3 loss 1.234" in line and "1,234 images/s" in line
    assert line.endswith("left 1:37:00"), line
    assert "━" not in line and "\x1b" not in line


def test_other_long_work_gets_lines_too():
    assert not rated_progress(Console(file=io.StringIO()), "images/s", transient=True).is_live
    terminal = Console(file=io.StringIO(), force_terminal=True)
    assert rated_progress(terminal, "images/s").is_live
