"""Learning rates by hand."""

import math

import pytest

from allmlp.training.schedules import learning_rate


def rates(steps: int, warmup: int, decay: str, peak: float = 1.0) -> list[float]:
    return [
        learning_rate(step, peak=peak, warmup_steps=warmup, steps=steps, decay=decay)  # pyright: ignore
        for step in range(steps)
    ]


def test_linear_by_hand() -> None:
    assert rates(9, 4, "linear", peak=2.0) == pytest.approx([0.5, 1, 1.5, 2, 2, 1.6, 1.2, 0.8, 0.4])


def test_cosine_by_hand() -> None:
    half = math.sqrt(0.5)
    expected = [0.5, 1, 1, (1 + half) / 2, 0.5, (1 - half) / 2]
    assert rates(6, 2, "cosine") == pytest.approx(expected)


def test_without_warmup_the_first_step_has_the_peak() -> None:
    assert rates(4, 0, "linear") == pytest.approx([1, 0.75, 0.5, 0.25])
    assert rates(2, 0, "cosine") == pytest.approx([1, 0.5])
    assert rates(1, 0, "linear") == [1]


@pytest.mark.parametrize("decay", ["linear", "cosine"])
@pytest.mark.parametrize(("steps", "warmup"), [(1000, 100), (1000, 0), (50, 49), (10, 10)])
def test_rises_to_the_peak_and_falls_to_nearly_nothing(decay: str, steps: int, warmup: int) -> None:
    found = rates(steps, warmup, decay, peak=3e-3)
    rising, falling = found[:warmup], found[warmup:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert max(found) == pytest.approx(3e-3)
    assert min(found) > 0
    assert len(set(rising)) == len(rising)
    assert len(set(falling)) == len(falling)
    if steps == 1000:
        assert found[-1] < 3e-3 * 2 / (steps - warmup)
    assert learning_rate(
        steps, peak=3e-3, warmup_steps=warmup, steps=steps + (steps == warmup), decay=decay
    ) == pytest.approx(3e-3 if steps == warmup else 0, abs=1e-18)


def test_cosine_is_above_linear_in_the_first_half_and_below_in_the_second() -> None:
    linear, cosine = rates(100, 0, "linear"), rates(100, 0, "cosine")
    assert all(c > x for c, x in zip(cosine[1:50], linear[1:50], strict=True))
    assert all(c < x for c, x in zip(cosine[51:], linear[51:], strict=True))
