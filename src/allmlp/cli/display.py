"""What the terminal shows: tables of results, and which images could not be read."""

import io
import shutil
import sys
from collections.abc import Sequence

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.table import Table

from allmlp.errors import printable

NARROW = 60  # columns; below, tables have no lines between their columns, nor where those cannot be encoded
MAX_NAME = 60  # columns of a name in a table
MAX_PARTS = 6  # of a matrix that is wider than the terminal


def print_table(title: str, columns: list[str], rows: list[list[str]], names: int = 1) -> None:
    """Prints a table without escape codes; the first ``names`` columns are text, the others are numbers."""
    width = output_width()
    table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False) if is_plain() else Table()
    for i, column in enumerate(columns):
        if i < names:
            table.add_column(shorten(column), overflow="fold")
        else:
            table.add_column(shorten(column), justify="right", overflow="fold", min_width=widest(rows, i))
    for row in rows:
        table.add_row(*map(shorten, row))
    text = io.StringIO()
    Console(file=text, width=width, markup=False, highlight=False, color_system=None).print(table)
    print(title, "\n".join(line.rstrip() for line in text.getvalue().splitlines()), sep="\n")


def widest(rows: list[list[str]], column: int) -> int:
    return max((cell_len(row[column]) for row in rows), default=0)


def print_matrix(title: str, names: list[str], rows: list[list[str]]) -> bool:
    """Prints a square matrix with these names down and across, in parts if it is wide; False: they would be too many.

    ``rows``: the numbers of each row.
    """
    width = output_width()
    names = [shorten(name, max(min(MAX_NAME, width // 3), 5)) for name in names]
    margin = 1 if is_plain() else 3
    first = max(map(cell_len, names)) + margin
    widths = [max(cell_len(names[i]), widest(rows, i)) + margin for i in range(len(names))]
    parts: list[list[int]] = [[]]
    room = width - 1 - first
    for column, needed in enumerate(widths):
        if needed > room and parts[-1]:
            parts.append([])
            room = width - 1 - first
        parts[-1].append(column)
        room -= needed
    if len(parts) > MAX_PARTS:
        return False
    for part in parts:
        cells = [[name, *(row[column] for column in part)] for name, row in zip(names, rows, strict=True)]
        print_table(title, ["", *(names[column] for column in part)], cells)
    return True


def shorten(name: str, limit: int = MAX_NAME) -> str:
    """A name as a table shows it: printable, and without its middle if it takes more columns than the limit."""
    name = printable(name)
    if cell_len(name) <= limit:
        return name
    half = (limit - 1) // 2
    start, end = set_cell_size(name, half).rstrip(), set_cell_size(name[::-1], half).rstrip()[::-1]
    return f"{start}…{end}"


def is_plain() -> bool:
    """Whether tables have no lines."""
    return output_width() < NARROW or not (sys.stdout.encoding or "utf-8").lower().startswith("utf")


def output_width() -> int:
    """Columns of standard output; enough for any table where it is no terminal."""
    return shutil.get_terminal_size((80 if sys.stdout.isatty() else 200, 24)).columns


def print_letters(names: Sequence[str]) -> list[str]:
    """Prints a letter before each name and returns the letters; tables that use these fit into narrow terminals."""
    letters = [letter_of(number) for number in range(len(names))]
    for letter, name in zip(letters, names, strict=True):
        print(f"{letter}  {printable(name)}")
    return letters


def letter_of(number: int) -> str:
    """A, B, …, Z, AA, AB, …"""
    rest, digit = divmod(number, 26)
    return (letter_of(rest - 1) if rest else "") + chr(ord("A") + digit)


def describe_unreadable(names: list[str], shown: int = 20) -> str:
    """How many images could not be read, and which, in one line."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{len(names)} unreadable image(s): {', '.join(map(printable, names[:shown]))}{more}"
