"""Many names in little memory: one buffer of text in place of a Python string for each."""

import unicodedata
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import overload

import numpy as np

ENCODING = "utf-8", "surrogatepass"  # a file name that is not valid UTF-8 has surrogates in Python, and keeps them
CHUNK = 1 << 13  # names that are decoded together


def normal_form(name: str) -> str:
    """The name with composed letters (Unicode's NFC). macOS and its zips decompose them: é is two characters there."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


class Names(Sequence[str]):
    """N strings: 12 bytes for each beside its text, where a ``str`` takes about 100.

    Slices and subsets share the text. Like a tuple, it cannot be changed and equals any tuple or list of the same
    strings.

    Args:
        text: (bytes,) uint8, the names in UTF-8.
        starts: (N,) int64, where each name starts in the text.
        lengths: (N,) int32, its length in bytes.
    """

    __slots__ = ("lengths", "starts", "text")

    def __init__(self, text: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> None:
        self.text, self.starts, self.lengths = text, starts, lengths

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "Names": ...
    def __getitem__(self, index: int | slice) -> "str | Names":
        if isinstance(index, slice):
            return self.subset(index)
        start = int(self.starts[index])
        return str(self.text[start : start + int(self.lengths[index])].data, *ENCODING)

    def __iter__(self) -> Iterator[str]:
        text = self.text.data
        for i in range(0, len(self), CHUNK):
            starts, lengths = self.starts[i : i + CHUNK].tolist(), self.lengths[i : i + CHUNK].tolist()
            for start, length in zip(starts, lengths, strict=True):
                yield str(text[start : start + length], *ENCODING)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Names | tuple | list):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # pyright: ignore[reportAssignmentType]  # equal tuples would need the same hash

    def __repr__(self) -> str:
        return f"Names({list(self[:3])}{', …' if len(self) > 3 else ''} {len(self):,} in all)"

    def subset(self, indices: np.ndarray | slice) -> "Names":
        """The names at these positions, in their order."""
        return Names(self.text, self.starts[indices], self.lengths[indices])

    def without_prefix(self, prefix: str) -> "Names":
        """The names without a prefix that all of them have."""
        size = len(prefix.encode(*ENCODING))
        return Names(self.text, self.starts + size, self.lengths - np.int32(size))


def pack(names: Iterable[str]) -> Names:
    if isinstance(names, Names):
        return names
    text, lengths = bytearray(), array("i")
    for name in names:
        encoded = name.encode(*ENCODING)
        text += encoded
        lengths.append(len(encoded))
    sizes = np.frombuffer(lengths, dtype=np.int32)
    starts = np.cumsum(sizes, dtype=np.int64)
    starts -= sizes
    return Names(np.frombuffer(text, dtype=np.uint8), starts, sizes)


def concatenate(parts: Sequence[Names]) -> Names:
    """All names of several parts, in order. Text that they share is not copied."""
    texts = list({id(part.text): part.text for part in parts}.values())
    offsets = dict(zip(map(id, texts), np.cumsum([0, *map(len, texts)]).tolist(), strict=False))
    return Names(
        texts[0] if len(texts) == 1 else np.concatenate(texts),
        np.concatenate([part.starts + offsets[id(part.text)] for part in parts]),
        np.concatenate([part.lengths for part in parts]),
    )


def joined(names: Sequence[str]) -> Iterator[bytes]:
    """The bytes of the names, with a zero byte between two of them, in pieces for a digest."""
    remaining, separator = iter(names), ""
    while chunk := list(islice(remaining, CHUNK)):
        yield (separator + "\0".join(chunk)).encode(errors="surrogateescape")
        separator = "\0"
