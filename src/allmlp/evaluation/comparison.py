"""Several models on the same images: which differ by more than chance."""

from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

from allmlp.errors import UserError
from allmlp.evaluation.classification import Classification
from allmlp.evaluation.significance import Pair, compare


class NamedPair(NamedTuple):
    """Two models, as positions in the list of those compared."""

    first: int
    second: int
    pair: Pair

    def to_json_object(self, names: Sequence[str]) -> dict[str, Any]:
        return {
            "first": names[self.first],
            "second": names[self.second],
            **self.pair._asdict(),
            "interval": list(self.pair.interval),
        }


def compare_all(results: Sequence[Classification]) -> list[NamedPair]:
    """Every pair of models, on the images that both could read.

    Raises:
        UserError: the results are not of the same images.
    """
    names = results[0].dataset.names
    for result in results[1:]:
        if result.dataset.names != names:
            raise UserError(
                "the models have different images in this part, since they were trained on different splits of the "
                "source: compare them on a source that has its own test part, or with --part all, where some images "
                "are those that they were trained on"
            )
    pairs = []
    for first, second in combinations(range(len(results)), 2):
        _, rows, other_rows = np.intersect1d(results[first].indices, results[second].indices, return_indices=True)
        pairs.append(
            NamedPair(first, second, compare(results[first].correct[rows], results[second].correct[other_rows]))
        )
    return pairs


def hardest(results: Sequence[Classification], count: int) -> list[int]:
    """Rows of the first result that the most models get wrong, the most confident mistakes of the first model first.

    Only images that every model could read.
    """
    shared = results[0].indices
    for result in results[1:]:
        shared = np.intersect1d(shared, result.indices)
    wrong = np.zeros(len(shared), dtype=int)
    for result in results:
        wrong += ~result.correct[np.searchsorted(result.indices, shared)]
    rows = np.searchsorted(results[0].indices, shared)
    confidence = np.where(
        results[0].correct[rows], -results[0].probabilities[rows, 0], results[0].probabilities[rows, 0]
    )
    order = np.lexsort((-confidence, -wrong))
    return [int(row) for row in rows[order[:count]] if not results[0].correct[row]]
