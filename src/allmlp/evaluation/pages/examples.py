"""Which images a page shows, and what it says about them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from allmlp.data.decode import UnreadableImage
from allmlp.errors import RunError
from allmlp.evaluation.classification import Classification
from allmlp.pages.page import THUMBNAIL

GRID_IMAGES = 24  # images in each grid of a page


@dataclass(frozen=True, kw_only=True)
class Example:
    """An image with its true class and the predicted classes with their probabilities, most probable first."""

    image: Image.Image  # small, as all are held in memory
    name: str
    label: str
    predictions: tuple[tuple[str, float], ...]

    @property
    def correct(self) -> bool:
        return bool(self.predictions) and self.predictions[0][0] == self.label


def choose_examples(result: Classification, count: int = GRID_IMAGES) -> list[int]:
    """Rows of the result that cover the classes evenly: the first image of each class, then the second, and so on."""
    by_label = np.argsort(result.labels, kind="stable")
    _, starts, sizes = np.unique(result.labels[by_label], return_index=True, return_counts=True)
    rank = np.empty(len(by_label), dtype=int)
    rank[by_label] = np.arange(len(by_label)) - np.repeat(starts, sizes)
    return np.lexsort((result.labels, rank))[:count].tolist()


def find_mistakes(result: Classification, count: int = GRID_IMAGES) -> list[int]:
    """Rows of the result with wrong predictions, in order of decreasing confidence."""
    wrong = np.flatnonzero(result.best[:, 0] != result.labels)
    return wrong[np.argsort(-result.probabilities[wrong, 0], kind="stable")][:count].tolist()


def read_images(result: Classification, rows: Iterable[int], min_side: int) -> Iterator[tuple[int, Image.Image]]:
    """(row, image) of the rows, each once, whose images are still there: a result is complete without them."""
    for row in dict.fromkeys(rows):
        try:
            yield row, result.dataset.read(int(result.indices[row]), min_side)
        except (UnreadableImage, RunError):  # deleted since it was evaluated
            continue


def read_examples(result: Classification, rows: Iterable[int]) -> list[Example]:
    """Examples of the rows, of which only thumbnails are kept."""
    return [make_example(result, row, image) for row, image in read_images(result, rows, THUMBNAIL)]


def make_example(result: Classification, row: int, image: Image.Image) -> Example:
    """The example of a row; the image is shrunk to a thumbnail."""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    index, classes = int(result.indices[row]), result.dataset.classes
    best = zip(result.best[row, :3], result.probabilities[row, :3], strict=True)
    return Example(
        image=image,
        name=result.dataset.names[index],
        label=classes[int(result.labels[row])],
        predictions=tuple((classes[int(label)], float(probability)) for label, probability in best),
    )
