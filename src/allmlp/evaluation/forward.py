"""One pass of a model over a dataset: every image once, the same to the last bit on one process and on many."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from allmlp.classifier import Classifier, evaluation_mode
from allmlp.data.dataset import Dataset
from allmlp.data.loader import check_not_deleted, default_workers, evaluation_batches
from allmlp.data.transforms import EvaluationTransform, normalize
from allmlp.device import autocast, current_device, device_errors
from allmlp.distributed.context import SINGLE_PROCESS, DistributedContext
from allmlp.errors import UserError
from allmlp.metadata import Preprocessing


class Outputs(NamedTuple):
    """What a pass computes for the N readable images of a dataset, in its order."""

    indices: np.ndarray  # (N,) int64, positions in the dataset
    labels: np.ndarray  # (N,) int64
    columns: list[np.ndarray]  # (N, …) each
    unreadable: dict[str, str]  # name → reason


def compute_all(
    model: Classifier,
    dataset: Dataset,
    compute: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    *,
    device: torch.device,
    precision: torch.dtype,
    preprocessing: Preprocessing | None = None,
    batch_size: int = 256,
    workers: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    context: DistributedContext = SINGLE_PROCESS,
) -> Outputs:
    """Calls ``compute`` on every batch and gathers its results. Collective.

    Args:
        model: an ``nn.Module`` is moved to the device and kept in evaluation mode meanwhile.
        dataset: the labeled images.
        compute: images (B, channels, H, W), normalized, and labels (B,), on the device → tensors (B, …).
        device, precision: where it is computed, and the precision of matrix products.
        preprocessing: how images are resized, cropped and normalized; None: as the model's metadata say.
        batch_size: number of images that are computed together.
        workers: processes that load images; None: ``default_workers``.
        on_progress: called after each batch with the number of images done, and of all images.
        context: the ranks share the work. Each returns the complete result, bit-identical to that of one process.

    Raises:
        UserError: none of the images can be read.
        RunError: the folder or zip of the images is gone.
    """
    preprocessing = preprocessing or model.metadata.preprocessing
    batches = evaluation_batches(
        dataset,
        EvaluationTransform(image_size=model.image_size, preprocessing=preprocessing),
        batch_size=batch_size,
        workers=default_workers(dataset, context.local_world_size) if workers is None else workers,
        rank=context.rank,
        world_size=context.world_size,
        processes=context.local_world_size,
    )
    results, done = [], 0  # of each batch: its columns, and its unreadable images
    too_large = device_errors(f"{batch_size} images at a time", "use a smaller batch size, or another device")
    with current_device(device), too_large, evaluation_mode(model, device), torch.inference_mode():
        for batch in batches:
            with autocast(device, precision):
                images = normalize(batch.images.to(device), preprocessing, model.in_channels)
                computed = compute(images, batch.labels.to(device))
            columns = (batch.indices, batch.labels, *(column.cpu() for column in computed))
            results.append(([column[batch.valid].numpy() for column in columns], dict(batch.problems)))
            done += len(batch.valid) * context.world_size
            on_progress(min(done, len(dataset)), len(dataset))
    by_rank = context.all_gather(results)
    in_order = [by_rank[i % context.world_size][i // context.world_size] for i in range(sum(map(len, by_rank)))]
    unreadable: dict[int, str] = {}
    for _, problems in in_order:
        unreadable |= problems
    if len(unreadable) == len(dataset):
        check_not_deleted(dataset, unreadable)
        first = f"; the first: {next(iter(unreadable.values()))}" if unreadable else ""
        raise UserError(f"none of the {len(dataset)} images can be read{first}")
    indices, labels, *columns = (
        np.concatenate(parts) for parts in zip(*(columns for columns, _ in in_order), strict=True)
    )
    return Outputs(indices, labels, columns, {dataset.names[index]: problem for index, problem in unreadable.items()})
