"""The rounds of a benchmark, with a clock that only the models' calls move."""

from collections.abc import Callable
from functools import partial

import pytest

from allmlp.errors import UserError
from allmlp.throughput.budget import parse_budget
from allmlp.throughput.rounds import Stopwatch, Timing, run_rounds, run_sweeps
from allmlp.throughput.subject import OutOfMemory


class FakeTime:
    """A clock, and the order of the calls that moved it."""

    def __init__(self) -> None:
        self.now = 100.0
        self.calls: list[tuple[str, int]] = []

    def __call__(self) -> float:
        return self.now

    def model(self, name: str, seconds: Callable[[int], float], limit: int = 10**9) -> Callable[[int], None]:
        """A call that takes this time for a batch size, and does not fit above the limit."""

        def call(batch_size: int) -> None:
            self.calls.append((name, batch_size))
            if batch_size > limit:
                raise OutOfMemory
            self.now += seconds(batch_size)

        return call


def peaking(best: int) -> Callable[[int], float]:
    """Seconds of a model that computes most images per second at this batch size, 100 of them."""
    return lambda size: size / (100 * min(size / best, best / size) ** 0.3)


def sweep(*models: Callable[[int], None], clock: FakeTime, seconds: float = 1e6, **options) -> list[Timing]:
    timings = [Timing() for _ in models]
    run_sweeps(list(models), timings, Stopwatch(seconds, clock), slice_seconds=0.0, **options)
    return timings


@pytest.mark.parametrize("best", [1, 4, 32, 4096])
def test_a_sweep_finds_the_best_batch_size(best: int) -> None:
    clock = FakeTime()
    (timing,) = sweep(clock.model("a", peaking(best)), clock=clock)
    assert timing.best == best
    assert timing.rate(best) == pytest.approx(100)
    assert max(timing.sweep) <= max(4 * best, 4)  # it ends soon after the peak


def test_models_alternate_within_a_sweep_and_end_by_themselves() -> None:
    clock = FakeTime()
    a, b = sweep(clock.model("a", peaking(2)), clock.model("b", peaking(16)), clock=clock)
    assert (a.best, b.best) == (2, 16)
    order = list(dict.fromkeys(clock.calls))
    shared = [(name, size) for name, size in order if size in a.sweep]
    assert shared == [(name, size) for size in a.sweep for name in "ab"]


def test_out_of_memory_ends_one_sweep_and_is_recorded() -> None:
    clock = FakeTime()
    a, b = sweep(clock.model("a", peaking(64), limit=10), clock.model("b", peaking(64)), clock=clock)
    assert a.sweep[16] is None
    assert a.best == 8
    assert max(a.sweep) == 16
    assert b.best == 64
    (none,) = sweep(clock.model("c", peaking(64), limit=0), clock=clock)
    assert (none.best, none.sweep) == (None, {1: None})


def test_chosen_batch_sizes_are_all_tried() -> None:
    clock = FakeTime()
    (timing,) = sweep(clock.model("a", peaking(1)), clock=clock, batch_sizes=[64, 3, 8, 3])
    assert list(timing.sweep) == [3, 8, 64]


@pytest.mark.parametrize("seconds", [0.5, 3.0, 20.0])
def test_a_sweep_keeps_to_its_time(seconds: float) -> None:
    clock = FakeTime()
    start = clock.now
    timings = sweep(
        clock.model("a", peaking(512)), clock.model("b", lambda size: 0.3 * size), clock=clock, seconds=seconds
    )
    assert all(timing.best for timing in timings)  # one image at least, whatever it takes
    assert clock.now - start <= seconds + 0.7


def test_rounds_alternate_and_end_at_the_deadline() -> None:
    clock = FakeTime()
    a, b = clock.model("a", lambda size: 1.0), clock.model("b", lambda size: 2.0)
    results: list[list[float]] = [[], [], []]
    run_rounds([partial(a, 1), None, partial(b, 1)], results, Stopwatch(10.0, clock), slice_seconds=0.0)
    assert [name for name, _ in clock.calls] == ["a", "b"] * 3
    assert results == [[1.0] * 3, [], [2.0] * 3]
    run_rounds([partial(a, 1)], [many := []], Stopwatch(1e6, clock), rounds=5, slice_seconds=0.0)
    assert len(many) == 5


def test_short_calls_are_repeated() -> None:
    clock = FakeTime()
    call = clock.model("a", lambda size: 0.03)
    assert Stopwatch(10.0, clock).time(partial(call, 1), at_least=0.1) == pytest.approx(0.03)
    assert len(clock.calls) == 4


def test_a_round_without_memory_leaves_no_time() -> None:
    clock = FakeTime()
    results: list[list[float]] = [[]]
    run_rounds([partial(clock.model("a", lambda size: 1.0, limit=0), 1)], results, Stopwatch(3.0, clock), rounds=2)
    assert results == [[]]


@pytest.mark.parametrize(
    ("text", "seconds"), [("600", 600), ("90s", 90), ("10m", 600), ("1.5h", 5400), ("2 min", 120), (" 5M ", 300)]
)
def test_a_budget(text: str, seconds: float) -> None:
    assert parse_budget(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0s", "-3m", "ten", "10 days", "1e9h", "nan", "5m3", "99999999999"])
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(UserError, match=r"--budget .*: give a time above 0, such as 90s, 10m or 1h"):
        parse_budget(text)
