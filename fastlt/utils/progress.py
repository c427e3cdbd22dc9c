"""The bar of long work: how far, how fast, how long still."""

from typing import Any

from rich import get_console
from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

EVERY = 60.0  # seconds between lines, where no bar can be shown


class Bar(Progress):
    """A bar in a terminal; in a file or a pipe, a plain line a minute."""

    def __init__(self, *columns: ProgressColumn | str, console: Console | None, **options: Any):
        console = console or get_console()
        self.is_live = console.is_terminal or console.is_jupyter
        super().__init__(*columns, console=console, disable=not self.is_live, **options)
        self.last = self.get_time()

    def update(self, task_id: TaskID, **fields: Any) -> None:
        """Set fields of a task, as Progress does."""
        super().update(task_id, **fields)
        self.tell(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Go on by some steps, as Progress does."""
        super().advance(task_id, advance)
        self.tell(task_id)

    def tell(self, task_id: TaskID) -> None:
        """Print the line of a task where one is due."""
        now = self.get_time()
        if not self.is_live and now - self.last >= EVERY:
            self.last = now
            line = " ".join(self.line_of(self._tasks[task_id]).split())
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def line_of(self, task: Task) -> str:
        """Return what the columns say of a task, but for bars."""
        shown = (
            column.format(task=task) if isinstance(column, str) else column(task)
            for column in self.columns
            if not isinstance(column, BarColumn)
        )
        return "  ".join(str(text) for text in shown)


class Rate(ProgressColumn):
    """scale: of a step to the unit. Rates below ten have a decimal."""

    def __init__(self, unit: str, scale: float) -> None:
        super().__init__()
        self.unit, self.scale = unit, scale

    def render(self, task: Task) -> Text:
        """Return the rate in words."""
        speed = self.scale * (task.finished_speed or task.speed or 0)
        return Text(f"{speed:,.{0 if speed >= 10 else 1}f} {self.unit}" if speed else "")


def rated_progress(
    console: Console | None, unit: str, scale: float = 1.0, transient: bool = False
) -> Progress:
    """A task's field `note`, if it has one, stands at the end."""
    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        Rate(unit, scale),
        TimeRemainingColumn(),
    ]
    return Bar(*columns, Note(), console=console, transient=transient)


class Note(ProgressColumn):
    """The task's note."""

    def render(self, task: Task) -> Text:
        """Return the note, empty if the task has none."""
        return Text(str(task.fields.get("note", "")))
