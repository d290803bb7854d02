"""Parts to batches, in an order that is a function of the seed alone.

Training images come as one endless row: epoch after epoch, each a permutation of the part by (seed, epoch), so that
sample number ``k`` of the run is known without what came before, no image is dropped for a short last batch, and any
batch can be made by any worker. What is random about one sample is drawn by (seed, epoch, index).
"""

import os
import signal
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from allmlp.data.decode import UnreadableImage
from allmlp.data.sources import ImageDataset
from allmlp.data.stores import ArrayStore
from allmlp.data.transforms import EvaluationView, TrainingView
from allmlp.errors import UserError
from allmlp.rng import rng_stream

PADDING = -1  # the index of no image


class Batch(NamedTuple):
    """An unreadable image keeps its place: black, ``valid`` false, and why in ``problems``; so does padding, untold."""

    images: Tensor  # (B, 3, H, W) uint8
    labels: Tensor  # (B,) int64
    valid: Tensor  # (B,) bool
    indices: Tensor  # (B,) int64, of the images in their part
    problems: list[tuple[int, str]]  # (index, what is wrong)


class ViewedDataset(Dataset):
    """(epoch, index) to one sample of a part, for a DataLoader's workers."""

    def __init__(self, part: ImageDataset, view: EvaluationView | TrainingView, seed: int) -> None:
        self.part, self.view, self.seed = part, view, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int, str | None]:
        epoch, index = key
        if index == PADDING:
            return torch.zeros(3, *self.view.image_size, dtype=torch.uint8), 0, PADDING, None
        label = int(self.part.labels[index])
        try:
            return (
                self.view(self.part.read(index, self.view.min_side), sample_generator(self.seed, epoch, index)),
                label,
                index,
                None,
            )
        except UnreadableImage as problem:
            return torch.zeros(3, *self.view.image_size, dtype=torch.uint8), label, index, str(problem)


def sample_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    return rng_stream(seed, epoch << 40 | index)


def permutation(seed: int, epoch: int, images: int) -> np.ndarray:
    return rng_stream(seed, 1 << 63 | epoch).permutation(images)


def collate(samples: list[tuple[Tensor, int, int, str | None]]) -> Batch:
    images, labels, indices, problems = zip(*samples, strict=True)
    return Batch(
        stacked(images),
        torch.tensor(labels),
        torch.tensor([problem is None and i != PADDING for i, problem in zip(indices, problems, strict=True)]),
        torch.tensor(indices),
        [(index, problem) for index, problem in zip(indices, problems, strict=True) if problem is not None],
    )


def stacked(images: Sequence[Tensor]) -> Tensor:
    """(B, 3, H, W); in a worker process straight into memory that the main process shares, which saves a copy."""
    if get_worker_info() is None:
        return torch.stack(list(images))
    shape = (len(images), *images[0].shape)
    return torch.stack(list(images), out=torch.empty(shape, dtype=images[0].dtype).share_memory_())


class TrainingOrder:
    """Yields for each step the (epoch, index) of its samples; see the module's first lines.

    Of several ranks, each takes the batches that fall to it: the first rank one, the second the next, and so on.

    Args:
        images: of the part.
        batch_size: of one rank's batch.
        steps: how many batches each rank gets, from ``first_step`` on.
        seed: of the permutations.
        first_step: how many of them were there before.
        rank, ranks: whose batches these are.
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

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
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


def training_batches(
    part: ImageDataset,
    view: TrainingView,
    *,
    batch_size: int,
    steps: int,
    seed: int,
    workers: int | None = None,
    first_step: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """The batches of a run's steps, in order, all of the same size (see ``TrainingOrder``).

    ``workers`` None chooses (``default_workers``).
    """
    order = TrainingOrder(len(part), batch_size, steps, seed, first_step, rank, world_size)
    return loader(ViewedDataset(part, view, seed), order, default_workers(part) if workers is None else workers)


def evaluation_batches(
    part: ImageDataset,
    view: EvaluationView,
    *,
    batch_size: int,
    workers: int | None = None,
    rank: int = 0,
    world_size: int = 1,
) -> DataLoader:
    """Every image of the part once, in order: batches of one size, the last filled up with ``PADDING``.

    Of several ranks, each takes every so-manieth batch, all equally many. So what is computed together, and with it
    every rounding, is the same for any number of ranks.
    """
    if batch_size < 1:
        raise UserError(f"batch size {batch_size}: at least 1 image")
    size = min(batch_size, len(part)) or 1  # of no images, no batches
    rounds = -(-len(part) // (size * world_size))
    starts = [(turn * world_size + rank) * size for turn in range(rounds)]
    order = [[(0, i if i < len(part) else PADDING) for i in range(at, at + size)] for at in starts]
    return loader(ViewedDataset(part, view, 0), order, default_workers(part) if workers is None else workers)


def loader(views: ViewedDataset, order: TrainingOrder | list[list[tuple[int, int]]], workers: int) -> DataLoader:
    if workers < 0:
        raise UserError(f"{workers} workers: 0 loads images in this process, 1 or more in processes beside it")
    return DataLoader(
        views,
        batch_sampler=order,  # pyright: ignore[reportArgumentType]  # keys may be anything that __getitem__ takes
        collate_fn=collate,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if workers else None,
        worker_init_fn=ignore_first_signals,
    )


def ignore_first_signals(worker: int) -> None:
    """In a process that loads images: signals to a whole group of processes are the main one's to answer.

    An interrupt is ignored; so is the first SIGTERM. The second, with which a loader ends a worker that does not end
    by itself, works as ever.
    """
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(signal.SIGTERM, signal.SIG_DFL) and None)


def default_workers(part: ImageDataset, processes: int = 1) -> int:
    """0 for images in memory or few of them, which this process loads; else one for each core, at most 8.

    The cores are shared by so many processes of a run on this machine.
    """
    if isinstance(part.store, ArrayStore) or len(part) < 100:
        return 0
    return min(max((os.cpu_count() or 1) // processes, 1), 8)


class UnreadableImages:
    """Counts the images that could not be read, each once, and stops a run that loses more than it may."""

    def __init__(self, part: ImageDataset, limit: float) -> None:
        self.part, self.limit = part, limit
        self.problems: dict[int, str] = {}

    def add(self, problems: list[tuple[int, str]]) -> list[str]:
        """Those of a step's problems that are new; a UserError once too many are known."""
        new = {index: problem for index, problem in problems if index not in self.problems}
        self.problems |= new
        if len(self.problems) > self.limit * len(self.part):
            raise UserError(
                f"{len(self.problems)} of {len(self.part)} images cannot be read, more than {self.limit:.3g} of them: "
                f"mend them or raise --max-unreadable-fraction; the last: {next(reversed(self.problems.values()))}"
            )
        return list(new.values())

    @property
    def names(self) -> list[str]:
        return [self.part.names[index] for index in sorted(self.problems)]
