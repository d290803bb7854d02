"""Images read ahead by threads and prepared for a model, in batches; memory stays constant for any number of images."""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from torch import Tensor

from allmlp.classifier import Classifier
from allmlp.data.decode import UnreadableImage
from allmlp.data.stores import Store
from allmlp.data.transforms import EvaluationTransform
from allmlp.device import available_cores

T = TypeVar("T")
U = TypeVar("U")


def read_batches(
    model: Classifier, images: Iterable[tuple[Store, str, str]], batch_size: int, max_pixels: int
) -> Iterator[list[tuple[str, Tensor | str]]]:
    """Yields batches of (name to display, pixels (3, H, W) uint8 as the model takes them, or why it is unreadable)."""
    transform = EvaluationTransform(image_size=model.image_size, preprocessing=model.metadata.preprocessing)

    def read(image: tuple[Store, str, str]) -> Tensor | str:
        store, name, _ = image
        try:
            return transform(store.open(name, max_pixels, transform.min_side))
        except UnreadableImage as error:
            return str(error)

    for group in batched(read_ahead(read, images, 2 * batch_size), batch_size):
        yield [(display_name, outcome) for (_, _, display_name), outcome in group]


def read_ahead(read: Callable[[T], U], items: Iterable[T], depth: int) -> Iterator[tuple[T, U]]:
    """Yields (item, read(item)) in order. Threads read at most ``depth`` items ahead."""
    waiting: deque[tuple[T, Future[U]]] = deque()
    with ThreadPoolExecutor(min(available_cores(), 8)) as pool:
        for item in items:
            waiting.append((item, pool.submit(read, item)))
            if len(waiting) >= depth:
                item, future = waiting.popleft()
                yield item, future.result()
        for item, future in waiting:
            yield item, future.result()


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yields lists of ``size`` consecutive items; the last may be shorter."""
    iterator = iter(items)
    while group := list(itertools.islice(iterator, size)):
        yield group
