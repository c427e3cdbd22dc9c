"""The bar of long work: how far, how fast, how long still."""

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text


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
    # where it would leave nothing but empty lines
    hidden = transient and console is not None and not console.is_terminal
    return Progress(*columns, Note(), console=console, transient=transient, disable=hidden)


class Note(ProgressColumn):
    """The task's note."""

    def render(self, task: Task) -> Text:
        """Return the note, empty if the task has none."""
        return Text(str(task.fields.get("note", "")))
