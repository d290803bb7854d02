"""Features of images, and the preprocessing that makes a model's input."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from allmlp.classifier import Classifier, require_classifier
from allmlp.data.decode import MAX_PIXELS
from allmlp.data.transforms import EvaluationTransform, check_channels, normalize
from allmlp.device import Precision, select_device, select_precision
from allmlp.errors import UserError, naming_keywords
from allmlp.inference.batches import read_batches
from allmlp.inference.images import ImageLike, list_images
from allmlp.inference.predict import compute
from allmlp.metadata import Preprocessing
from allmlp.sizes import whole_number


@naming_keywords
def features(
    model: Classifier,
    images: ImageLike | Iterable[ImageLike],
    *,
    batch_size: int = 32,
    device: str = "auto",
    precision: Precision = "auto",
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """The pre-logits of images, in order: (N, C) float32, on the CPU. The arguments are those of ``predict``.

    Raises:
        UserError: an image that cannot be read; no images; ``batch_size`` is below 1.
    """
    require_classifier(model)
    check_channels(model.in_channels)
    batch_size, max_pixels = whole_number("batch_size", batch_size, 1), whole_number("max_pixels", max_pixels, 1)
    chosen = select_device(device)
    dtype = select_precision(precision, chosen)
    rows = []
    for batch in read_batches(model, list_images(images), batch_size, max_pixels):
        if problems := [outcome for _, outcome in batch if isinstance(outcome, str)]:
            raise UserError(f"{len(problems)} of the images so far cannot be read: {problems[0]}")
        pixels = [outcome for _, outcome in batch if isinstance(outcome, Tensor)]
        rows.append(compute(model, model.features, pixels, chosen, dtype).cpu())
    if not rows:
        raise UserError("no images: give at least one")
    return torch.cat(rows)


@dataclass(frozen=True)
class Transform:
    """One image, as ``predict`` takes it, to (channels, H, W) float32, prepared as in evaluation."""

    image_size: tuple[int, int]
    preprocessing: Preprocessing
    channels: int = 3

    def __call__(self, image: ImageLike) -> Tensor:
        """Raises a UserError for what is not one image, and UnreadableImage for one that cannot be read."""
        resize = EvaluationTransform(image_size=self.image_size, preprocessing=self.preprocessing)
        found = list(list_images(image))
        if len(found) != 1:
            raise UserError(f"{len(found)} images: the transform takes one at a time")
        store, name, _ = found[0]
        pixels = resize(store.open(name, MAX_PIXELS, resize.min_side))
        return normalize(pixels[None], self.preprocessing, self.channels)[0]


def transform(model: Classifier) -> Transform:
    """The preprocessing of a model, for a dataset of your own. It can be pickled for worker processes."""
    require_classifier(model)
    check_channels(model.in_channels)
    return Transform(model.image_size, model.metadata.preprocessing, model.in_channels)
