"""A progress bar on standard error or in a notebook."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Bar:
    """A progress bar, which does nothing if ``progress`` is None."""

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
def progress_bar(wanted: bool | None = None) -> Iterator[Bar]:
    """A bar to update within the block; ``wanted`` None: only in a notebook, or a terminal that moves its cursor.

    A bar is nothing but escape codes, so that there is none where ``NO_COLOR`` is set or ``TERM`` is dumb.
    """
    console = Console(stderr=True)
    visible = console.is_jupyter or (console.is_terminal and not console.is_dumb_terminal and not console.no_color)
    if wanted is False or (wanted is None and not visible):
        yield Bar(None)
        return
    if not visible:
        console = Console(stderr=True, force_terminal=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeRemainingColumn(),
    )
    # standard output holds the result and may be a file: rich must not redirect it above the bar
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as progress:
        yield Bar(progress)
