"""Tables of figures that commands print: 80 columns hold them, and no figure is ever broken."""

from rich.box import SIMPLE_HEAD
from rich.table import Table


def figure_table(first: str, *columns: str, title: str | None = None) -> Table:
    """Return a table whose first column holds names, and all others figures.

    Where room is scarce, names are folded and not cut, as they may differ in their ends.
    """
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(first, overflow="fold")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table
