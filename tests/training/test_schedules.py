"""Learning rates worked out by hand, and the properties of every schedule."""

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allmlp.config.recipe import Decay
from allmlp.training.schedules import learning_rate


def rates(steps: int, warmup: int, decay: Decay, peak: float = 1.0) -> list[float]:
    """Of each step of the run, and of the first one after it."""
    return [learning_rate(step, peak=peak, warmup_steps=warmup, steps=steps, decay=decay) for step in range(steps + 1)]


HALF = math.sqrt(0.5)


@pytest.mark.parametrize(
    ("steps", "warmup", "decay", "expected"),
    [
        (9, 4, "linear", [0, 0.25, 0.5, 0.75, 1, 0.800002, 0.600004, 0.400006, 0.200008, 1e-5]),
        (6, 2, "cosine", [0, 0.5, 1, (1 + HALF) / 2, 0.5, (1 - HALF) / 2, 0]),
        (4, 0, "linear", [1, 0.7500025, 0.500005, 0.2500075, 1e-5]),
        (10, 2, "staircase", [0, 0.5, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01, 0.001, 0.001]),
        (4, 0, "staircase", [1, 1, 0.1, 0.01, 0.001]),  # from 1.2, 2.4 and 3.6 on
    ],
)
def test_rates_by_hand(steps: int, warmup: int, decay: Decay, expected: list[float]) -> None:
    assert rates(steps, warmup, decay) == pytest.approx(expected, rel=1e-12, abs=1e-15)


@given(st.sampled_from(["linear", "cosine"]), st.integers(1, 300), st.floats(0, 1), st.floats(1e-5, 10))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_rates_rise_to_the_peak_once_and_fall(decay: Decay, steps: int, share: float, peak: float) -> None:
    warmup = int(share * steps)
    found = rates(steps, warmup, decay, peak)
    rising, falling = found[: warmup + 1], found[warmup:]
    assert rising == sorted(set(rising))
    assert falling == sorted(falling, reverse=True)
    assert found[warmup] == pytest.approx(peak) == max(found)
    assert warmup == 0 or found[0] == 0
    assert warmup == steps or found[-1] == pytest.approx(1e-5 * peak if decay == "linear" else 0, abs=1e-12)


@given(st.integers(1, 700), st.integers(0, 140))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_staircase_has_three_steps_down_each_to_a_tenth(steps: int, warmup: int) -> None:
    """Each stair begins at the first step that is at least that share of the run, in exact arithmetic."""
    warmup = min(warmup, steps // 5)
    found = rates(steps, warmup, "staircase", peak=0.03)
    for step in range(warmup, steps + 1):
        passed = sum(Fraction(step, steps) >= share for share in (Fraction(3, 10), Fraction(6, 10), Fraction(9, 10)))
        assert found[step] == pytest.approx(0.03 / 10**passed, rel=1e-12)
