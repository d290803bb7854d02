"""What the terminal shows: a progress bar while a command works, and tables of its results."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from allmlp.errors import printable


class Bar:
    """A progress bar on standard error; does nothing without a terminal."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self.task: TaskID | None = None

    def update(self, done: int, total: int | None, text: str) -> None:
        """Shows ``done`` of ``total`` (None: unknown) under the text."""
        if self.progress is None:
            return
        if self.task is None:
            self.task = self.progress.add_task(text, total=total)
        self.progress.update(self.task, completed=done, total=total, description=text)


@contextmanager
def progress_bar(wanted: bool = True) -> Iterator[Bar]:
    """A bar to update within the block; without a terminal, or if not wanted, it shows nothing."""
    console = Console(stderr=True)
    if not (wanted and console.is_terminal):
        yield Bar(None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeRemainingColumn(),
    )
    # standard output holds the result and may be a file: rich must not redirect it above the bar
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as progress:
        yield Bar(progress)


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Prints a table; the first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(printable(column), justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*map(printable, row))
    Console(width=output_width(), markup=False, highlight=False).print(table)


def output_width() -> int:
    """Columns of standard output."""
    return Console().width if sys.stdout.isatty() else 200


def describe_unreadable(names: list[str], shown: int = 20) -> str:
    """How many images could not be read, and which, in one line."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{len(names)} unreadable image(s): {', '.join(map(printable, names[:shown]))}{more}"
