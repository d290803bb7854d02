"""What the terminal shows: tables of results, and which images could not be read."""

import sys

from rich.console import Console
from rich.table import Table

from allmlp.errors import printable


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Prints a table; the first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(printable(column), justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*map(printable, row))
    console = Console(width=output_width(), markup=False, highlight=False, no_color=True, color_system=None)
    with console.capture() as text:
        console.print(table)
    print(text.get(), end="")


def output_width() -> int:
    """Columns of standard output."""
    return Console().width if sys.stdout.isatty() else 200


def describe_unreadable(names: list[str], shown: int = 20) -> str:
    """How many images could not be read, and which, in one line."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{len(names)} unreadable image(s): {', '.join(map(printable, names[:shown]))}{more}"
