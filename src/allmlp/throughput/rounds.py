"""The rounds of a benchmark: every round times each model once, so that all share what else the machine does."""

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

from allmlp.throughput.subject import OutOfMemory

Clock = Callable[[], float]
LARGEST_BATCH = 4096
FALL = 0.9  # a sweep ends at batches whose throughput is below this share of the best, twice
MAX_ROUNDS = 9


@dataclass
class Timing:
    """The timings of one model: seconds per call, by batch size. ``None``: it does not fit into memory."""

    seconds: dict[int, list[float] | None] = field(default_factory=dict)

    def rates(self, batch_size: int) -> list[float]:
        """Images per second of each round."""
        return [batch_size / seconds for seconds in self.seconds.get(batch_size) or []]

    def rate(self, batch_size: int) -> float | None:
        rates = self.rates(batch_size)
        return statistics.median(rates) if rates else None

    @property
    def sweep(self) -> dict[int, float | None]:
        """Batch size → median images per second; None: out of memory."""
        return {batch_size: self.rate(batch_size) for batch_size in sorted(self.seconds)}

    @property
    def best(self) -> int | None:
        """The batch size with the most images per second."""
        rates = {batch_size: rate for batch_size, rate in self.sweep.items() if rate is not None}
        return max(rates, key=lambda size: rates[size]) if rates else None


class Stopwatch:
    """Times calls, within a deadline.

    Args:
        seconds: until the deadline.
        clock: the time in seconds.
    """

    def __init__(self, seconds: float, clock: Clock = time.perf_counter) -> None:
        self.clock = clock
        self.deadline = clock() + seconds

    @property
    def left(self) -> float:
        return self.deadline - self.clock()

    def part(self, share: float) -> "Stopwatch":
        """A deadline after this share of the time that is left."""
        return Stopwatch(max(self.left, 0.0) * share, self.clock)

    def time(self, call: Callable[[], None], at_least: float = 0.0) -> float:
        """Seconds of one call: the mean of as many as take ``at_least`` seconds together, at least one."""
        start, calls = self.clock(), 0
        while True:
            call()
            calls += 1
            if (elapsed := self.clock() - start) >= min(at_least, max(self.left, 0.0)):
                return elapsed / calls


def run_sweeps(
    calls: Sequence[Callable[[int], None]],
    timings: Sequence[Timing],
    watch: Stopwatch,
    batch_sizes: Iterable[int] | None = None,
    slice_seconds: float = 0.2,
) -> None:
    """Times each call at growing batch sizes, all of them at one size before the next.

    A sweep ends where the batch does not fit, where throughput has fallen twice, or where the next batch would take
    more than its share of the time that is left.

    Args:
        calls: take a batch size; raise OutOfMemory if it does not fit.
        timings: receive the results.
        watch: gives the deadline.
        batch_sizes: sizes to try, all of them; None: 1, 2, 4, …
        slice_seconds: how long one timing repeats a short call.
    """
    chosen = None if batch_sizes is None else sorted(set(batch_sizes))
    sizes = chosen or [2**n for n in range(LARGEST_BATCH.bit_length())]
    active = list(range(len(calls)))
    for size in sizes:
        for i in list(active):
            call, timing = calls[i], timings[i]
            expected = expected_seconds(timing, size)
            if timing.seconds and 2 * expected > max(watch.left, 0.0) / len(active):  # to warm up, and to time
                active.remove(i)
                continue
            try:
                call(size)
                timing.seconds[size] = [watch.time(partial(call, size), slice_seconds)]
            except OutOfMemory:
                timing.seconds[size] = None
                active.remove(i)
                continue
            if chosen is None and has_fallen(timing):
                active.remove(i)


def expected_seconds(timing: Timing, size: int) -> float:
    """The time of a batch of this size, from that of the largest one before; 0 if there is none."""
    known = {batch_size: times for batch_size, times in timing.seconds.items() if times}
    if not known:
        return 0.0
    largest = max(known)
    return statistics.median(known[largest]) * size / largest


def has_fallen(timing: Timing) -> bool:
    """Whether the last two sizes are both clearly slower than the best."""
    rates = [rate for rate in timing.sweep.values() if rate is not None]
    return len(rates) > 2 and max(rates[-2:]) < FALL * max(rates)


def run_rounds(
    calls: Sequence[Callable[[], None] | None],
    results: Sequence[list[float]],
    watch: Stopwatch,
    rounds: int = MAX_ROUNDS,
    slice_seconds: float = 0.2,
) -> None:
    """Times each call once a round, in turn, until the deadline; a round that has begun is finished.

    Args:
        calls: None: left out.
        results: receive the seconds of each round.
        watch: gives the deadline.
        rounds: at most this many.
        slice_seconds: how long one timing repeats a short call.
    """
    for _ in range(rounds):
        start = watch.clock()
        for call, found in zip(calls, results, strict=True):
            if call is not None:
                try:
                    found.append(watch.time(call, slice_seconds))
                except OutOfMemory:  # other programs took the memory that there was in the sweep
                    continue
        if watch.left < watch.clock() - start:
            return
