"""The classes, sizes, formats, unreadable files and duplicates of a source."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from allmlp.data.dataset import DatasetSplits
from allmlp.data.duplicates.matching import Kind, Match, clusters, matches_within
from allmlp.data.duplicates.signatures import Signatures, sign_all


class Place(NamedTuple):
    """An image: where it is, and what it is said to be."""

    position: int  # among all images of the source
    part: str
    label: str
    name: str

    def to_json_object(self) -> dict[str, str]:
        return {"part": self.part, "class": self.label, "name": self.name}


class Duplicate(NamedTuple):
    """Two images that are the same."""

    kind: Kind
    first: Place
    second: Place

    @property
    def across_parts(self) -> bool:
        return self.first.part != self.second.part

    @property
    def two_classes(self) -> bool:
        return self.first.label != self.second.label


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What a source holds."""

    splits: DatasetSplits
    table: Signatures  # of all images
    matches: list[Match]  # rows of the table

    @property
    def counts(self) -> dict[str, np.ndarray]:
        """Part → (K,) number of images of each class, unreadable ones included."""
        size = len(self.splits.classes)
        return {name: np.bincount(part.labels, minlength=size) for name, part in self.splits.splits.items()}

    @property
    def total(self) -> np.ndarray:
        """(K,) number of images of each class."""
        return np.sum(list(self.counts.values()), axis=0)

    def place(self, row: int) -> Place:
        index = position = int(self.table.indices[row])
        for part, dataset in self.splits.splits.items():
            if index < len(dataset):
                return Place(position, part, self.splits.classes[int(dataset.labels[index])], dataset.names[index])
            index -= len(dataset)
        raise IndexError(row)

    def duplicates(self) -> list[Duplicate]:
        return [Duplicate(kind, self.place(first), self.place(second)) for first, second, kind in self.matches]

    @property
    def groups(self) -> list[list[int]]:
        """Rows of images that duplicates connect."""
        return clusters(self.matches, len(self.table))

    def describe_sizes(self) -> dict[str, list[int]]:
        """Least, median and greatest width and height of the readable images, in pixels."""
        if not len(self.table):
            return {}
        columns = {"width": self.table.sizes[:, 0], "height": self.table.sizes[:, 1]}
        return {
            name: [int(values.min()), int(np.median(values)), int(values.max())] for name, values in columns.items()
        }

    def to_json_object(self) -> dict[str, Any]:
        total, duplicates = self.total, self.duplicates()
        present = total[total > 0]
        return {
            "data": self.splits.description,
            "images": int(total.sum()),
            "classes": list(self.splits.classes),
            "parts": {
                part: dict(zip(self.splits.classes, counts.tolist(), strict=True))
                for part, counts in self.counts.items()
            },
            "largest_class": self.splits.classes[int(total.argmax())],
            "commonest_share": float(total.max() / total.sum()),
            "imbalance": float(present.max() / present.min()),
            "sizes": self.describe_sizes(),
            "kinds": dict(Counter(self.table.kinds).most_common()),
            "unreadable_images": len(self.table.unreadable),
            "unreadable": self.table.unreadable,
            "left_out": self.splits.left_out,
            "duplicates": {
                "counts": count_duplicates(duplicates),
                "groups": len(self.groups),
                "pairs": [
                    {"kind": one.kind, "first": one.first.to_json_object(), "second": one.second.to_json_object()}
                    for one in duplicates
                ],
            },
        }


def count_duplicates(duplicates: list[Duplicate]) -> dict[str, dict[str, int]]:
    """Kind → number of pairs: all, those across parts, and those under two classes."""
    counts: dict[str, dict[str, int]] = {}
    for one in duplicates:
        row = counts.setdefault(one.kind, {"pairs": 0, "across_parts": 0, "two_classes": 0})
        row["pairs"] += 1
        row["across_parts"] += one.across_parts
        row["two_classes"] += one.two_classes
    return counts


def inspect(splits: DatasetSplits, on_progress: Callable[[int, int], None] = lambda done, total: None) -> Contents:
    """Reads every image of a source once.

    Raises:
        UserError: imagehash is not installed.
        RunError: the folder or zip is gone.
    """
    table = sign_all(splits.split("all"), on_progress)
    return Contents(splits=splits, table=table, matches=matches_within(table))
