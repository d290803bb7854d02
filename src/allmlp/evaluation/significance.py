"""How certain an accuracy is, and whether two models differ: intervals and tests."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy.stats import binomtest

LEVEL = 0.95  # of the intervals
RESAMPLES = 10_000
MAX_CELLS = 1 << 22  # of a table of resamples that is held at a time

Interval = tuple[float, float]


def wilson(correct: int, total: int) -> Interval:
    """The 95 % score interval of a proportion, as fractions; (0, 1) if ``total`` is 0.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference", JASA 22 (158). Unlike
    p ± 1.96 σ, it stays within [0, 1] and does not shrink to a point when all or none are correct.
    """
    if total == 0:
        return 0.0, 1.0
    z = 1.959964
    p, shrink = correct / total, 1 + z * z / total
    center = (p + z * z / (2 * total)) / shrink
    half = z * math.sqrt(p * (1 - p) / total + (z / (2 * total)) ** 2) / shrink
    return max(center - half, 0.0), min(center + half, 1.0)


def bootstrap(
    counts: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The 95 % percentile interval of a statistic under resampling of the images with replacement.

    Images of the same cell are interchangeable, so that whole tables of counts are drawn (multinomial) in place of
    images: the distribution is the same, and the cost does not depend on their number.

    Args:
        counts: (cells,) number of images of each kind, at least one in all.
        statistic: (R, cells) counts of R resamples → (R,) values.
        resamples: number of resamples.
        seed: of their generator; the interval is a function of the counts and the seed.

    Source: Efron 1979, "Bootstrap methods: another look at the jackknife", Annals of Statistics 7 (1).
    """
    rng, counts = np.random.default_rng(seed), np.asarray(counts)
    total, step = int(counts.sum()), max(MAX_CELLS // len(counts), 1)
    values = [
        statistic(rng.multinomial(total, counts / total, size=min(step, resamples - start)))
        for start in range(0, resamples, step)
    ]
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(np.concatenate(values), [tail, 1 - tail])
    return float(low), float(high)


def bootstrap_proportion(correct: int, total: int) -> Interval:
    """The bootstrap interval of the fraction of images that are correct."""
    return bootstrap(np.array([correct, total - correct]), lambda tables: tables[:, 0] / total)


def bootstrap_balanced_accuracy(correct: np.ndarray, images: np.ndarray) -> Interval:
    """The bootstrap interval of the mean recall of the classes, from (K,) counts.

    A class that a resample lacks is left out of its mean, as are classes without images.
    """
    present = images > 0
    hits, misses = correct[present], (images - correct)[present]

    def mean_recall(tables: np.ndarray) -> np.ndarray:
        right, wrong = tables[:, : len(hits)], tables[:, len(hits) :]
        drawn = right + wrong
        return (right / np.maximum(drawn, 1)).sum(1) / (drawn > 0).sum(1)

    few = int(np.clip(MAX_CELLS // len(hits), 500, RESAMPLES))  # seconds, also for ImageNet-21k's classes
    return bootstrap(np.concatenate([hits, misses]), mean_recall, few)


class Pair(NamedTuple):
    """Two models on the same images."""

    images: int
    difference: float  # accuracy of the first minus that of the second
    interval: Interval  # of the difference, by the bootstrap
    only_first: int  # images that only the first classifies correctly
    only_second: int
    p_value: float  # of McNemar's exact test, two-sided


def compare(first: np.ndarray, second: np.ndarray) -> Pair:
    """Whether two models differ by more than chance, from (N,) bool: which of the same N images each gets right.

    Source: McNemar 1947, "Note on the sampling error of the difference between correlated proportions or percentages",
    Psychometrika 12 (2); exact, by the binomial distribution of the images that one of the two gets right.
    """
    if first.shape != second.shape or not len(first):
        raise ValueError(f"{first.shape} and {second.shape} results: compare two models on the same images")
    only_first, only_second = int((first & ~second).sum()), int((~first & second).sum())
    images, differing = len(first), only_first + only_second
    interval = bootstrap(
        np.array([only_first, only_second, images - differing]),
        lambda tables: (tables[:, 0] - tables[:, 1]) / images,
    )
    p_value = float(binomtest(only_first, differing, 0.5).pvalue) if differing else 1.0
    return Pair(images, (only_first - only_second) / images, interval, only_first, only_second, p_value)
