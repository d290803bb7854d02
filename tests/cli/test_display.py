"""Tables fit the terminal, whatever the names and however narrow it is, and hold no escape codes."""

import io
import os
import re
import sys

import numpy as np
import pytest
from rich.cells import cell_len

from allmlp.cli import display
from allmlp.cli.display import MAX_NAME, output_width, print_letters, print_matrix, print_table, shorten

NAMES = {
    "plain": [f"breed{i:02d}" for i in range(12)],
    "spaces": [f"a breed of dogs, number {i}" for i in range(8)],
    "wide": [f"犬の品種の名前{i}" for i in range(8)],
    "long": ["x" * 300 + str(i) for i in range(3)],
    "control": ["red\x1b[31m", "a\nline", "back\\slash"],
    "one": ["a"],
}


@pytest.fixture
def width(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    monkeypatch.setattr(display, "output_width", lambda: request.param)
    return request.param


def printed(capsys: pytest.CaptureFixture[str], width: int) -> list[str]:
    lines = [line for line in capsys.readouterr().out.splitlines() if line != "the title"]
    assert all(cell_len(line) <= width for line in lines), max(lines, key=cell_len)
    assert all(line.isprintable() for line in lines)
    return lines


@pytest.mark.parametrize("width", [40, 64, 80, 200], indirect=True)
@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES.keys())
def test_every_count_of_a_matrix_is_printed_or_none(
    width: int, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    counts = (np.arange(len(names) ** 2).reshape(len(names), -1) * 37 % 1009).astype(str).tolist()
    if not print_matrix("the title", names, counts):
        assert width == 40 or names == NAMES["spaces"]  # one column in each part
        assert capsys.readouterr().out == ""
        return
    lines = printed(capsys, width)
    rows = [numbers for line in lines if (numbers := re.findall(r"(?<=[ │])\d+(?= *(?:│|$| ))", line))]
    parts = [rows[i : i + len(names)] for i in range(0, len(rows), len(names))]
    if not any(" " in name for name in names):  # whose digits look like counts
        assert [[count for part in parts for count in part[i]] for i in range(len(names))] == counts


@pytest.mark.parametrize("width", [40, 80], indirect=True)
@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES.keys())
def test_a_table_shows_names_in_full_up_to_a_limit_and_all_numbers(
    width: int, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    print_table("the title", ["class", "images", "recall"], [[name, "12,345", "0.1234"] for name in names])
    text = "".join(printed(capsys, width))
    assert text.count("12,345") == text.count("0.1234") == len(names)
    letters = re.sub(r"[\s│]|12,345|0\.1234", "", text)
    assert all(re.sub(r"\s", "", shorten(name)) in letters for name in names)


def test_a_shortened_name_keeps_both_ends() -> None:
    for name in ("class" * 50 + "A", "犬" * 40 + "B", "é" * 61):
        short = shorten(name)
        assert cell_len(short) <= MAX_NAME
        assert (short[:3], short[-1]) == (name[:3], name[-1])
    assert shorten("x" * MAX_NAME) == "x" * MAX_NAME


def test_lines_are_drawn_only_where_they_can_be_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, drawn in (("ascii", False), ("cp1252", False), ("utf-8", True)):
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict")
        monkeypatch.setattr(sys, "stdout", out)
        print_table("the title", ["class", "images"], [["red", "1"]])
        out.seek(0)
        assert ("│" in out.read()) is drawn


def test_the_width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(os, "get_terminal_size", lambda _descriptor: os.terminal_size((0, 0)))
    assert output_width() == 200  # a file
    monkeypatch.setattr(os, "get_terminal_size", lambda _descriptor: os.terminal_size((40, 24)))
    assert output_width() == 40
    monkeypatch.setenv("COLUMNS", "66")
    assert output_width() == 66


def test_letters_for_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert print_letters([f"w{i}\n" for i in range(28)])[-3:] == ["Z", "AA", "AB"]
    assert "\nAB  w27\\n\n" in capsys.readouterr().out
