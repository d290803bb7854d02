"""From datasets to batches, in an order that is a function of the seed alone.

The samples of a training run form one endless sequence: epoch after epoch, each a permutation of the dataset drawn from
(seed, epoch). So sample ``k`` of a run can be computed without its predecessors, no image is dropped for a short last
batch, and any worker can make any batch. The augmentation of a sample is drawn from (seed, epoch, index).
"""

import contextlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from allmlp.data.dataset import Dataset
from allmlp.data.decode import UnreadableImage
from allmlp.data.shared import Shared
from allmlp.data.transforms import EvaluationTransform, TrainingTransform
from allmlp.data.workers import load_in_workers, plan_workers
from allmlp.device import available_cores
from allmlp.errors import RunError, UserError, printable
from allmlp.rng import rng_stream

PADDING = -1  # index of a padded sample, which is no image
MAX_CHUNK_BYTES = 64 << 20  # of what a worker delivers at a time; a larger batch is put together from several chunks

Key = tuple[int, int]  # epoch and index of a sample


class Batch(NamedTuple):
    """An unreadable image keeps its position: it is black, ``valid`` is false, and ``problems`` holds the reason.

    Padding is black and not valid either, but is not listed in ``problems``.
    """

    images: Tensor  # (B, 3, H, W) uint8
    labels: Tensor  # (B,) int64
    valid: Tensor  # (B,) bool
    indices: Tensor  # (B,) int64, positions in the dataset
    problems: list[tuple[int, str]]  # (index, reason)


class TransformedDataset:
    """Makes the transformed samples of a dataset. Runs in the worker processes."""

    def __init__(self, dataset: Dataset, transform: EvaluationTransform | TrainingTransform, seed: int) -> None:
        self.shared, self.transform, self.seed = Shared(dataset), transform, seed

    @property
    def dataset(self) -> Dataset:
        return self.shared.value

    def batch(self, keys: list[Key]) -> Batch:
        return collate([self.sample(epoch, index) for epoch, index in keys])

    def sample(self, epoch: int, index: int) -> tuple[Tensor, int, int, str | None]:
        if index == PADDING:
            return self.black_image(), 0, PADDING, None
        label = int(self.dataset.labels[index])
        try:
            image = self.dataset.read(index, self.transform.min_side)
            return self.transform(image, sample_generator(self.seed, epoch, index)), label, index, None
        except UnreadableImage as error:
            return self.black_image(), label, index, str(error)

    def black_image(self) -> Tensor:
        return torch.zeros(3, *self.transform.image_size, dtype=torch.uint8)


def sample_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    return rng_stream(seed, epoch << 40 | index)


def permutation(seed: int, epoch: int, images: int) -> np.ndarray:
    return rng_stream(seed, 1 << 63 | epoch).permutation(images)


def collate(samples: list[tuple[Tensor, int, int, str | None]]) -> Batch:
    images, labels, indices, problems = zip(*samples, strict=True)
    return Batch(
        stack(images),
        torch.tensor(labels),
        torch.tensor([problem is None and i != PADDING for i, problem in zip(indices, problems, strict=True)]),
        torch.tensor(indices),
        [(index, problem) for index, problem in zip(indices, problems, strict=True) if problem is not None],
    )


def stack(images: Sequence[Tensor]) -> Tensor:
    """(B, 3, H, W). A worker process writes directly into memory shared with the main process, which saves a copy."""
    if get_worker_info() is None:
        return torch.stack(list(images))
    shape = (len(images), *images[0].shape)
    return torch.stack(list(images), out=torch.empty(shape, dtype=images[0].dtype).share_memory_())


