"""Labelled images: one part of a data set, and the parts that make a SOURCE."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image

from allmlp.data.decode import MAX_PIXELS
from allmlp.data.stores import Store
from allmlp.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ImageDataset:
    """Labelled images: ``names[i]`` in ``store`` shows ``classes[labels[i]]``."""

    store: Store
    names: tuple[str, ...]
    labels: np.ndarray  # (N,) int64
    classes: tuple[str, ...]
    max_pixels: int = MAX_PIXELS

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int, min_side: int | None = None) -> Image.Image:
        """Upright RGB; a JPEG perhaps at a fraction of its size, its shorter side still of ``enough`` pixels."""
        return self.store.open(self.names[index], self.max_pixels, min_side)

    def subset(self, indices: np.ndarray) -> "ImageDataset":
        return replace(self, names=tuple(self.names[i] for i in indices), labels=self.labels[indices])

    def relabelled(self, classes: Sequence[str]) -> "ImageDataset":
        """The same images with labels by name in another list of classes (a model's), so a missing one shifts none."""
        position = {name: i for i, name in enumerate(classes)}
        unknown = [name for name in self.classes if name not in position]
        if unknown:
            raise UserError(
                f"{len(unknown)} class(es) of the data are unknown to the model ({', '.join(map(repr, unknown[:5]))}); "
                f"it knows {', '.join(map(repr, list(classes)[:10]))}{' …' if len(classes) > 10 else ''}: "
                "rename the class folders, or train on them"
            )
        labels = np.array([position[name] for name in self.classes], dtype=np.int64)[self.labels]
        return replace(self, classes=tuple(classes), labels=labels)


@dataclass(frozen=True, kw_only=True)
class DatasetSplits:
    """The parts that are there ("train", "val", "test"), and how they came about, in words for the user."""

    splits: dict[str, ImageDataset]
    classes: tuple[str, ...]
    description: str
    left_out: dict[str, int] = field(default_factory=dict)  # files that are no images, by ending

    def split(self, name: str) -> ImageDataset:
        if name == "all":
            first = next(iter(self.splits.values()))
            labels = np.concatenate([part.labels for part in self.splits.values()])
            return replace(first, names=tuple(n for part in self.splits.values() for n in part.names), labels=labels)
        if name not in self.splits:
            raise UserError(f"there is no {name} part in this source: it has {', '.join(self.splits)}, or all")
        return self.splits[name]
