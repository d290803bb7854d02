"""Lists of images on standard input, as ``find`` or a spreadsheet gives them."""

import os
from collections.abc import Iterator
from typing import BinaryIO

BOM = b"\xef\xbb\xbf"
PIECE = 1 << 16  # bytes that are read together


def read_names(file: BinaryIO) -> Iterator[str]:
    """Yields the names in a file: one a line, or with a zero byte after each (``find -print0``), as they come."""
    rest, separator = b"", b""
    while piece := read_some(file):
        rest += piece
        if not separator:
            rest = rest.removeprefix(BOM)
            separator = b"\0" if b"\0" in rest else b"\n" if b"\n" in rest else b""
        if separator:
            *names, rest = rest.split(separator)
            yield from clean(names)
    yield from clean([rest])


def read_some(file: BinaryIO) -> bytes:
    """What is there, without waiting for more."""
    read1 = getattr(file, "read1", None)
    return read1(PIECE) if read1 else file.read(PIECE)


def clean(names: list[bytes]) -> Iterator[str]:
    for name in names:
        if stripped := name.rstrip(b"\r\n"):
            yield os.fsdecode(stripped)
