"""Evaluation of a model on labeled images, with classes matched by name."""

import dataclasses
import logging
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from allmlp.api.progress import progress_bar
from allmlp.classifier import Classifier
from allmlp.data.dataset import DatasetSplits, ImageDataset, peek
from allmlp.data.decode import MAX_PIXELS
from allmlp.data.sources import load_source
from allmlp.device import Precision, select_device, select_precision
from allmlp.errors import UserError, brief, naming_keywords
from allmlp.evaluation.classification import Classification, classify
from allmlp.inference.predict import check_classifier, not_finite
from allmlp.runs.resume import fingerprint
from allmlp.sizes import whole_number
from allmlp.weights.published import synset_names

log = logging.getLogger(__name__)

Part = Literal["test", "val", "train", "all"]


@naming_keywords
def evaluate(
    model: Classifier,
    data: str | os.PathLike[str],
    *,
    part: Part = "test",
    batch_size: int = 256,
    workers: int | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    max_pixels: int = MAX_PIXELS,
    progress: bool | None = None,
) -> Classification:
    """Evaluates a model on labeled images, each once: what ``mixer evaluate`` does.

    Args:
        model: moved to the device. Its classes are matched by name with those of the data.
        data: SOURCE: digits, cifar10, cifar100, pets, flowers102, a folder of images, or a .zip of one. A source
            without splits is split as it was for training, so that no test image was trained on.
        part: split of the source; "all": every image.
        batch_size: images per forward pass.
        workers: processes that load images; None: chosen from the number of images and CPU cores.
        device: auto, cpu, cuda, cuda:1, mps.
        precision: of matrix products; auto: bfloat16 if the hardware supports it.
        max_pixels: larger images count as unreadable.
        progress: show a progress bar; None: in a terminal or a notebook.

    Raises:
        UserError: a model without a trained head, no such data, or classes that the model does not know.
    """
    chosen = check_evaluation(model, device, batch_size, workers)
    if not isinstance(data, str | os.PathLike):
        raise UserError(f"data {brief(data)}: give a name, a folder of images, or a .zip of one")
    source = load_as_trained(model, os.fspath(data), max_pixels)
    return evaluate_source(model, source, part, chosen, precision, batch_size, workers, progress)


def check_evaluation(model: Classifier, device: str, batch_size: int, workers: int | None) -> torch.device:
    """The device of this name, after the arguments of an evaluation are checked."""
    whole_number("batch_size", batch_size, 1)
    if workers is not None:
        whole_number("workers", workers, 0)
    chosen = select_device(device)
    check_classifier(model)
    return chosen


def evaluate_source(
    model: Classifier,
    source: DatasetSplits,
    part: Part,
    device: torch.device,
    precision: Precision,
    batch_size: int,
    workers: int | None,
    progress: bool | None = None,
) -> Classification:
    """Classifies one split of a source, with a progress bar."""
    dataset = match_classes(source.split(part), model, source.classes)
    peek(dataset)
    with progress_bar(progress) as bar:
        result = classify(
            model,
            dataset,
            device=device,
            precision=select_precision(precision, device),
            batch_size=batch_size,
            workers=workers,
            on_progress=lambda done, total: bar.update(done, total, f"{done:,} of {total:,} images"),
        )
    if not math.isfinite(result.loss):
        raise not_finite()
    return result


def load_as_trained(model: Classifier, data: str, max_pixels: int) -> DatasetSplits:
    """The source, with the splits that it does not have made as they were when the model was trained."""
    max_pixels, trained_on = whole_number("max_pixels", max_pixels, 1), training_data(model)
    split = {key: trained_on[key] for key in ("val_fraction", "test_fraction", "split_seed") if key in trained_on}
    source = load_source(data, max_pixels=max_pixels, **split)
    for remark in source.remarks():
        log.warning("%s", remark)
    return source


def same_data(model: Classifier, source: DatasetSplits, data: str) -> bool:
    """Whether a source is the one that the model was trained on: by the names of its images, or by its place."""
    digest = model.metadata.provenance.get("training_images")
    if digest is not None and fingerprint(source).get("train", {}).get("sha256") == digest:
        return True
    before = training_data(model).get("data")
    return before == data or (isinstance(before, str) and Path(before).resolve() == Path(data).resolve())


def training_data(model: Classifier) -> dict[str, Any]:
    """The data section of the recipe that the weights were trained with, if they record one."""
    recipe = model.metadata.provenance.get("recipe")
    data = recipe.get("data") if isinstance(recipe, dict) else None
    return data if isinstance(data, dict) else {}


def match_classes(dataset: ImageDataset, model: Classifier, classes: tuple[str, ...]) -> ImageDataset:
    """The images with labels that are positions in the model's classes.

    Folders named by ImageNet's synsets, such as n01440764, match those classes' names. Folders named by numbers, which
    are no names of the model's classes, are positions. Weights without class names are otherwise matched by position
    with ``classes``, those of the source.
    """
    names, count = model.metadata.classes, model.num_classes
    synsets = synset_names(count)
    if names == tuple(synsets.values()) and set(dataset.classes) <= synsets.keys():
        dataset = dataclasses.replace(dataset, classes=tuple(synsets[name] for name in dataset.classes))
    if not set(dataset.classes) & set(names or ()) and (numbers := positions(dataset.classes, count)) is not None:
        log.warning("the class folders are numbers: taken as the positions of the model's classes, from 0")
        return dataclasses.replace(
            dataset,
            labels=np.array(numbers, dtype=np.int64)[dataset.labels],
            classes=names or tuple(map(str, range(count))),
        )
    if names is None:
        if len(classes) != count:
            raise UserError(
                f"these weights do not name their {count} classes, and the data has {len(classes)}: save them with "
                "allmlp.save(model, path, classes=[…])"
            )
        names = tuple(sorted(classes, key=int)) if all(map(str.isdecimal, classes)) else classes
        log.warning("these weights do not name their classes: matched by position with those of the data")
    return dataset.relabeled(names)


def positions(classes: Sequence[str], count: int) -> list[int] | None:
    """The numbers that the classes are called, if these are different positions among ``count``."""
    if not all(name.isascii() and name.isdecimal() for name in classes):
        return None
    numbers = [int(name) for name in classes]
    return numbers if len(set(numbers)) == len(numbers) and max(numbers) < count else None
