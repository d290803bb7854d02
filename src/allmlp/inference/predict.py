"""Predicts classes and probabilities for any number of images, in constant memory."""

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

from allmlp.classifier import Classifier, evaluation_mode
from allmlp.data.decode import MAX_PIXELS, UnreadableImage, is_image_name
from allmlp.data.stores import FolderStore, Store, ZipStore
from allmlp.data.transforms import EvaluationTransform, normalize
from allmlp.device import Precision, autocast, current_device, device_errors, select_device, select_precision
from allmlp.errors import UserError
from allmlp.model import Mixer

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The most probable classes of an image with their probabilities, in decreasing order, or why it is unreadable."""

    image: str
    classes: tuple[tuple[str, float], ...] = ()
    problem: str | None = None


def predict(
    model: Classifier,
    images: Iterable[str | Path],
    top: int = 5,
    *,
    batch_size: int = 32,
    device: str = "auto",
    precision: Precision = "auto",
    max_pixels: int = MAX_PIXELS,
) -> list[Prediction]:
    """Classifies image files, and all images in folders and zips.

    All predictions are held in memory; see ``predict_stream`` for the arguments, and for any number of images.
    """
    found = [image for path in images for image in find_images(Path(path))]
    return list(
        predict_stream(
            model, found, top, batch_size=batch_size, device=device, precision=precision, max_pixels=max_pixels
        )
    )


def predict_stream(
    model: Classifier,
    images: Iterable[tuple[Store, str, str]],
    top: int = 5,
    *,
    batch_size: int = 32,
    device: str = "auto",
    precision: Precision = "auto",
    max_pixels: int = MAX_PIXELS,
) -> Iterator[Prediction]:
    """Yields one prediction per image, in order; for an unreadable image, the reason instead of classes.

    Args:
        model: an ``nn.Module`` is moved to the device and is in evaluation mode while predictions are made. Classes
            without names in its metadata are named by their number.
        images: (store, name in the store, name to display) of each image, from ``find_images``.
        top: number of classes per image, limited to the number of classes of the model.
        batch_size: number of images that are computed together; about three times as many are held in memory.
        device, precision: "auto" chooses.
        max_pixels: images with more pixels count as unreadable.

    Raises:
        UserError: the model has no head, or one that is all zero; ``top`` or ``batch_size`` is below 1.
    """
    if top < 1:
        raise UserError(f"top = {top}: show at least 1 class")
    if batch_size < 1:
        raise UserError(f"batch size {batch_size}: use at least 1 image")
    chosen_device = select_device(device)
    dtype = select_precision(precision, chosen_device)
    check_classifier(model)
    return stream(model, images, top, batch_size, chosen_device, dtype, max_pixels)


def stream(
    model: Classifier,
    images: Iterable[tuple[Store, str, str]],
    top: int,
    batch_size: int,
    device: torch.device,
    precision: torch.dtype,
    max_pixels: int,
) -> Iterator[Prediction]:
    """The predictions of ``predict_stream``, with its arguments checked."""
    names = model.metadata.classes or tuple(map(str, range(model.num_classes)))
    transform = EvaluationTransform(image_size=model.image_size, preprocessing=model.metadata.preprocessing)

    def read(image: tuple[Store, str, str]) -> Tensor | str:
        store, name, _ = image
        try:
            return transform(store.open(name, max_pixels, transform.min_side))
        except UnreadableImage as error:
            return str(error)

    for group in batched(read_ahead(read, images, 2 * batch_size), batch_size):
        pixels = [outcome for _, outcome in group if isinstance(outcome, Tensor)]
        best = iter(classify_pixels(model, pixels, min(top, len(names)), device, precision) if pixels else ())
        for (_, _, display_name), outcome in group:
            if isinstance(outcome, str):
                yield Prediction(image=display_name, problem=outcome)
            else:
                classes = tuple((names[index], probability) for index, probability in next(best))
                yield Prediction(image=display_name, classes=classes)


def classify_pixels(
    model: Classifier, pixels: list[Tensor], top: int, device: torch.device, precision: torch.dtype
) -> list[list[tuple[int, float]]]:
    """The ``top`` most probable classes of each (3, H, W) uint8 image, with their probabilities."""
    too_large = device_errors(f"{len(pixels)} images at a time", "use a smaller batch size, or another device")
    with current_device(device), too_large, evaluation_mode(model, device), torch.inference_mode():
        images = normalize(torch.stack(pixels).to(device), model.metadata.preprocessing)
        with autocast(device, precision):
            logits = model(images)
        best = logits.float().softmax(-1).topk(top)
    indices, values = best.indices.tolist(), best.values.tolist()
    return [list(zip(row, probabilities, strict=True)) for row, probabilities in zip(indices, values, strict=True)]


def check_classifier(model: Classifier) -> None:
    """Raises a UserError for a model that cannot classify: it has no head, or one that was never trained."""
    if not model.num_classes:
        raise UserError("these weights have no head, only features: train one first (mixer finetune)")
    if isinstance(model, Mixer) and not torch.count_nonzero(model.get_parameter("head.weight")):
        raise UserError(
            "the head of these weights is all zero, so every class would be equally probable: train it first "
            "(mixer finetune), or use model.features(images)"
        )


def find_images(path: Path) -> Iterator[tuple[Store, str, str]]:
    """Yields (store, name in the store, name to display) of an image file, or of all images in a folder or .zip.

    Raises:
        UserError: the path does not exist, or holds no images.
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


def read_ahead(read: Callable[[T], U], items: Iterable[T], depth: int) -> Iterator[tuple[T, U]]:
    """Yields (item, read(item)) in order. Threads read at most ``depth`` items ahead."""
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
    """Yields lists of ``size`` consecutive items; the last may be shorter."""
    iterator = iter(items)
    while group := list(itertools.islice(iterator, size)):
        yield group
