"""Evaluation of a model on labeled images, with classes matched by name."""

import dataclasses
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from allmlp.api.progress import progress_bar
from allmlp.classifier import Classifier
from allmlp.data.dataset import DatasetSplits, ImageDataset, peek
from allmlp.data.decode import MAX_PIXELS
from allmlp.data.sources import load_source
from allmlp.device import Precision, select_device, select_precision
from allmlp.distributed.context import SINGLE_PROCESS, DistributedContext
from allmlp.errors import UserError, brief, naming_keywords
from allmlp.evaluation.classification import Classification, classify
from allmlp.evaluation.real_labels import is_validation_image, read_real_labels, score_real
from allmlp.files import as_path
from allmlp.inference.predict import check_classifier, not_finite
from allmlp.metadata import Crop, Preprocessing
from allmlp.runs.resume import fingerprint
from allmlp.sizes import whole_number
from allmlp.weights.published import synset_names

log = logging.getLogger(__name__)

Part = Literal["test", "val", "train", "all"]


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """How images are evaluated: the options that commands share."""

    part: Part = "test"
    crop: Crop | None = None
    crop_ratio: float | None = None
    batch_size: int = 256
    workers: int | None = None
    device: str = "auto"
    precision: Precision = "auto"
    max_pixels: int = MAX_PIXELS
    exclude: str | None = None

    def __post_init__(self) -> None:
        whole_number("batch_size", self.batch_size, 1)
        whole_number("max_pixels", self.max_pixels, 1)
        if self.workers is not None:
            whole_number("workers", self.workers, 0)

    def preprocessing(self, model: Classifier) -> Preprocessing:
        """That of the model, with the crop of these options."""
        given = {"crop": self.crop, "crop_ratio": self.crop_ratio}
        return dataclasses.replace(
            model.metadata.preprocessing, **{name: value for name, value in given.items() if value is not None}
        )


@naming_keywords
def evaluate(
    model: Classifier,
    data: str | os.PathLike[str],
    *,
    part: Part = "test",
    crop: Crop | None = None,
    crop_ratio: float | None = None,
    real_labels: str | os.PathLike[str] | None = None,
    batch_size: int = 256,
    workers: int | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    max_pixels: int = MAX_PIXELS,
    exclude: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> Classification:
    """Evaluates a model on labeled images, each once: what ``mixer evaluate`` does.

    Args:
        model: moved to the device. Its classes are matched by name with those of the data.
        data: SOURCE: a name (digits, cifar10, pets, imagenet, …), a folder of images, or a .zip of one. A source
            without splits is split as it was for training, so that no test image was trained on.
        part: split of the source; "all": every image.
        crop: "resmall" resizes the shorter side, "resize" both sides; None: as the model's metadata say.
        crop_ratio: image size / size before the central crop, 224/256 in the paper; None: as the metadata say.
        real_labels: the ``real.json`` of ImageNet-ReaL, for ImageNet's validation images; None: the one in timm.
        batch_size: images per forward pass.
        workers: processes that load images; None: chosen from the number of images and CPU cores.
        device: auto, cpu, cuda, cuda:1, mps.
        precision: of matrix products; auto: bfloat16 if the hardware supports it.
        max_pixels: larger images count as unreadable.
        exclude: a file that lists images to leave out, such as ``mixer data dedup`` writes.
        progress: show a progress bar; None: in a terminal or a notebook.

    Raises:
        UserError: a model without a trained head, no such data, or classes that the model does not know.
    """
    options = EvaluationOptions(
        part=part,
        crop=crop,
        crop_ratio=crop_ratio,
        batch_size=batch_size,
        workers=workers,
        device=device,
        precision=precision,
        max_pixels=max_pixels,
        exclude=None if exclude is None else os.fspath(exclude),
    )
    select_device(device)
    check_classifier(model)
    if not isinstance(data, str | os.PathLike):
        raise UserError(f"data {brief(data)}: give a name, a folder of images, or a .zip of one")
    labels = None if real_labels is None else as_path("real_labels", real_labels)
    source = load_as_trained(model, os.fspath(data), options)
    return evaluate_source(model, source, options, labels, progress=progress)


def evaluate_source(
    model: Classifier,
    source: DatasetSplits,
    options: EvaluationOptions,
    real_labels: Path | None = None,
    context: DistributedContext = SINGLE_PROCESS,
    progress: bool | None = None,
) -> Classification:
    """Classifies one split of a source, with a progress bar. Collective."""
    device = context.select_device(options.device)
    check_classifier(model)
    dataset = match_classes(source.split(options.part), model, source.classes)
    peek(dataset)
    with progress_bar(progress if context.is_rank0 else False) as bar:
        result = classify(
            model,
            dataset,
            device=device,
            precision=select_precision(options.precision, device),
            preprocessing=options.preprocessing(model),
            batch_size=options.batch_size,
            workers=options.workers,
            on_progress=lambda done, total: bar.update(done, total, f"{done:,} of {total:,} images"),
            context=context,
        )
    if not math.isfinite(result.loss):
        raise not_finite()
    return with_real(result, real_labels)


def with_real(result: Classification, path: Path | None) -> Classification:
    """The result with its accuracy by the ReaL labels, if these are ImageNet's validation images.

    Raises:
        UserError: ``path`` is given, and these are other images, or the model has other classes.
    """
    names: Sequence[str] = result.dataset.names
    if not is_validation_image(names[int(result.indices[0])]):
        if path is not None:
            raise UserError(
                f"--real-labels {path}: the images are not ImageNet's validation images, whose names have the form "
                "ILSVRC2012_val_00000001.JPEG; leave the option out"
            )
        return result
    labels = read_real_labels(path)
    if labels is None:
        log.warning("no ReaL labels, which timm contains: pip install 'allmlp[timm]', or give --real-labels real.json")
        return result
    images = [str(names[int(i)]) for i in result.indices]
    real = score_real(images, result.best[:, 0], result.dataset.classes, labels)
    if real is None and path is not None:
        raise UserError(f"--real-labels {path}: the model's classes are not ImageNet's 1,000; leave the option out")
    return dataclasses.replace(result, real=real)


def load_as_trained(
    model: Classifier, data: str, options: EvaluationOptions, val_fraction: float | None = None
) -> DatasetSplits:
    """The source, with the splits that it does not have made as they were when the model was trained.

    ``val_fraction``, if given, replaces that of the training.
    """
    options.preprocessing(model)  # so that a mistake is reported before any data is read
    trained_on = training_data(model)
    split = {key: trained_on[key] for key in ("val_fraction", "test_fraction", "split_seed") if key in trained_on}
    if val_fraction is not None:
        split["val_fraction"] = val_fraction
    source = load_source(data, max_pixels=options.max_pixels, exclude=options.exclude, **split)
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
