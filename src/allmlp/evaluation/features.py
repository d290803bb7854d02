"""Features of the images of a dataset, computed once and kept by the content of weights and images."""

import hashlib
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from allmlp.classifier import Classifier
from allmlp.data.dataset import Dataset, ImageDataset
from allmlp.distributed.context import SINGLE_PROCESS, DistributedContext
from allmlp.errors import UserError, printable
from allmlp.evaluation.forward import compute_all
from allmlp.factory import Model
from allmlp.files import atomic_write
from allmlp.metadata import Preprocessing

log = logging.getLogger(__name__)

VERSION = 1  # of the cached files


class FeatureTable(NamedTuple):
    """The features of the N readable images of a dataset, in its order."""

    indices: np.ndarray  # (N,) int64, positions in the dataset
    labels: np.ndarray  # (N,) int64
    features: np.ndarray  # (N, C) float32
    unreadable: dict[str, str]  # name → reason


def extract_features(
    model: Classifier,
    dataset: ImageDataset,
    *,
    device: torch.device,
    precision: torch.dtype,
    preprocessing: Preprocessing,
    cache: Path | None = None,
    context: DistributedContext = SINGLE_PROCESS,
    **options: Any,
) -> FeatureTable:
    """The pre-logits of all images. Collective.

    Args:
        model, dataset, device, precision, preprocessing, context, options: as for ``forward.compute_all``.
        cache: a folder in which the features of a Mixer are kept; None: nowhere.

    Raises:
        UserError: none of the images can be read, or features are not finite.
    """

    def compute() -> FeatureTable:
        def features(images: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
            return (model.features(images).float(),)

        indices, labels, (values,), unreadable = compute_all(
            model,
            dataset,
            features,
            device=device,
            precision=precision,
            preprocessing=preprocessing,
            context=context,
            **options,
        )
        check_finite(values, dataset, indices)
        return FeatureTable(indices, labels, values, unreadable)

    if cache is None or not isinstance(model, Model):
        return compute()
    path = context.broadcast_from_rank0(lambda: cached_file(cache, model, dataset, device, precision, preprocessing))
    found = context.broadcast_from_rank0(lambda: read_table(path))
    if found is None:
        found = compute()
        context.broadcast_from_rank0(lambda: keep_table(path, found))
    elif context.is_rank0:
        log.info("features of %s images from %s", f"{len(found.labels):,}", path)
    return found


def check_finite(features: np.ndarray, dataset: Dataset, indices: np.ndarray) -> None:
    """Raises a UserError that names the first image whose features are not finite."""
    bad = np.flatnonzero(~np.isfinite(features).all(axis=1))
    if len(bad):
        raise UserError(
            f"the features of {len(bad):,} of {len(features):,} images are not finite, the first of "
            f"{printable(dataset.names[int(indices[bad[0]])])}: the weights are damaged, or too large for this "
            "--precision; try float32"
        )


# The cache


def cached_file(
    cache: Path,
    model: Model,
    dataset: ImageDataset,
    device: torch.device,
    precision: torch.dtype,
    preprocessing: Preprocessing,
) -> Path:
    """The file of these features: its name is a digest of all that they depend on."""
    digest = hashlib.sha256()
    settings = {"preprocessing": asdict(preprocessing), "sizes": model.config, "device": device.type}
    settings |= {"precision": str(precision), "max_pixels": dataset.max_pixels, "version": VERSION}
    digest.update(json.dumps(settings, sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if not name.startswith("head."):  # features do not depend on it
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    digest.update(np.ascontiguousarray(dataset.labels, dtype="<i8").data)
    for i in range(len(dataset)):
        digest.update(dataset.content(i))
    return cache / f"{digest.hexdigest()[:40]}.safetensors"


def read_table(path: Path) -> FeatureTable | None:
    """The features of a file; None if it is not there, or damaged."""
    try:
        with safe_open(path, framework="np") as file:
            unreadable = json.loads(file.metadata()["unreadable"])
            indices, labels, features = map(file.get_tensor, ("indices", "labels", "features"))
            return FeatureTable(indices, labels, features, unreadable)
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        log.warning("%s cannot be read (%s): computing the features again", path, error)
        return None


def keep_table(path: Path, table: FeatureTable) -> None:
    """Writes the features to the file; where that fails, says so and goes on without."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as draft:
            tensors = {name: np.ascontiguousarray(getattr(table, name)) for name in ("indices", "labels", "features")}
            save_file(tensors, draft, metadata={"unreadable": json.dumps(table.unreadable)})
    except (OSError, SafetensorError) as error:
        log.warning("the features are not kept: %s cannot be written (%s)", path, error)
        return
    log.info("features of %s images kept in %s", f"{len(table.labels):,}", path)
