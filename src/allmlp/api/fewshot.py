"""The few-shot probe on the images of a source: what ``mixer fewshot`` does."""

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from allmlp.api.evaluate import EvaluationOptions, Part, load_as_trained
from allmlp.api.progress import Bar, progress_bar
from allmlp.classifier import Classifier, require_classifier
from allmlp.data.builtin.copies import data_folder
from allmlp.data.dataset import DatasetSplits, ImageDataset, peek
from allmlp.data.decode import MAX_PIXELS
from allmlp.data.transforms import check_channels
from allmlp.device import Precision, select_precision
from allmlp.distributed.context import SINGLE_PROCESS, DistributedContext
from allmlp.errors import UserError, brief, naming_keywords
from allmlp.evaluation.features import FeatureTable, extract_features
from allmlp.evaluation.fewshot import check_numbers
from allmlp.evaluation.fewshot_task import L2, SEEDS, SHOTS, FewshotResult, make_task
from allmlp.metadata import Crop


@naming_keywords
def fewshot(
    model: Classifier,
    data: str | os.PathLike[str],
    *,
    shots: Sequence[int] = SHOTS,
    seeds: Sequence[int] = SEEDS,
    l2: float = L2,
    part: Part = "test",
    crop: Crop = "resize",
    crop_ratio: float | None = None,
    cache: bool = True,
    batch_size: int = 256,
    workers: int | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    max_pixels: int = MAX_PIXELS,
    exclude: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
) -> FewshotResult:
    """Fits linear probes to the frozen features of some images of each class, and tests them (Section 3).

    Args:
        model: moved to the device; it needs no head.
        data: SOURCE, as for ``evaluate``; its training images are those that the probes choose from.
        shots: numbers of training images per class.
        seeds: each chooses other training images.
        l2: strength of the regularization.
        part: split of the source that the probes are tested on.
        crop: "resize" resizes both sides of an image, as in the paper; "resmall" the shorter one.
        crop_ratio: image size / size before the central crop; None: as the model's metadata say.
        cache: keep a Mixer's features in the data folder (ALLMLP_DATA), and use those that are there.
        batch_size, workers, device, precision, max_pixels, exclude, progress: as for ``evaluate``.

    Raises:
        UserError: no such data, no training images, features that are not finite, or numbers out of range.
    """
    require_classifier(model)
    if not isinstance(data, str | os.PathLike):
        raise UserError(f"data {brief(data)}: give a name, a folder of images, or a .zip of one")
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
    check_numbers(shots, seeds, l2)
    source = load_for_probe(model, os.fspath(data), options)
    return probe_source(model, source, options, shots, seeds, l2, cache=cache, progress=progress)


def load_for_probe(model: Classifier, data: str, options: EvaluationOptions) -> DatasetSplits:
    """The source, with all images that are not for testing in the training split."""
    return load_as_trained(model, data, options, val_fraction=0.0)


def probe_source(
    model: Classifier,
    source: DatasetSplits,
    options: EvaluationOptions,
    shots: Sequence[int] = SHOTS,
    seeds: Sequence[int] = SEEDS,
    l2: float = L2,
    *,
    cache: bool = True,
    context: DistributedContext = SINGLE_PROCESS,
    progress: bool | None = None,
) -> FewshotResult:
    """Runs the probes on one source, with a progress bar. Collective."""
    shots, seeds = check_numbers(shots, seeds, l2)
    check_channels(model.in_channels)
    device = context.select_device(options.device)
    task = make_task(source.split("train"), source.split(options.part), shots, seeds)
    peek(task.train)
    options = options if options.crop else replace(options, crop="resize")
    with progress_bar(progress if context.is_rank0 else False) as bar:

        def extract(images: ImageDataset) -> FeatureTable:
            return extract_features(
                model,
                images,
                device=device,
                precision=select_precision(options.precision, device),
                preprocessing=options.preprocessing(model),
                cache=features_folder() if cache else None,
                batch_size=options.batch_size,
                workers=options.workers,
                on_progress=partial(bar_text, bar),
                context=context,
            )

        return task.run(extract, l2)


def bar_text(bar: Bar, done: int, total: int) -> None:
    bar.update(done, total, f"features of {done:,} of {total:,} images")


def features_folder() -> Path | None:
    """Where features are kept; None for a user without a home folder."""
    try:
        return data_folder() / "features"
    except UserError:
        return None
