"""Predicts classes and probabilities for any number of images, in constant memory."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from allmlp.classifier import Classifier, evaluation_mode, require_classifier
from allmlp.data.decode import MAX_PIXELS
from allmlp.data.stores import Store
from allmlp.data.transforms import check_channels, normalize
from allmlp.device import Precision, autocast, current_device, device_errors, select_device, select_precision
from allmlp.errors import UserError, naming_keywords, with_keywords
from allmlp.factory import Model
from allmlp.inference.batches import read_batches
from allmlp.inference.images import ImageLike, list_images
from allmlp.sizes import whole_number


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The most probable classes of an image with their probabilities, in decreasing order, or why it is unreadable."""

    image: str
    classes: tuple[tuple[str, float], ...] = ()
    problem: str | None = None


@naming_keywords
def predict(
    model: Classifier,
    images: ImageLike | Iterable[ImageLike],
    top: int = 5,
    *,
    batch_size: int = 32,
    device: str = "auto",
    precision: Precision = "auto",
    max_pixels: int = MAX_PIXELS,
) -> list[Prediction]:
    """Classifies images: one, or any iterable of them. Returns a list with one prediction per image, in order.

    Args:
        images: each a path (also of a folder or .zip of images), a URL (http:// or https://), the bytes of a file, a
            file object, a PIL image, or uint8 pixels: an array (H, W, 3), (H, W) or (N, H, W, 3), or a tensor (3, H, W)
            or (N, 3, H, W).

    Of the images themselves only a few batches are in memory. See ``predict_stream`` for the other arguments and for
    predictions one by one.
    """
    options = {"batch_size": batch_size, "device": device, "precision": precision, "max_pixels": max_pixels}
    found = predict_stream(model, list_images(images), top, **options)
    return [replace(row, problem=with_keywords(row.problem)) if row.problem else row for row in found]


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
        images: (store, name in the store, name to display) of each image, from ``list_images``.
        top: number of classes per image, limited to the number of classes of the model.
        batch_size: number of images that are computed together; about three times as many are held in memory.
        device, precision: "auto" chooses.
        max_pixels: images with more pixels count as unreadable.

    Raises:
        UserError: the model has no head, or one that is all zero; ``top`` or ``batch_size`` is below 1.
    """
    top, batch_size = whole_number("top", top, 1), whole_number("batch_size", batch_size, 1)
    max_pixels = whole_number("max_pixels", max_pixels, 1)
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
    for group in read_batches(model, images, batch_size, max_pixels):
        pixels = [outcome for _, outcome in group if isinstance(outcome, Tensor)]
        best = iter(classify_pixels(model, pixels, min(top, len(names)), device, precision) if pixels else ())
        for display_name, outcome in group:
            if isinstance(outcome, str):
                yield Prediction(image=display_name, problem=outcome)
            else:
                classes = tuple((names[index], probability) for index, probability in next(best))
                yield Prediction(image=display_name, classes=classes)


def classify_pixels(
    model: Classifier, pixels: list[Tensor], top: int, device: torch.device, precision: torch.dtype
) -> list[list[tuple[int, float]]]:
    """The ``top`` most probable classes of each (3, H, W) uint8 image, with their probabilities."""
    best = compute(model, model, pixels, device, precision).softmax(-1).topk(top)
    indices, values = best.indices.tolist(), best.values.tolist()
    return [list(zip(row, probabilities, strict=True)) for row, probabilities in zip(indices, values, strict=True)]


def compute(
    model: Classifier,
    function: Callable[[Tensor], Tensor],
    pixels: list[Tensor],
    device: torch.device,
    precision: torch.dtype,
) -> Tensor:
    """A function of the model on (3, H, W) uint8 images, in float32.

    Raises:
        UserError: the result is not finite.
        RunError: the images do not fit into memory, or the device fails.
    """
    too_large = device_errors(f"{len(pixels)} images at a time", "use a smaller batch size, or another device")
    with current_device(device), too_large, evaluation_mode(model, device), torch.inference_mode():
        images = normalize(torch.stack(pixels).to(device), model.metadata.preprocessing, model.in_channels)
        with autocast(device, precision):
            result = function(images).float()
        if not result.isfinite().all():
            raise not_finite()
    return result


def not_finite() -> UserError:
    return UserError(
        "the model's outputs are NaN or infinite: its weights are damaged or have diverged, or --precision float32 is "
        "needed"
    )


def check_classifier(model: Classifier) -> None:
    """Raises a UserError for a model that cannot classify: it has no head, or one that was never trained."""
    require_classifier(model)
    check_channels(model.in_channels)
    if not model.num_classes:
        raise UserError("these weights have no head, only features: train one first (mixer finetune)")
    if isinstance(model, Model) and not torch.count_nonzero(model.get_parameter("head.weight")):
        raise UserError(
            "the head of these weights is all zero, so every class would be equally probable: train it first "
            "(mixer finetune), or use model.features(images)"
        )
