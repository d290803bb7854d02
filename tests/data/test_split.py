"""The stratified split: what it promises, and that it is the same on every machine."""

import math

import numpy as np
import pytest

from allmlp.data.split import stratified_split

LABELS = np.array([0] * 30 + [1] * 7 + [2] * 2 + [5])
NAMES = [f"{label}/image {i}.jpg" for i, label in enumerate(LABELS)]
GOLDEN = {0: [2, 3, 7, 10, 11, 18], 1: [5, 9, 13, 18, 20, 22]}  # of the test below, computed by a separate script


@pytest.mark.parametrize("fraction", [0, 0.01, 0.1, 0.25, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("seed", range(3))
def test_at_least_the_fraction_of_each_class_but_never_its_last_image(fraction: float, seed: int) -> None:
    kept, cut = stratified_split(LABELS, NAMES, fraction, seed)
    for label, n in zip(*np.unique(LABELS, return_counts=True), strict=True):
        expected = min(math.ceil(fraction * n), n - 1)
        assert (LABELS[cut] == label).sum() == expected
        assert (LABELS[kept] == label).sum() == n - expected >= 1


@pytest.mark.parametrize("seed", range(3))
def test_disjoint_complete_and_ascending(seed: int) -> None:
    kept, cut = stratified_split(LABELS, NAMES, 0.3, seed)
    assert sorted([*kept, *cut]) == list(range(len(LABELS)))
    assert (np.diff(kept) > 0).all()
    assert (np.diff(cut) > 0).all()


def test_the_same_on_every_machine() -> None:
    labels = np.arange(24) % 3
    names = [f"class {label}/{i:03d}.png" for i, label in enumerate(labels)]
    assert stratified_split(labels, names, 0.25, 0)[1].tolist() == GOLDEN[0]
    assert stratified_split(labels, names, 0.25, 1)[1].tolist() == GOLDEN[1]


def test_names_decide_not_their_order() -> None:
    _, cut = stratified_split(LABELS, NAMES, 0.3, 4)
    order = np.random.default_rng(0).permutation(len(LABELS))
    _, moved = stratified_split(LABELS[order], [NAMES[i] for i in order], 0.3, 4)
    assert {NAMES[order[i]] for i in moved} == {NAMES[i] for i in cut}


def test_other_classes_change_nothing_about_one() -> None:
    _, cut = stratified_split(LABELS, NAMES, 0.3, 4)
    _, alone = stratified_split(LABELS[:30], NAMES[:30], 0.3, 4)
    assert alone.tolist() == cut[cut < 30].tolist()


def test_a_larger_fraction_cuts_the_same_images_and_more() -> None:
    assert set(stratified_split(LABELS, NAMES, 0.2, 0)[1]) < set(stratified_split(LABELS, NAMES, 0.6, 0)[1])


def test_seeds_differ() -> None:
    cuts = {tuple(stratified_split(LABELS, NAMES, 0.3, seed)[1]) for seed in range(10)}
    assert len(cuts) == 10


def test_every_image_is_equally_likely() -> None:
    counts = np.zeros(30)
    for seed in range(400):
        counts[stratified_split(LABELS[:30], NAMES[:30], 0.3, seed)[1]] += 1
    assert np.abs(counts / 400 - 0.3).max() < 5 * math.sqrt(0.3 * 0.7 / 400)
