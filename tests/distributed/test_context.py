"""What the processes of a run tell each other: sums, lists, one's outcome for all, and turns."""

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run, values

from allmlp.distributed.context import SINGLE_PROCESS, DistributedContext
from allmlp.errors import RunError, UserError

LARGE = 2**63


def sums(context: DistributedContext, numbers: list[list[int]]) -> list[int]:
    return context.sum(numbers[context.rank])


@pytest.mark.parametrize("world_size", [2, 3])
def test_sums_wrap_around_as_integers_of_64_bits_do(world_size: int) -> None:
    rows = [[rank, LARGE - 1, -LARGE, 2**64 - 1 - rank, 2**70 + 5, -(2**65) - rank, 0] for rank in range(world_size)]
    found = values(sums, world_size, rows)
    assert all(row == found[0] for row in found)
    exact = [sum(column) for column in zip(*rows, strict=True)]
    assert [value % 2**64 for value in found[0]] == [value % 2**64 for value in exact]
    assert found[0][0] == exact[0]  # what fits is the number itself
    assert found[0][-1] == 0


def test_no_numbers_are_summed_to_none() -> None:
    assert values(sums, 2, [[], []]) == [[], []]
    assert SINGLE_PROCESS.sum([]) == []


def means(context: DistributedContext) -> tuple[float, float, float, bool]:
    mine = torch.tensor(2.0 ** (10 * context.rank), dtype=torch.float64)
    before = mine.clone()
    nan = context.mean(torch.tensor(float("nan") if context.rank else 1.0))
    rows = context.mean(torch.arange(3.0) + context.rank)
    return float(context.mean(mine)), float(nan), float(rows[2]), torch.equal(mine, before)


def test_the_mean_is_over_all_ranks_and_leaves_what_it_is_given() -> None:
    for mean, nan, last, untouched in values(means, 3):
        assert mean == (1 + 2**10 + 2**20) / 3
        assert nan != nan
        assert last == 3.0
        assert untouched


def gathers(context: DistributedContext, things: list[Any]) -> list[Any]:
    return context.all_gather(things[context.rank])


def test_all_have_each_rank_s_value_in_the_order_of_the_ranks() -> None:
    things = [[(3, "ä\n")], None, {"x": [1.5] * 10_000}]  # of other sizes and kinds
    assert values(gathers, 3, things) == [things] * 3


FAILURES = {
    "user": UserError("no such thing: name another"),
    "run": RunError("it failed"),
    "disk": OSError(errno.ENOSPC, "No space left on device", "some/file"),
    "absent": FileNotFoundError(errno.ENOENT, "No such file", "some/file"),
}


def acted(context: DistributedContext, kind: str) -> list[Any]:
    """What a first call gives (a value, or a failure's type, words and details), and a second one after it."""
    calls: list[int] = []

    def action() -> dict[str, Any]:
        calls.append(context.rank)
        if kind in FAILURES:
            raise FAILURES[kind]
        return {"rank": context.rank, "path": Path("a/b")}

    try:
        outcome: Any = context.broadcast_from_rank0(action)
    except Exception as error:
        outcome = (type(error), str(error), getattr(error, "errno", None), getattr(error, "filename", None))
    return [outcome, calls, context.broadcast_from_rank0(lambda: context.rank)]


def test_what_the_first_does_is_for_all() -> None:
    told = values(acted, 3, "value")
    assert [outcome for outcome, _, _ in told] == [{"rank": 0, "path": Path("a/b")}] * 3
    assert [calls for _, calls, _ in told] == [[0], [], []]
    assert [second for *_, second in told] == [0] * 3


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_of_the_first_is_raised_on_all_and_the_next_call_works(kind: str) -> None:
    expected = FAILURES[kind]
    details = (getattr(expected, "errno", None), getattr(expected, "filename", None))
    for outcome, _, second in values(acted, 3, kind):
        assert outcome == (type(expected), str(expected), *details)
        assert second == 0


def falls(context: DistributedContext) -> int:
    def action() -> int:
        raise ArithmeticError("nobody expected it")

    return context.broadcast_from_rank0(action)


def test_a_failure_that_nobody_expected_ends_all_ranks_and_soon() -> None:
    begun = time.monotonic()
    left = run(joined_and, 2, falls)
    assert time.monotonic() - begun < 20
    assert "ArithmeticError: nobody expected it" in str(left[0].error)
    assert left[1].status != 0 or left[1].error
    told = f"{left[1].err}{left[1].error}"
    assert any(word in told for word in ("rank 0 failed", "ArithmeticError", "closed", "reset")), told


def joined_and(function: Any, *words: Any) -> Any:
    from allmlp.distributed.context import init_distributed

    with init_distributed(30) as context:
        return function(context, *words)


def local_rank0_first(context: DistributedContext) -> tuple[float, float]:
    def read() -> tuple[float, float]:
        begun = time.monotonic()
        time.sleep(0.4 if context.local_rank == 0 else 0.0)
        return begun, time.monotonic()

    return context.local_rank0_first(read)


def test_the_first_of_a_machine_passes_before_its_others() -> None:
    (_, ended), *others = values(local_rank0_first, 3)
    assert all(begun >= ended for begun, _ in others)


def slow_reading(seconds: float) -> str:
    from allmlp.distributed.context import init_distributed

    with init_distributed(1) as context:  # --timeout-seconds 1
        context.heartbeat("reading the data", slow=True)  # which may take an hour
        context.local_rank0_first(lambda: time.sleep(seconds if context.is_rank0 else 0.0))
        return str(context.broadcast_from_rank0(lambda: "passed"))


def test_reading_the_data_may_take_longer_than_the_time_without_progress() -> None:
    left = run(slow_reading, 2, 2.5)
    assert [(one.value, one.error) for one in left] == [("passed", None)] * 2


def places(context: DistributedContext) -> tuple[int, int, int, int, bool, str]:
    device = str(context.local_device(torch.device("cpu")))
    return context.rank, context.world_size, context.local_rank, context.local_world_size, context.is_rank0, device


def test_each_knows_its_place() -> None:
    assert values(places, 3) == [(rank, 3, rank, 3, rank == 0, "cpu") for rank in range(3)]


def test_of_several_processes_each_has_its_own_gpu() -> None:
    context = DistributedContext(rank=5, world_size=8, local_rank=1, local_world_size=4)
    assert context.local_device(torch.device("cuda")) == torch.device("cuda", 1)
    assert context.local_device(torch.device("cpu")) == torch.device("cpu")
    assert SINGLE_PROCESS.device(torch.device("cuda", 3)) == torch.device("cuda", 3)


def test_alone_nothing_is_exchanged() -> None:
    value = torch.tensor(2.5)
    assert SINGLE_PROCESS.mean(value) is value
    assert SINGLE_PROCESS.gather("x") == ["x"]
    assert SINGLE_PROCESS.broadcast_from_rank0(lambda: 7) == 7
    assert SINGLE_PROCESS.sum([1, -(2**40)]) == [1, -(2**40)]
    assert SINGLE_PROCESS.local_rank0_first(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        SINGLE_PROCESS.broadcast_from_rank0(lambda: 1 // 0)


def alone_by_environment(context: DistributedContext) -> tuple[int, bool]:
    return context.world_size, "RANK" in os.environ


def test_a_world_of_one_that_torchrun_has_started_is_one_process() -> None:
    assert values(alone_by_environment, 1) == [(1, True)]
