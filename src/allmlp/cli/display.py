"""What the terminal shows while a verb works, and tables when it has: the rest of the program does not know of it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from allmlp.errors import printable


class Bar:
    """A progress bar on standard error, silent where there is no terminal."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self.task: TaskID | None = None

    def update(self, done: int, total: int | None, text: str) -> None:
        """``total`` None: not known."""
        if self.progress is None:
            return
        if self.task is None:
            self.task = self.progress.add_task(text, total=total)
        self.progress.update(self.task, completed=done, total=total, description=text)


@contextmanager
def progress_bar(wanted: bool = True) -> Iterator[Bar]:
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
    # standard output is the result, perhaps a file: rich must not draw it above the bar
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as progress:
        yield Bar(progress)


def show_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on standard output; the first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(printable(column), justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*map(printable, row))
    wide = None if sys.stdout.isatty() else 200
    Console(width=wide, markup=False, highlight=False).print(table)


def list_unreadable(names: list[str], shown: int = 20) -> str:
    """For the last line of a verb: how many images could not be read, and which."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{len(names)} unreadable image(s): {', '.join(map(printable, names[:shown]))}{more}"
