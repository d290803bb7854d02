"""Pairs of images that are the same: by their files, by their pixels, or by how they look.

Images that look the same have perceptual hashes that differ in few bits, which finds candidates, and thumbnails that
differ little, which confirms them.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from allmlp.data.duplicates.signatures import Signatures

Kind = Literal["same file", "same pixels", "looks the same"]

MAX_BITS = 8  # of 64 that may differ
MAX_DIFFERENCE = 0.3  # of thumbnails, relative to their contrast (see ``difference``)
NOISE = 5.0  # gray levels that are added to the contrast, for images that have next to none
MAX_ALIKE = 20  # pairs of an image by looks: the frames of a film may all look the same
BLOCK = 1 << 22  # pairs of hashes that are compared at a time


class Match(NamedTuple):
    """Two images, as rows of their tables."""

    first: int
    second: int
    kind: Kind


def matches_within(table: Signatures) -> list[Match]:
    """Pairs of images in one table, ``first`` before ``second``.

    Images with the same file, or the same pixels, are each paired with the first of them alone; of those, only the
    first is compared by looks. Pairs that look the same are left out only where both have ``MAX_ALIKE`` closer ones.
    """
    found, representative = exact_matches(table.files, table.pixels)
    own = np.flatnonzero(representative == np.arange(len(table)))
    near = alike(table.codes[own], table.thumbnails[own], table.codes[own], table.thumbnails[own], same=True)
    return sorted(found + [Match(int(own[i]), int(own[j]), "looks the same") for i, j in near])


def matches_between(table: Signatures, other: Signatures) -> list[Match]:
    """For each image of the table that is in the other one too, one pair: (its row, the row of the other, how)."""
    best: dict[int, Match] = {}
    near = alike(table.codes, table.thumbnails, other.codes, other.thumbnails)
    for i, j in near:
        best.setdefault(int(i), Match(int(i), int(j), "looks the same"))
    digests: tuple[tuple[Kind, np.ndarray, np.ndarray], ...] = (
        ("same pixels", table.pixels, other.pixels),
        ("same file", table.files, other.files),
    )
    for kind, ours, theirs in digests:
        position = {digest: row for row, digest in reversed(list(enumerate(theirs.tolist()))) if digest}
        for row, digest in enumerate(ours.tolist()):
            if digest and digest in position:
                best[row] = Match(row, position[digest], kind)
    return [best[row] for row in sorted(best)]


def exact_matches(files: np.ndarray, pixels: np.ndarray) -> tuple[list[Match], np.ndarray]:
    """Images with the same file or pixels, and for each image the first that is the same (itself, if it is that)."""
    representative, found = np.arange(len(files)), []
    first_file: dict[bytes, int] = {}
    first_pixels: dict[bytes, int] = {}
    for row, (file, look) in enumerate(zip(files.tolist(), pixels.tolist(), strict=True)):
        if file and file in first_file:
            representative[row] = first_file[file]
            found.append(Match(first_file[file], row, "same file"))
        elif look in first_pixels:
            representative[row] = first_pixels[look]
            found.append(Match(first_pixels[look], row, "same pixels"))
        else:
            first_file[file] = first_pixels[look] = row
    return found, representative


def alike(
    codes: np.ndarray, thumbnails: np.ndarray, other_codes: np.ndarray, other_thumbnails: np.ndarray, same: bool = False
) -> list[tuple[int, int]]:
    """Rows (i, j) of images that look the same, the most similar of each i first; with ``same``, only i < j.

    No more than the ``MAX_ALIKE`` most similar j of each i are kept; with ``same``, those of each j too.
    """
    found = np.empty(0, dtype=[("i", np.int64), ("j", np.int64), ("apart", np.float32)])
    waiting, count, most = [found], 0, BLOCK // 4
    for i, j in candidates(codes, other_codes, same):
        apart = difference(thumbnails[i], other_thumbnails[j])
        near = apart < MAX_DIFFERENCE
        if near.any():
            waiting.append(np.rec.fromarrays((i[near], j[near], apart[near]), dtype=found.dtype))
            count += len(waiting[-1])
        if count > most:  # few data sets have so many
            waiting = [nearest(np.concatenate(waiting), same)]
            count = len(waiting[0])
            most = max(2 * count, most)
    found = nearest(np.concatenate(waiting), same)
    return found[np.lexsort((found["j"], found["apart"], found["i"]))][["i", "j"]].tolist()


def nearest(pairs: np.ndarray, same: bool) -> np.ndarray:
    """Of each i, and with ``same`` of each j too, the pairs that are least apart."""
    kept = rank(pairs["i"], pairs["apart"]) < MAX_ALIKE
    if same:
        kept |= rank(pairs["j"], pairs["apart"]) < MAX_ALIKE
    return pairs[kept]


def rank(group: np.ndarray, value: np.ndarray) -> np.ndarray:
    """How many of the same group come before each value, in order of the values."""
    order = np.lexsort((value, group))
    ordered = group[order]
    ranks = np.empty(len(group), dtype=np.int64)
    ranks[order] = np.arange(len(group)) - np.searchsorted(ordered, ordered)
    return ranks


def candidates(codes: np.ndarray, other: np.ndarray, same: bool) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of pairs whose hashes differ in at most ``MAX_BITS`` bits, in parts."""
    rows = max(BLOCK // max(len(other), 1), 1)
    for start in range(0, len(codes), rows):
        begin = start if same else 0
        near = np.bitwise_count(codes[start : start + rows, None] ^ other[None, begin:]) <= MAX_BITS
        i, j = np.nonzero(near)
        i, j = i + start, j + begin
        if same:
            i, j = i[i < j], j[i < j]
        for part in range(0, len(i), BLOCK // 256):
            yield i[part : part + BLOCK // 256], j[part : part + BLOCK // 256]


def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(N, P) and (N, P) thumbnails → (N,): their root mean square difference / the lesser of their contrasts."""
    a, b = a.astype(np.float32), b.astype(np.float32)
    contrast = np.minimum(a.std(1), b.std(1)) + NOISE
    return np.sqrt(np.square(a - b).mean(1)) / contrast


def clusters(matches: Sequence[Match], size: int) -> list[list[int]]:
    """Groups of at least two rows that matches connect, in order."""
    parent = list(range(size))

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for match in matches:
        a, b = root(match.first), root(match.second)
        parent[max(a, b)] = min(a, b)
    groups: dict[int, list[int]] = {}
    for match in matches:
        for row in (match.first, match.second):
            groups.setdefault(root(row), []).append(row)
    return [sorted(set(rows)) for _, rows in sorted(groups.items())]
