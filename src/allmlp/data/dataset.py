"""Labeled images: the ``Dataset`` protocol, its implementation on a store of images, and the splits of a source."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from PIL import Image

from allmlp.data.decode import MAX_PIXELS, UnreadableImage
from allmlp.data.formats import HEIF_EXTENSIONS, HEIF_REMEDY, can_read_heif
from allmlp.data.names import concatenate, normal_form, pack
from allmlp.data.stores import DatasetStore
from allmlp.errors import UserError, printable

MAX_KINDS_NAMED = 5  # of ignored files, in a message


def describe_left_out(left_out: Mapping[str, int]) -> str:
    """One line with the most frequent kinds of ignored files, from kind → count."""
    kinds = sorted(left_out.items(), key=lambda item: -item[1])
    named = [f"{count:,} {printable(kind)}" for kind, count in kinds[:MAX_KINDS_NAMED]]
    if rest := kinds[MAX_KINDS_NAMED:]:
        named.append(f"{sum(count for _, count in rest):,} of {len(rest):,} other kinds")
    remedy = "" if can_read_heif() or not HEIF_EXTENSIONS & left_out.keys() else f" (to read HEIF: {HEIF_REMEDY})"
    return f"{sum(left_out.values()):,} files left out: {', '.join(named)}{remedy}"


class Dataset(Protocol):
    """N labeled images. Loaders, evaluation and the report need no more. It is pickled for worker processes."""

    def __len__(self) -> int: ...

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes, in the order of the labels."""
        ...

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64: positions in ``classes``."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """N names, for messages and reports."""
        ...

    @property
    def in_memory(self) -> bool:
        """Whether reading an image is so cheap that worker processes are not worth starting."""
        ...

    def read(self, index: int, min_side: int | None = None) -> Image.Image:
        """One upright RGB image, which may be scaled down as long as its shorter side keeps ``min_side`` pixels.

        Raises:
            UnreadableImage: the image is missing or cannot be decoded.
            RunError: the folder or zip is gone.
        """
        ...

    def missing(self, index: int) -> bool:
        """Whether the file of an image, which was there when it was listed, is gone."""
        ...


def peek(dataset: Dataset) -> None:
    """Reads some images of 16 bits, as they may be: what there is to say of all is then said by this process alone."""
    names = () if dataset.in_memory else dataset.names
    for i in range(0, len(names), max(len(names) // 4, 1)):
        if names[i].lower().endswith((".png", ".tif", ".tiff", ".pgm", ".jp2")):
            with contextlib.suppress(UnreadableImage):
                dataset.read(i)


@dataclass(frozen=True, kw_only=True)
class ImageDataset:
    """A ``Dataset`` on a store: ``store.open(names[i])`` is an image of the class ``classes[labels[i]]``."""

    store: DatasetStore
    names: Sequence[str]  # packed into ``Names``
    labels: np.ndarray  # (N,) int64
    classes: tuple[str, ...]
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", pack(self.names))

    def __len__(self) -> int:
        return len(self.names)

    @property
    def in_memory(self) -> bool:
        return self.store.in_memory

    def read(self, index: int, min_side: int | None = None) -> Image.Image:
        return self.store.open(self.names[index], self.max_pixels, min_side)

    def raw(self, index: int) -> bytes | None:
        """The bytes of an image's file; None if it is no file. Errors as in ``read``."""
        return self.store.raw(self.names[index])

    def content(self, index: int) -> bytes:
        """What changes when the content of an image changes (see ``Store``)."""
        return self.store.content(self.names[index])

    def outline(self, index: int) -> bytes:
        """What images of the same content have in common, and is cheap to read (see ``Store``)."""
        return self.store.outline(self.names[index])

    def missing(self, index: int) -> bool:
        return self.store.missing(self.names[index])

    def subset(self, indices: np.ndarray) -> "ImageDataset":
        return replace(self, names=pack(self.names).subset(indices), labels=self.labels[indices])

    def relabeled(self, classes: Sequence[str]) -> "ImageDataset":
        """The same images, with labels that index another list of classes (a model's).

        Classes are matched by name, in any form of Unicode.

        Raises:
            UserError: a class of this dataset is not in the list.
        """
        if tuple(classes) == self.classes:
            return self
        position = {normal_form(name): i for i, name in enumerate(classes)}
        unknown = [name for name in self.classes if normal_form(name) not in position]
        if unknown:
            raise UserError(
                f"{len(unknown)} class(es) of the data are unknown to the model ({', '.join(map(repr, unknown[:5]))}); "
                f"its classes are {', '.join(map(repr, list(classes)[:10]))}{' …' if len(classes) > 10 else ''}: "
                "rename the class folders to match, or train a model on this data"
            )
        labels = np.array([position[normal_form(name)] for name in self.classes], dtype=np.int64)[self.labels]
        return replace(self, classes=tuple(classes), labels=labels)


@dataclass(frozen=True, kw_only=True)
class DatasetSplits:
    """The splits of a source ("train", "val", "test", as far as it has them) and how they were made."""

    splits: dict[str, ImageDataset]
    classes: tuple[str, ...]
    description: str  # where the data comes from and how it was split, for the user
    left_out: dict[str, int] = field(default_factory=dict)  # ignored files: kind → count
    notes: tuple[str, ...] = ()  # what else the user should know of the source, one line each
    choose_by: frozenset[str] = frozenset()  # training images that the source itself holds out to choose settings by

    def remarks(self) -> list[str]:
        """What to tell the user before the images are used, one line each."""
        return [*([describe_left_out(self.left_out)] if self.left_out else []), *self.notes]

    def split(self, name: str) -> ImageDataset:
        """One split by its name, or all of them as one dataset ("all"); a UserError for a split that does not exist."""
        if name == "all":
            parts = self.splits.values()
            return replace(
                next(iter(parts)),
                names=concatenate([pack(part.names) for part in parts]),
                labels=np.concatenate([part.labels for part in parts]),
            )
        if name not in self.splits:
            raise UserError(f"the data has no {name} split: use {', '.join(self.splits)} or all")
        return self.splits[name]
