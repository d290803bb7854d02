"""Labels and probabilities for any number of images, in constant memory."""

import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from allmlp.data.decode import MAX_PIXELS, UnreadableImage, is_image_name
from allmlp.data.stores import FolderStore, Store, ZipStore
from allmlp.data.transforms import EvaluationView, normalise
from allmlp.device import Precision, autocast, select_device, select_precision
from allmlp.errors import UserError
from allmlp.model import Mixer

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Classes from the most probable down with their probabilities, or what is wrong with the image."""

    image: str
    classes: tuple[tuple[str, float], ...] = ()
    problem: str | None = None


def predict(
    model: Mixer,
    images: Iterable[str | Path],
    top: int = 5,
    *,
    batch_size: int = 32,
    device: str = "auto",
    precision: Precision = "auto",
    max_pixels: int = MAX_PIXELS,
) -> list[Prediction]:
    """Classifies image files, folders and zips of them; see ``predict_stream``, which does not keep them all."""
    places = [place for image in images for place in find_images(Path(image))]
    return list(
        predict_stream(
            model, places, top, batch_size=batch_size, device=device, precision=precision, max_pixels=max_pixels
        )
    )


def predict_stream(
    model: Mixer,
    places: Iterable[tuple[Store, str, str]],
    top: int = 5,
    *,
    batch_size: int = 32,
    device: str = "auto",
    precision: Precision = "auto",
    max_pixels: int = MAX_PIXELS,
) -> Iterator[Prediction]:
    """One prediction an image, in order; an image that cannot be read is a prediction that says why.

    The model is moved to the device and put in evaluation mode.

    Args:
        model: with a head; class names come from its card, else they are the numbers of the logits.
        places: of the images, from ``find_images``.
        top: how many classes of each image, at most as many as there are.
        batch_size: images that are computed together; about three times as many are held in memory.
        device, precision: "auto" chooses.
        max_pixels: larger images are refused.

    Raises:
        UserError: a model that has no head, or one that is all zero; a top below 1.
    """
    check_classifier(model)
    if top < 1:
        raise UserError(f"top = {top}: how many classes to show, at least 1")
    if batch_size < 1:
        raise UserError(f"batch size {batch_size}: at least 1 image")
    where = select_device(device)
    dtype = select_precision(precision, where)
    return stream(model.eval().to(where), places, top, batch_size, where, dtype, max_pixels)


def stream(
    model: Mixer,
    places: Iterable[tuple[Store, str, str]],
    top: int,
    batch_size: int,
    device: torch.device,
    precision: torch.dtype,
    max_pixels: int,
) -> Iterator[Prediction]:
    names = model.metadata.classes or tuple(map(str, range(model.config["num_classes"])))
    view = EvaluationView(image_size=model.image_size, preprocessing=model.metadata.preprocessing)

    def read(place: tuple[Store, str, str]) -> Tensor | str:
        store, name, _ = place
        try:
            return view(store.open(name, max_pixels, view.min_side))
        except UnreadableImage as problem:
            return str(problem)

    for group in batched(ahead(read, places, 2 * batch_size), batch_size):
        pixels = [view for _, view in group if isinstance(view, Tensor)]
        best = iter(classify_pixels(model, pixels, min(top, len(names)), device, precision) if pixels else ())
        for (_, _, shown), seen in group:
            if isinstance(seen, str):
                yield Prediction(image=shown, problem=seen)
            else:
                yield Prediction(image=shown, classes=tuple((names[index], value) for index, value in next(best)))


def classify_pixels(
    model: Mixer, pixels: list[Tensor], top: int, device: torch.device, precision: torch.dtype
) -> list[list[tuple[int, float]]]:
    """For each (3, H, W) uint8 image, its best classes and their probabilities."""
    with torch.inference_mode():
        images = normalise(torch.stack(pixels).to(device), model.metadata.preprocessing)
        with autocast(device, precision):
            logits = model(images)
        best = logits.float().softmax(-1).topk(top)
    indices, values = best.indices.tolist(), best.values.tolist()
    return [list(zip(row, probabilities, strict=True)) for row, probabilities in zip(indices, values, strict=True)]


def check_classifier(model: Mixer) -> None:
    """A UserError for a model that cannot classify: without a head, or with one that was never trained."""
    if not model.config["num_classes"]:
        raise UserError("these weights have no head, only features: train one first (mixer finetune)")
    if not torch.count_nonzero(model.get_parameter("head.weight")):
        raise UserError(
            "the head of these weights is all zero, every class would be as probable: train it first (mixer finetune), "
            "or use model.features(images)"
        )


def find_images(path: Path) -> Iterator[tuple[Store, str, str]]:
    """Where the images of a file, a folder or a .zip are: (store, name in it, name to show), one at a time.

    Raises:
        UserError: no such file or folder, or a folder or zip without images.
    """
    if path.is_dir() or (path.is_file() and path.suffix.lower() == ".zip"):
        store = FolderStore(path) if path.is_dir() else ZipStore(path)
        found = (name for name in store.names() if is_image_name(name))
        first = next(found, None)
        if first is None:
            raise UserError(f"{path} holds no images: give image files, or a folder or .zip of them")
        for name in itertools.chain([first], found):
            yield store, name, f"{path}/{name}"
    elif path.is_file():
        yield FolderStore(path.parent), path.name, str(path)
    else:
        raise UserError(f"no image at {path}: give image files, or a folder or .zip of them")


def ahead(read: Callable[[T], U], items: Iterable[T], depth: int) -> Iterator[tuple[T, U]]:
    """(item, read(item)) in order, read by threads, never more than ``depth`` items ahead."""
    waiting: deque[tuple[T, Future[U]]] = deque()
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 8)) as pool:
        for item in items:
            waiting.append((item, pool.submit(read, item)))
            if len(waiting) >= depth:
                item, future = waiting.popleft()
                yield item, future.result()
        for item, future in waiting:
            yield item, future.result()


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while group := list(itertools.islice(iterator, size)):
        yield group
