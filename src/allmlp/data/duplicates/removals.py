"""Lists of images to leave out, which every reader of a source honors (``--exclude FILE``).

A list is a CSV file with a column ``name``, such as ``mixer data dedup`` writes, or text with one name on each line.
Names are those of the source's images.
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from allmlp.data.dataset import ImageDataset
from allmlp.data.names import normal_form
from allmlp.errors import UserError, describe_os_error, printable
from allmlp.files import atomic_write

COLUMNS = ("name", "reason", "source", "match")


class Removal(NamedTuple):
    name: str
    reason: str  # such as "same file"
    source: str  # where the image is too
    match: str  # its name there


def write_removals(path: Path, removals: Sequence[Removal]) -> None:
    """Writes a list, atomically."""
    with atomic_write(path) as draft, draft.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(removals)


def read_removals(path: Path) -> list[str]:
    """The names in a list, in order.

    Raises:
        UserError: the file cannot be read, or holds no names.
    """
    try:
        text = path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise UserError(f"--exclude {path}: {describe_os_error(error)}") from None
    lines = text.splitlines()
    if lines and "name" in (header := next(csv.reader(lines[:1]))) and (len(header) > 1 or header == ["name"]):
        rows = csv.DictReader(io.StringIO(text, newline=""))
        names = [row["name"] for row in rows if row["name"]]
        if not names:
            return []  # written by a search that found none
    else:
        names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise UserError(f"--exclude {path}: it holds no names; give a CSV file with a column name, or one name a line")
    return [normal_form(name) for name in names]


def leave_out(
    datasets: dict[str, ImageDataset], path: Path, source: str
) -> tuple[dict[str, ImageDataset], dict[str, int], tuple[str, ...]]:
    """The datasets without the images of a list, how many were left out, and what to say of it.

    Raises:
        UserError: none of the names is in the source, or nothing is left of a part.
    """
    names = set(read_removals(path))
    kept, removed, known = {}, 0, set()
    for part, dataset in datasets.items():
        listed = np.fromiter((name in names for name in dataset.names), dtype=bool, count=len(dataset))
        known |= {dataset.names[i] for i in np.flatnonzero(listed).tolist()}
        removed += int(listed.sum())
        kept[part] = dataset.subset(np.flatnonzero(~listed)) if listed.any() else dataset
        if listed.all() and len(dataset):
            raise UserError(f"--exclude {path}: it lists all {len(dataset):,} images of {source}'s {part} part")
    unknown = [name for name in names if name not in known]
    if names and not known:
        raise UserError(
            f"--exclude {path}: none of its {len(names):,} names is in {source}, the first is "
            f"{printable(sorted(names)[0])!r}; make the list for this source (mixer data dedup)"
        )
    notes = (f"{len(unknown):,} of the {len(names):,} names in {path} are not in {source}",) if unknown else ()
    return kept, {f"listed in {path}": removed} if removed else {}, notes