class TrainingOrder:
    """A batch sampler: yields the (epoch, index) of the samples of each step (see the module's docstring).

    The batches of a step are distributed over the ranks in order: the first to rank 0, the next to rank 1, and so on.

    Args:
        images: number of images in the dataset.
        batch_size: number of samples in the batch of one rank.
        steps: number of steps of the run, including those before ``first_step``.
        seed: seed of the permutations.
        first_step: number of steps to skip, for a resumed run.
        rank, world_size: which rank's batches to yield.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        steps: int,
        seed: int,
        first_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.images, self.batch_size, self.steps, self.seed = images, batch_size, steps, seed
        self.first_step, self.rank, self.world_size = first_step, rank, world_size

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.first_step, self.steps):
            keys = []
            start = (step * self.world_size + self.rank) * self.batch_size
            for position in range(start, start + self.batch_size):
                if position // self.images != epoch:
                    epoch = position // self.images
                    order = permutation(self.seed, epoch, self.images)
                keys.append((epoch, int(order[position % self.images])))
            yield keys


class EvaluationOrder:
    """A batch sampler: yields the (0, index) of the images of each batch of a rank (see ``evaluation_batches``)."""

    def __init__(self, images: int, batch_size: int, rank: int, world_size: int) -> None:
        self.images, self.rank, self.world_size = images, rank, world_size
        self.batch_size = min(batch_size, images) or 1  # without images there are no batches

    def __len__(self) -> int:
        return -(-self.images // (self.batch_size * self.world_size))

    def __iter__(self) -> Iterator[list[Key]]:
        for i in range(len(self)):
            start = (i * self.world_size + self.rank) * self.batch_size
            yield [(0, k if k < self.images else PADDING) for k in range(start, start + self.batch_size)]


def training_batches(
    dataset: Dataset,
    transform: TrainingTransform,
    *,
    batch_size: int,
    steps: int,
    seed: int,
    workers: int | None = None,
    first_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
    processes: int = 1,
) -> "Batches":
    """The batches of a run's steps in order, all of the same size (see ``TrainingOrder``).

    ``workers`` is the number of processes that load images; None: ``default_workers``. ``processes`` is the number of
    training processes on this machine.
    """
    order = TrainingOrder(len(dataset), batch_size, steps, seed, first_step, rank, world_size)
    workers = default_workers(dataset) if workers is None else workers
    return Batches(TransformedDataset(dataset, transform, seed), order, workers, processes)


def evaluation_batches(
    dataset: Dataset,
    transform: EvaluationTransform,
    *,
    batch_size: int,
    workers: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    processes: int = 1,
) -> "Batches":
    """Every image of the dataset once, in order, in batches of one size; the last is padded with ``PADDING``.

    Rank r gets the batches r, r + world_size, …; every rank gets the same number. The composition of the batches, and
    with it every rounding error, is the same for any number of ranks.

    ``workers`` is the number of processes that load images; None: ``default_workers``. ``processes`` is the number of
    training processes on this machine.
    """
    if batch_size < 1:
        raise UserError(f"batch size {batch_size}: use at least 1 image")
    order = EvaluationOrder(len(dataset), batch_size, rank, world_size)
    workers = default_workers(dataset) if workers is None else workers
    return Batches(TransformedDataset(dataset, transform, 0), order, workers, processes)


class Batches:
    """The batches of an order, each time that it is iterated.

    Args:
        dataset: makes them.
        order: their keys.
        workers: number of worker processes; 0: this process loads them.
        processes: number of training processes on this machine, which share its memory.
    """

    def __init__(
        self, dataset: TransformedDataset, order: TrainingOrder | EvaluationOrder, workers: int, processes: int
    ) -> None:
        if workers < 0:
            raise UserError(f"{workers} workers: use 0 to load images in this process, or 1 or more worker processes")
        self.dataset, self.order, self.workers, self.processes = dataset, order, workers, processes

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Batch]:
        height, width = self.dataset.transform.image_size
        chunk_size = min(max(MAX_CHUNK_BYTES // (3 * height * width), 1), self.order.batch_size)
        plan = plan_workers(self.workers, chunk_size * 3 * height * width, self.processes)
        pin_memory = torch.cuda.is_available()
        if not plan.workers:
            batches = map(self.dataset.batch, self.order)
            yield from map(pinned, batches) if pin_memory else batches
            return
        chunks = -(-self.order.batch_size // chunk_size)
        keys = (keys[i : i + chunk_size] for keys in self.order for i in range(0, len(keys), chunk_size))
        loaded = load_in_workers(self.dataset.batch, keys, plan, pin_memory and chunks == 1)
        with contextlib.closing(loaded):
            if chunks == 1:
                yield from loaded
            while parts := list(itertools.islice(loaded, chunks)):
                yield concatenate(parts, pin_memory)


def pinned(batch: Batch) -> Batch:
    images, labels, valid, indices, problems = batch
    return Batch(images.pin_memory(), labels.pin_memory(), valid.pin_memory(), indices.pin_memory(), problems)


def concatenate(parts: list[Batch], pin_memory: bool) -> Batch:
    """One batch of several, in order."""
    shape = (sum(len(part.images) for part in parts), *parts[0].images.shape[1:])
    return Batch(
        torch.cat([part.images for part in parts], out=torch.empty(shape, dtype=torch.uint8, pin_memory=pin_memory)),
        torch.cat([part.labels for part in parts]),
        torch.cat([part.valid for part in parts]),
        torch.cat([part.indices for part in parts]),
        [problem for part in parts for problem in part.problems],
    )


def default_workers(dataset: Dataset, processes: int = 1) -> int:
    """Number of worker processes: one per core that may be used, at most 8; 0 for images in memory and fewer than 100.

    ``processes`` is the number of training processes on this machine, which share its cores.
    """
    if dataset.in_memory or len(dataset) < 100:
        return 0
    return min(max(available_cores() // processes, 1), 8)


def check_not_deleted(dataset: Dataset, unreadable: Mapping[int, str]) -> None:
    """Raises a RunError if the last of the unreadable images was deleted since the dataset was listed."""
    if unreadable and dataset.missing(last := [*unreadable][-1]):
        raise RunError(
            f"{len(unreadable)} of {len(dataset)} images cannot be read, and the last, "
            f"{printable(dataset.names[last])}, was deleted meanwhile: put them back, and repeat or resume"
        )


class UnreadableImages:
    """Counts the images that could not be read, each once, and stops a run when their fraction exceeds the limit."""

    def __init__(self, dataset: Dataset, limit: float) -> None:
        self.dataset, self.limit = dataset, limit
        self.problems: dict[int, str] = {}

    def add(self, problems: list[tuple[int, str]]) -> list[str]:
        """Adds the (index, reason) of unreadable images and returns the reasons of the new ones.

        Raises:
            UserError: more images than allowed cannot be read.
            RunError: so many, and the last one was deleted since the run began.
        """
        new = {index: problem for index, problem in problems if index not in self.problems}
        self.problems |= new
        if len(self.problems) > self.limit * len(self.dataset):
            check_not_deleted(self.dataset, self.problems)
            raise UserError(
                f"{len(self.problems)} of {len(self.dataset)} images cannot be read, "
                f"more than the limit of {self.limit:.3g} of them: repair or remove them, "
                f"or raise --max-unreadable-fraction; the last: {next(reversed(self.problems.values()))}"
            )
        return list(new.values())

    @property
    def names(self) -> list[str]:
        return [self.dataset.names[index] for index in sorted(self.problems)]
