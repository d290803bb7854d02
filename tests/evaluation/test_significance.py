"""Intervals and tests against values computed by hand, and against scipy's bootstrap of the images themselves."""

import numpy as np
import pytest
from scipy import stats

from allmlp.evaluation.significance import bootstrap, bootstrap_balanced_accuracy, bootstrap_proportion, compare, wilson


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    # by hand: z² = 3.84146; (8, 10): center 0.99207 / 1.38415, half 0.31361 / 1.38415
    [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962), (0, 0, 0, 1)],
)
def test_wilson(correct: int, total: int, low: float, high: float) -> None:
    assert wilson(correct, total) == pytest.approx((low, high), abs=5e-5)


def scipys(statistic, *samples: np.ndarray) -> tuple[float, float]:
    """The interval by scipy, which resamples images."""
    found = stats.bootstrap(
        samples, statistic, paired=len(samples) > 1, vectorized=False, n_resamples=4000, method="percentile",
        rng=np.random.default_rng(1),
    )  # fmt: skip
    return tuple(found.confidence_interval)


@pytest.mark.parametrize(("correct", "total"), [(30, 40), (3, 200), (500, 1000)])
def test_a_proportion_has_scipys_interval(correct: int, total: int) -> None:
    images = np.repeat([1.0, 0.0], [correct, total - correct])
    assert bootstrap_proportion(correct, total) == pytest.approx(scipys(np.mean, images), abs=3 / total)
    exact = stats.binom.ppf([0.025, 0.975], total, correct / total) / total  # of infinitely many resamples
    assert bootstrap_proportion(correct, total) == pytest.approx(exact, abs=1.01 / total)


def test_all_correct_is_a_point() -> None:
    assert bootstrap_proportion(7, 7) == (1.0, 1.0)


def test_balanced_accuracy_has_scipys_interval() -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice(5, 300, p=[0.6, 0.2, 0.15, 0.04, 0.01])
    labels[labels == 2] = 6  # classes without images, in between and at the end
    correct = rng.random(300) < 0.3 + 0.1 * labels

    def mean_recall(labels: np.ndarray, correct: np.ndarray) -> float:
        return float(np.mean([correct[labels == label].mean() for label in np.unique(labels)]))

    alone = np.r_[np.zeros(50, dtype=int), 1], np.arange(51) % 2 == 0  # a class that a third of the resamples lack
    ours = bootstrap_balanced_accuracy(np.bincount(alone[0], alone[1]).astype(int), np.bincount(alone[0]))
    assert ours == pytest.approx(scipys(mean_recall, *alone), abs=0.02)
    ours = bootstrap_balanced_accuracy(np.bincount(labels[correct], minlength=9), np.bincount(labels, minlength=9))
    assert ours == pytest.approx(scipys(mean_recall, labels, correct), abs=0.01)


def test_the_bootstrap_is_a_function_of_counts_and_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, statistic = np.array([5, 3, 2]), lambda tables: tables[:, 0] / 10
    assert bootstrap(counts, statistic) == bootstrap(counts, statistic)
    assert len({bootstrap(counts * 100, lambda t: t[:, 0] / 1000, 50, seed) for seed in range(5)}) > 1
    shapes = []
    monkeypatch.setattr("allmlp.evaluation.significance.MAX_CELLS", 30)
    bootstrap(counts, lambda tables: shapes.append(tables.shape) or tables[:, 0], 25)
    assert shapes == [(10, 3), (10, 3), (5, 3)]


def test_mcnemar_by_hand() -> None:
    """Six images that only the first gets right, one that only the second does: 2 (1 + 7) / 2⁷."""
    first = np.array([True] * 6 + [False] + [True] * 10 + [False] * 3)
    second = np.array([False] * 6 + [True] + [True] * 10 + [False] * 3)
    pair = compare(first, second)
    assert (pair.images, pair.only_first, pair.only_second) == (20, 6, 1)
    assert pair.difference == 5 / 20
    assert pair.p_value == pytest.approx(16 / 128)
    differences = first.astype(float) - second.astype(float)
    assert pair.interval == pytest.approx(scipys(np.mean, differences), abs=1.5 / 20)
    swapped = compare(second, first)
    assert (swapped.difference, swapped.p_value) == (-pair.difference, pair.p_value)


def test_models_that_agree_do_not_differ() -> None:
    pair = compare(np.array([True, False]), np.array([True, False]))
    assert (pair.difference, pair.interval, pair.p_value) == (0.0, (0.0, 0.0), 1.0)
    with pytest.raises(ValueError, match="same images"):
        compare(np.array([True]), np.array([True, False]))
