"""Which rank gets which image: each once per epoch in training, each once in evaluation, in batches of equal size."""

from hypothesis import given, settings
from hypothesis import strategies as st

from allmlp.data.loader import PADDING, EvaluationOrder, TrainingOrder

EXAMPLES = settings(deadline=None, derandomize=True, max_examples=150)
IMAGES, BATCH, RANKS = st.integers(1, 100), st.integers(1, 50) | st.just(256), st.integers(1, 7)


@EXAMPLES
@given(IMAGES, st.integers(1, 50), RANKS, st.integers(0, 9))
def test_all_ranks_together_get_each_image_once_per_epoch(images: int, batch: int, ranks: int, first: int) -> None:
    """The batches of all ranks, one after another, are those of a single process, also from a later step on."""
    steps = -(-3 * images // (batch * ranks))
    orders = [list(TrainingOrder(images, batch, steps, 5, rank=rank, world_size=ranks)) for rank in range(ranks)]
    assert {len(keys) for order in orders for keys in order} == {batch}
    in_sequence = [key for step in range(steps) for order in orders for key in order[step]]
    assert in_sequence == [key for keys in TrainingOrder(images, batch * ranks, steps, 5) for key in keys]
    for epoch in range(3):
        row = in_sequence[epoch * images : (epoch + 1) * images]
        assert sorted(row) == [(epoch, index) for index in range(images)]
        if images > 20:
            assert row != sorted(row)
    rest = TrainingOrder(images, batch, steps, 5, min(first, steps), ranks - 1, ranks)
    assert list(rest) == list(rest) == orders[-1][first:]
    assert len(rest) == len(orders[-1][first:])


def test_epochs_and_seeds_differ() -> None:
    rows = [tuple(i for _, i in keys) for seed in range(3) for keys in TrainingOrder(50, 50, 3, seed)]
    assert len(set(rows)) == 9


@EXAMPLES
@given(IMAGES, BATCH, RANKS)
def test_evaluation_gives_each_image_once_in_equally_many_batches_per_rank(images: int, batch: int, ranks: int) -> None:
    """A batch has the same images for any number of ranks; the last ones are padded."""
    by_rank = [EvaluationOrder(images, batch, rank, ranks) for rank in range(ranks)]
    assert {len(list(order)) for order in by_rank} == {len(by_rank[0])}
    in_order = [keys for step in zip(*by_rank, strict=True) for keys in step]
    assert {len(keys) for keys in in_order} == {min(batch, images)}
    padding = sum(map(len, in_order)) - images
    assert [key for keys in in_order for key in keys] == [(0, i) for i in range(images)] + [(0, PADDING)] * padding
    assert padding < ranks * min(batch, images)
