"""Which rank sees which image: in training each once in an epoch, in evaluation each once, in batches of one size."""

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
def test_all_ranks_together_see_each_image_once_in_an_epoch(images: int, batch: int, world_size: int) -> None:
    epochs = 3
    steps = -(-epochs * images // (batch * world_size))
    orders = [
        list(TrainingOrder(images, batch, steps, 5, rank=rank, world_size=world_size)) for rank in range(world_size)
    ]
    assert {len(order) for order in orders} == {steps}
    assert {len(keys) for order in orders for keys in order} == {batch}
    row = [key for step in range(steps) for order in orders for key in order[step]]
    alone = [key for keys in TrainingOrder(images, batch * world_size, steps, 5) for key in keys]
    assert row == alone  # the ranks' batches, one after the other, are one process's
    for epoch in range(epochs):
        assert sorted(index for at, index in row[: epochs * images] if at == epoch) == list(range(images))


@pytest.mark.parametrize(("images", "batch", "world_size"), COMBINATIONS[::4])
@pytest.mark.parametrize("first", [1, 4])
def test_going_on_is_the_rest_of_the_order(images: int, batch: int, world_size: int, first: int) -> None:
    for rank in range(world_size):
        whole = list(TrainingOrder(images, batch, 7, 5, rank=rank, world_size=world_size))
        rest = TrainingOrder(images, batch, 7, 5, first, rank, world_size)
        assert list(rest) == whole[first:]
        assert len(rest) == 7 - first


@pytest.mark.parametrize("micro", [1, 2, 3, 6])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_micro_batches_of_ranks_are_a_step_of_one_process(micro: int, world_size: int) -> None:
    """Steps of 36: ``accumulate`` micro-batches of each rank."""
    steps, accumulate = 4, 36 // (micro * world_size)
    orders = [
        list(TrainingOrder(50, micro, steps * accumulate, 0, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    for step, keys in enumerate(TrainingOrder(50, 36, steps, 0)):
        mine = slice(step * accumulate, (step + 1) * accumulate)
        assert sorted(key for order in orders for part in order[mine] for key in part) == sorted(keys)


def evaluation(images: int, batch: int, rank: int, world_size: int) -> DataLoader:
    pixels = np.arange(images, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), dtype=np.uint8)
    names = tuple(f"{i:03d}" for i in range(images))
    part = ImageDataset(
        store=ArrayStore(pixels, names), names=names, labels=np.arange(images) % 3, classes=("a", "b", "c")
    )
    view = EvaluationTransform(image_size=(4, 4), preprocessing=Preprocessing(crop_ratio=1.0))
    return evaluation_batches(part, view, batch_size=batch, workers=0, rank=rank, world_size=world_size)


@pytest.mark.parametrize("images", [1, 2, 3, 5, 16, 17, 97])
@pytest.mark.parametrize("batch", [1, 4, 256])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_evaluation_shows_each_image_once_in_equally_many_batches(images: int, batch: int, world_size: int) -> None:
    batches = [list(evaluation(images, batch, rank, world_size)) for rank in range(world_size)]
    assert len({len(mine) for mine in batches}) == 1
    assert {len(one.images) for mine in batches for one in mine} == {min(batch, images)}
    in_order = [batches[i % world_size][i // world_size] for i in range(world_size * len(batches[0]))]
    seen = [int(index) for one in in_order for index in one.indices[one.valid]]
    assert seen == list(range(images))
    for one in in_order:
        assert one.valid.tolist() == (one.indices != PADDING).tolist()
        assert one.problems == []
        assert not one.images[~one.valid].any()
        assert one.images[one.valid][:, 0, 0, 0].tolist() == one.indices[one.valid].tolist()


@pytest.mark.parametrize("images", [1, 5, 17, 97])
@pytest.mark.parametrize("batch", [1, 4, 256])
def test_a_batch_holds_the_same_images_for_any_number_of_ranks(images: int, batch: int) -> None:
    alone = [one.indices.tolist() for one in evaluation(images, batch, 0, 1)]
    for world_size in (2, 3, 7):
        batches = [
            [one.indices.tolist() for one in evaluation(images, batch, rank, world_size)] for rank in range(world_size)
        ]
        in_order = [batches[i % world_size][i // world_size] for i in range(world_size * len(batches[0]))]
        assert in_order[: len(alone)] == alone
        assert all(set(rest) == {PADDING} for rest in in_order[len(alone) :])
