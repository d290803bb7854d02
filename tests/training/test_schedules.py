"""Learning rates worked out by hand, and the properties of every schedule."""

import math
from typing import Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allmlp.training.schedules import learning_rate

Decay = Literal["linear", "cosine"]


def rates(steps: int, warmup: int, decay: Decay, peak: float = 1.0) -> list[float]:
    """Of each step of the run, and of the first one after it."""
    return [learning_rate(step, peak=peak, warmup_steps=warmup, steps=steps, decay=decay) for step in range(steps + 1)]


def test_linear_by_hand() -> None:
    expected = [0, 0.5, 1, 1.5, 2, 1.600004, 1.200008, 0.800012, 0.400016, 2e-5]
    assert rates(9, 4, "linear", peak=2.0) == pytest.approx(expected, rel=1e-12)


def test_cosine_by_hand() -> None:
    half = math.sqrt(0.5)
    assert rates(6, 2, "cosine") == pytest.approx([0, 0.5, 1, (1 + half) / 2, 0.5, (1 - half) / 2, 0], abs=1e-15)


def test_the_papers_imagenet_run_by_hand() -> None:
    """Peak 1e-3, 10,000 of 92,897 steps of warm-up; the last step has 1 / 82,897 of the way left."""
    found = [
        learning_rate(step, peak=1e-3, warmup_steps=10_000, steps=92_897, decay="linear")
        for step in (0, 1, 10_000, 92_896)
    ]
    assert found == pytest.approx([0, 1e-7, 1e-3, 1e-8 + (1e-3 - 1e-8) / 82_897], rel=1e-9)


def test_without_warmup_the_first_step_has_the_peak() -> None:
    assert rates(4, 0, "linear") == pytest.approx([1, 0.7500025, 0.500005, 0.2500075, 1e-5])
    assert rates(2, 0, "cosine") == pytest.approx([1, 0.5, 0])
    assert rates(1, 0, "linear")[0] == 1


@given(st.sampled_from(["linear", "cosine"]), st.integers(1, 300), st.floats(0, 1), st.floats(1e-5, 10))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_rises_to_the_peak_once_and_falls(decay: Decay, steps: int, share: float, peak: float) -> None:
    warmup = int(share * steps)
    found = rates(steps, warmup, decay, peak)
    rising, falling = found[: warmup + 1], found[warmup:]
    assert rising == sorted(set(rising))
    assert falling == sorted(falling, reverse=True)
    assert found[warmup] == pytest.approx(peak) == max(found)
    assert warmup == 0 or found[0] == 0
    assert warmup == steps or found[-1] == pytest.approx(1e-5 * peak if decay == "linear" else 0, abs=1e-12)
