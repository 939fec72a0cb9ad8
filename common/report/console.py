"""Tables of several runs on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from common.report.compare import Table


def show(found: Table, title: str = "") -> None:
    """Print for people."""
    console = Console(width=None if Console().is_terminal else 200)
    table = RichTable(title=title or None)
    for number, column in enumerate(found.columns):
        table.add_column(column, justify="left" if number < 2 else "right")
    for row in found.rows:
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)
    for note in found.notes:
        console.print(Text(note))
