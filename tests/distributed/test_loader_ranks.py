"""Which rank gets which image: each once per epoch in training, each once in evaluation, in batches of equal size."""

import itertools

import numpy as np
import pytest
from torch.utils.data import DataLoader

from allmlp.data.dataset import ImageDataset
from allmlp.data.loader import PADDING, TrainingOrder, evaluation_batches
from allmlp.data.stores import ArrayStore
from allmlp.data.transforms import EvaluationTransform
from allmlp.metadata import Preprocessing

COMBINATIONS = list(itertools.product([1, 2, 5, 7, 24, 97], [1, 2, 3, 8, 50], [1, 2, 3, 4, 7]))


@pytest.mark.parametrize(("images", "batch", "world_size"), COMBINATIONS)
def test_all_ranks_together_get_each_image_once_per_epoch(images: int, batch: int, world_size: int) -> None:
    epochs = 3
    steps = -(-epochs * images // (batch * world_size))
    orders = [
        list(TrainingOrder(images, batch, steps, 5, rank=rank, world_size=world_size)) for rank in range(world_size)
    ]
    assert {len(order) for order in orders} == {steps}
    assert {len(keys) for order in orders for keys in order} == {batch}
    in_sequence = [key for step in range(steps) for order in orders for key in order[step]]
    single = [key for keys in TrainingOrder(images, batch * world_size, steps, 5) for key in keys]
    assert in_sequence == single  # the batches of all ranks, one after another, are those of a single process
    for epoch in range(epochs):
        assert sorted(index for at, index in in_sequence[: epochs * images] if at == epoch) == list(range(images))


@pytest.mark.parametrize(("images", "batch", "world_size"), COMBINATIONS[::4])
@pytest.mark.parametrize("first", [1, 4])
def test_a_later_first_step_gives_the_rest_of_the_order(images: int, batch: int, world_size: int, first: int) -> None:
    for rank in range(world_size):
        complete = list(TrainingOrder(images, batch, 7, 5, rank=rank, world_size=world_size))
        rest = TrainingOrder(images, batch, 7, 5, first, rank, world_size)
        assert list(rest) == complete[first:]
        assert len(rest) == 7 - first


@pytest.mark.parametrize("micro", [1, 2, 3, 6])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_micro_batches_of_all_ranks_make_a_step_of_one_process(micro: int, world_size: int) -> None:
    """A step of 36 images is ``accumulate`` micro-batches of each rank."""
    steps, accumulate = 4, 36 // (micro * world_size)
    orders = [
        list(TrainingOrder(50, micro, steps * accumulate, 0, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    for step, keys in enumerate(TrainingOrder(50, 36, steps, 0)):
        mine = slice(step * accumulate, (step + 1) * accumulate)
        assert sorted(key for order in orders for micro_batch in order[mine] for key in micro_batch) == sorted(keys)


def evaluation_loader(images: int, batch_size: int, rank: int, world_size: int) -> DataLoader:
    pixels = np.arange(images, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), dtype=np.uint8)
    names = tuple(f"{i:03d}" for i in range(images))
    dataset = ImageDataset(
        store=ArrayStore(pixels, names), names=names, labels=np.arange(images) % 3, classes=("a", "b", "c")
    )
    transform = EvaluationTransform(image_size=(4, 4), preprocessing=Preprocessing(crop_ratio=1.0))
    return evaluation_batches(dataset, transform, batch_size=batch_size, workers=0, rank=rank, world_size=world_size)


@pytest.mark.parametrize("images", [1, 2, 3, 5, 16, 17, 97])
@pytest.mark.parametrize("batch_size", [1, 4, 256])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_evaluation_gives_each_image_once_in_equally_many_batches_per_rank(
    images: int, batch_size: int, world_size: int
) -> None:
    by_rank = [list(evaluation_loader(images, batch_size, rank, world_size)) for rank in range(world_size)]
    assert len({len(batches) for batches in by_rank}) == 1
    assert {len(batch.images) for batches in by_rank for batch in batches} == {min(batch_size, images)}
    in_order = [by_rank[i % world_size][i // world_size] for i in range(world_size * len(by_rank[0]))]
    indices = [int(index) for batch in in_order for index in batch.indices[batch.valid]]
    assert indices == list(range(images))
    for batch in in_order:
        assert batch.valid.tolist() == (batch.indices != PADDING).tolist()
        assert batch.problems == []
        assert not batch.images[~batch.valid].any()
        assert batch.images[batch.valid][:, 0, 0, 0].tolist() == batch.indices[batch.valid].tolist()


@pytest.mark.parametrize("images", [1, 5, 17, 97])
@pytest.mark.parametrize("batch_size", [1, 4, 256])
def test_an_evaluation_batch_has_the_same_images_for_any_number_of_ranks(images: int, batch_size: int) -> None:
    single = [batch.indices.tolist() for batch in evaluation_loader(images, batch_size, 0, 1)]
    for world_size in (2, 3, 7):
        by_rank = [
            [batch.indices.tolist() for batch in evaluation_loader(images, batch_size, rank, world_size)]
            for rank in range(world_size)
        ]
        in_order = [by_rank[i % world_size][i // world_size] for i in range(world_size * len(by_rank[0]))]
        assert in_order[: len(single)] == single
        assert all(set(rest) == {PADDING} for rest in in_order[len(single) :])
