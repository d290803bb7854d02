"""What the terminal shows while a verb works, and tables when it has: the rest of the program does not know of it."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


class Bar:
    """A progress bar on standard error, told of several things in turn; silent where there is no terminal."""

    def __init__(self, progress: Progress | None) -> None:
        self.progress = progress
        self.tasks: dict[str, Any] = {}

    def update(self, done: int, total: int, text: str, what: str = "train") -> None:
        if self.progress is None:
            return
        if what not in self.tasks:
            self.tasks[what] = self.progress.add_task(text, total=total)
        self.progress.update(self.tasks[what], completed=done, total=total, description=text)
        self.progress.tasks[self.tasks[what]].visible = done < total or what == "train"


@contextmanager
def progress_bar() -> Iterator[Bar]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Bar(None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        handlers = logging.getLogger("mlp_mixer").handlers
        streams = [handler.stream for handler in handlers if isinstance(handler, logging.StreamHandler)]
        for handler in handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.setStream(sys.stderr)  # which rich has replaced, so that lines go above the bar
        try:
            yield Bar(progress)
        finally:
            for handler, stream in zip(handlers, streams, strict=True):
                if isinstance(handler, logging.StreamHandler):
                    handler.setStream(stream)


def show_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """A table on standard output; the first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in rows:
        table.add_row(*row)
    wide = None if sys.stdout.isatty() else 200
    Console(width=wide, markup=False, highlight=False).print(table)


def list_unreadable(names: list[str], shown: int = 20) -> str:
    """For the last line of a verb: how many images could not be read, and which."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{len(names)} unreadable image(s): {', '.join(names[:shown])}{more}"
