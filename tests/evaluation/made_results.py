"""Classifications made from counts, without a model."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from allmlp.data.dataset import ImageDataset
from allmlp.evaluation.classification import Classification


class Gray:
    """The image named i.png is 4 × 4 pixels of gray level i; counts how often each is opened."""

    in_memory = False

    def __init__(self) -> None:
        self.opened: dict[str, int] = {}

    def open(self, name: str, max_pixels: int, min_side: int | None = None) -> Image.Image:
        self.opened[name] = self.opened.get(name, 0) + 1
        return Image.new("RGB", (4, 4), (int(name.split(".")[0]) % 256,) * 3)


def classified(
    labels: Sequence[int] | np.ndarray,
    predicted: Sequence[int] | np.ndarray,
    confidence: Sequence[float] | None = None,
    classes: Sequence[str] = ("a", "b", "c"),
) -> Classification:
    """A result for every second image of a dataset, so that rows and indices differ."""
    count, best = len(labels), np.array(predicted, dtype=np.int64)
    sure = np.full(count, 0.9) if confidence is None else np.array(confidence)
    dataset = ImageDataset(
        store=Gray(),
        names=tuple(f"{i}.png" for i in range(2 * count)),
        labels=np.repeat(np.array(labels, dtype=np.int64), 2),
        classes=tuple(classes),
    )
    return Classification(
        dataset=dataset,
        indices=np.arange(count) * 2 + 1,
        labels=dataset.labels[::2],
        best=np.stack([best, (best + 1) % len(classes)], axis=1),
        probabilities=np.stack([sure, 1 - sure], axis=1).astype(np.float32),
        loss=1.0,
        unreadable={},
    )


def with_confusion(confusion: np.ndarray, classes: Sequence[str] | None = None) -> Classification:
    """A result with these (K, K) counts; rows are true classes."""
    labels, predicted = np.repeat(np.argwhere(confusion >= 0), confusion.ravel(), axis=0).T
    return classified(labels, predicted, classes=classes or [f"class {i}" for i in range(len(confusion))])
