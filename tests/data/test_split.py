"""The stratified split: what it promises, and that it is the same on every machine."""

import hashlib
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from allmlp.data.split import stratified_split

GOLDEN = {0: [2, 3, 7, 10, 11, 18], 1: [5, 9, 13, 18, 20, 22]}  # of the test below, computed by a separate script


def test_the_same_on_every_machine() -> None:
    labels = np.arange(24) % 3
    names = [f"class {label}/{i:03d}.png" for i, label in enumerate(labels)]
    for seed, cut in GOLDEN.items():
        assert stratified_split(labels, names, 0.25, seed)[1].tolist() == cut
    assert len({tuple(stratified_split(labels, names, 0.3, seed)[1]) for seed in range(10)}) == 10


@settings(deadline=None, derandomize=True, max_examples=80)
@given(st.lists(st.sampled_from([0, 1, 2, 5]), max_size=40), st.floats(0, 0.99), st.integers(0, 9))
def test_of_each_class_those_of_the_lowest_digests(labels: list[int], fraction: float, seed: int) -> None:
    """At least the fraction, but never the last image; other classes, and the order of images, change nothing."""
    names = [f"{label}/\udcff {i}.jpg" for i, label in enumerate(labels)]
    kept, cut = stratified_split(np.array(labels, dtype=np.int64), names, fraction, seed)
    expected = []
    for label in set(labels):
        members = [i for i, at in enumerate(labels) if at == label]
        members.sort(key=lambda i: hashlib.sha256(f"{seed}/{names[i]}".encode(errors="surrogateescape")).digest())
        expected += members[: min(math.ceil(fraction * len(members) - 1e-9), len(members) - 1)]
    assert cut.tolist() == sorted(expected)
    assert kept.tolist() == sorted(set(range(len(labels))) - set(expected))


def test_every_image_is_equally_likely() -> None:
    counts, names = np.zeros(30), [f"0/image {i}.jpg" for i in range(30)]
    for seed in range(400):
        counts[stratified_split(np.zeros(30, np.int64), names, 0.3, seed)[1]] += 1
    assert np.abs(counts / 400 - 0.3).max() < 5 * math.sqrt(0.3 * 0.7 / 400)
