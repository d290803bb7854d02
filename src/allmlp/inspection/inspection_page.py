"""The page of ``mixer data inspect``."""

from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from allmlp.data.decode import UnreadableImage
from allmlp.errors import RunError
from allmlp.inspection.charts import draw_classes, draw_sizes
from allmlp.inspection.contents import Contents, Duplicate, count_duplicates
from allmlp.pages.page import THUMBNAIL, format_percent, write_page

MAX_CLASSES = 40  # that have example images, and rows in the table
PER_CLASS = 6  # example images of each class
MAX_PAIRS = 60  # of duplicates that are shown


class Picture(NamedTuple):
    name: str
    image: Image.Image


def write_inspection_page(path: Path, contents: Contents) -> None:
    """Writes the page, atomically.

    Raises:
        OSError: the file cannot be written.
    """
    total, classes = contents.total, contents.splits.classes
    order = np.argsort(-total, kind="stable")[:MAX_CLASSES].tolist()
    shown = choose_duplicates(contents.duplicates())
    write_page(
        path,
        "allmlp.inspection",
        "inspection.html",
        description=contents.splits.description,
        tiles=make_tiles(contents),
        parts=list(contents.counts),
        rows=[(classes[k], [int(counts[k]) for counts in contents.counts.values()], int(total[k])) for k in order],
        hidden=len(classes) - len(order),
        charts=[draw_classes(total), draw_sizes(contents.table.sizes)] if len(contents.table) else [],
        kinds=Counter(contents.table.kinds).most_common(),
        unreadable=contents.table.unreadable,
        left_out=contents.splits.left_out,
        notes=contents.splits.notes,
        examples=[(classes[k], read_examples(contents, k)) for k in order],
        duplicate_counts=count_duplicates(contents.duplicates()),
        duplicates=[
            (one, [(place, read_picture(contents, place.position)) for place in (one.first, one.second)])
            for one in shown
        ],
        hidden_duplicates=len(contents.matches) - len(shown),
    )


def make_tiles(contents: Contents) -> list[tuple[str, str, str]]:
    """Label, figure and note of each headline number."""
    total, sizes, duplicates = contents.total, contents.describe_sizes(), contents.duplicates()
    present = total[total > 0]
    parts = ", ".join(f"{counts.sum():,} {part}" for part, counts in contents.counts.items())
    largest = contents.splits.classes[int(total.argmax())]
    across = sum(one.across_parts for one in duplicates)
    medians = " × ".join(str(values[1]) for values in sizes.values())
    ranges = ", ".join(f"{name} {values[0]}–{values[2]}" for name, values in sizes.items())
    return [
        ("images", f"{total.sum():,}", parts),
        ("classes", f"{len(total):,}", f"from {present.min():,} to {present.max():,} images"),
        ("commonest class", format_percent(float(total.max() / total.sum())), largest),
        ("size in pixels (median)", medians or "—", ranges),
        ("duplicates", f"{len(duplicates):,}", f"pairs, in {len(contents.groups):,} groups; {across:,} across parts"),
        ("unreadable", f"{len(contents.table.unreadable):,}", "files that cannot be decoded"),
    ]


def choose_duplicates(duplicates: list[Duplicate]) -> list[Duplicate]:
    """The worst first: across parts, then under two classes."""
    return sorted(duplicates, key=lambda one: (not one.across_parts, not one.two_classes))[:MAX_PAIRS]


def read_examples(contents: Contents, label: int) -> list[Picture]:
    """Images of a class, evenly spaced over all that it has."""
    rows = np.flatnonzero(contents.table.labels == label)
    chosen = rows[np.linspace(0, len(rows) - 1, min(PER_CLASS, len(rows))).round().astype(int)] if len(rows) else rows
    found = []
    for row in chosen.tolist():
        if (picture := read_picture(contents, int(contents.table.indices[row]))) is not None:
            found.append(picture)
    return found


def read_picture(contents: Contents, index: int) -> Picture | None:
    """A thumbnail; None if the image is gone by now."""
    dataset = contents.table.dataset
    try:
        image = dataset.read(index, THUMBNAIL)
    except (UnreadableImage, RunError):
        return None
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return Picture(dataset.names[index], image)
