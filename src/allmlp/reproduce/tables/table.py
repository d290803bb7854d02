"""A table of published and measured numbers: its columns with units, and its rows."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

MISSING = "–"
Source = Literal["", "published", "measured", "computed"]


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column; its numbers are rounded in the terminal alone.

    ``source``: of its numbers; in files it is part of the header. ``short``: the header in the terminal.
    ``in_files``: whether CSV and JSON have it too; the terminal shows the columns that a view names.
    """

    key: str  # in rows
    name: str  # in files
    unit: str = ""
    source: Source = ""
    short: str
    form: Callable[[Any], str] = str
    in_files: bool = True

    @property
    def header(self) -> str:
        """As in the files: the source, the name, and the unit."""
        return " ".join(filter(None, (self.source, self.name, f"({self.unit})" if self.unit else "")))

    def show(self, row: Mapping[str, Any]) -> str:
        value = row.get(self.key)
        return MISSING if value is None else self.form(value)


@dataclass(frozen=True, kw_only=True)
class View:
    """A part of a table as the terminal shows it: some of its columns under a title."""

    title: str
    columns: Sequence[str]  # keys


@dataclass(frozen=True, kw_only=True)
class Table:
    """What a command found. ``rows``: values by the keys of the columns; None where there is none.

    ``label`` names a row in one line. ``notes``: paragraphs below the table.
    """

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    views: Sequence[View]
    notes: Sequence[str] = ()
    label: Callable[[Mapping[str, Any]], str] | None = None
    details: Mapping[str, Any] = field(default_factory=dict)  # for the JSON alone

    def column(self, key: str) -> Column:
        return next(column for column in self.columns if column.key == key)

    @property
    def columns_in_files(self) -> list[Column]:
        return [column for column in self.columns if column.in_files]

    def to_csv(self) -> str:
        """One line for each row; an empty cell was not published, or not measured, as its header says."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        columns = self.columns_in_files
        writer.writerow([column.header for column in columns])
        for row in self.rows:
            writer.writerow(["" if (value := row.get(column.key)) is None else value for column in columns])
        return text.getvalue()

    def to_json_object(self) -> dict[str, Any]:
        return {
            "reproduces": self.name,
            "title": self.title,
            "columns": {
                column.key: {"name": column.name, "unit": column.unit, "source": column.source}
                for column in self.columns_in_files
            },
            "rows": [{column.key: row.get(column.key) for column in self.columns_in_files} for row in self.rows],
            "notes": list(self.notes),
            **self.details,
        }


def integer(value: float) -> str:
    return f"{value:,.0f}"


def decimals(digits: int) -> Callable[[float], str]:
    """Formats a number with this many digits after the point."""

    def form(value: float) -> str:
        return f"{value:,.{digits}f}"

    return form


def significant(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    text = f"{value:.3g}"
    return text if "e" not in text else f"{value:.7f}".rstrip("0")
