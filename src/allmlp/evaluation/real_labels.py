"""ImageNet-ReaL: the validation images of ImageNet with every label that people find right.

Source: Beyer et al. 2020, "Are we done with ImageNet?". A prediction is correct if it is among an image's labels.
Images for which no label was found right are left out.
"""

import importlib.metadata
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from allmlp.errors import UserError, brief
from allmlp.weights.published import synset_names

IMAGES, CLASSES = 50_000, 1000
VALIDATION_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})")

RealLabels = list[list[int]]  # of the validation images in order; classes in the order of their synsets


class RealScore(NamedTuple):
    images: int
    correct: int
    without_label: int  # images that are left out

    @property
    def top1(self) -> float:
        return self.correct / self.images


def is_validation_image(name: str) -> bool:
    return VALIDATION_IMAGE.search(name) is not None


def read_real_labels(path: Path | None = None) -> RealLabels | None:
    """The labels of a ``real.json``, by default those that timm contains; None if timm is not installed.

    Raises:
        UserError: a file that is not 50,000 lists of classes.
    """
    file = find_in_timm() if path is None else path
    if file is None:
        return None
    try:
        labels = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}): give the real.json of ImageNet-ReaL") from None
    if not isinstance(labels, list) or len(labels) != IMAGES:
        held = f"{len(labels):,} entries" if isinstance(labels, list | dict) else brief(labels)
        raise UserError(f"{file} holds {held}, and ReaL has {IMAGES:,} lists: give the real.json of ImageNet-ReaL")
    for i, one in enumerate(labels):
        if not (isinstance(one, list) and all(type(label) is int and 0 <= label < CLASSES for label in one)):
            raise UserError(f"{file}: entry {i} is {brief(one)}, not a list of classes from 0 to {CLASSES - 1}")
    return labels


def find_in_timm() -> Path | None:
    """The file in timm's package, found without importing it."""
    try:
        file = Path(
            str(importlib.metadata.distribution("timm").locate_file("timm/data/_info/imagenet_real_labels.json"))
        )
    except importlib.metadata.PackageNotFoundError:
        return None
    return file if file.is_file() else None


def score_real(
    names: Sequence[str], predicted: np.ndarray, classes: Sequence[str], labels: RealLabels
) -> RealScore | None:
    """The accuracy by ReaL labels of those images that are ImageNet's validation images, by their names.

    Args:
        names: of N images.
        predicted: (N,) positions in ``classes``.
        classes: names of the model's classes: ImageNet's, by synset or by name, perhaps among others.
        labels: see ``read_real_labels``.

    Returns:
        None if no image has a label, or the classes are not ImageNet's.
    """
    position = {name: i for i, pair in enumerate(synset_names(CLASSES).items()) for name in pair}
    own = np.array([position.get(name, -1) for name in classes])
    if len(set(own.tolist()) - {-1}) < CLASSES:
        return None
    images = correct = without_label = 0
    for name, answer in zip(names, own[predicted].tolist(), strict=True):
        found = VALIDATION_IMAGE.search(name)
        if found is None or not 1 <= int(found[1]) <= IMAGES:
            continue
        if right := labels[int(found[1]) - 1]:
            images += 1
            correct += answer in right
        else:
            without_label += 1
    return RealScore(images, correct, without_label) if images else None
