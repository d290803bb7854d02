"""Models on the same images: pairs on the images that both could read, and the images that most get wrong."""

import dataclasses

import numpy as np
import pytest
from made_results import classified

from allmlp.errors import UserError
from allmlp.evaluation.classification import Classification
from allmlp.evaluation.comparison import compare_all, hardest


def without(result: Classification, row: int) -> Classification:
    """The result as if the image of this row could not be read."""
    kept = np.arange(len(result.labels)) != row
    columns = {name: getattr(result, name)[kept] for name in ("indices", "labels", "best", "probabilities")}
    return dataclasses.replace(result, **columns)


LABELS = [0, 1, 2, 0, 1, 2]
A = classified(LABELS, [0, 1, 2, 0, 1, 0], [0.9, 0.9, 0.9, 0.9, 0.9, 0.6])
B = classified(LABELS, [1, 2, 0, 0, 1, 1], [0.9, 0.7, 0.8, 0.5, 0.5, 0.5])
C = classified(LABELS, LABELS)


def test_every_pair() -> None:
    pairs = compare_all([A, B, C])
    assert [(first, second) for first, second, _ in pairs] == [(0, 1), (0, 2), (1, 2)]
    assert [(pair.only_first, pair.only_second) for _, _, pair in pairs] == [(3, 0), (0, 1), (0, 4)]
    assert pairs[0].to_json_object(["a", "b", "c"])["first"] == "a"
    assert compare_all([A]) == []


def test_only_images_that_both_could_read() -> None:
    (pair,) = compare_all([without(A, 0), without(B, 1)])
    assert (pair.pair.images, pair.pair.only_first, pair.pair.only_second) == (4, 1, 0)


def test_other_images() -> None:
    with pytest.raises(UserError, match=r"different images in this part.*--part all"):
        compare_all([A, classified([0], [0])])


def test_the_hardest_first() -> None:
    """Row 5 is wrong in A and B; then B's mistakes by confidence."""
    assert hardest([B, A, C], 10) == [5, 0, 2, 1]
    assert hardest([B], 2) == [0, 2]
    assert hardest([without(B, 0), A], 10) == [4, 1, 0]
    assert hardest([C], 10) == []
