"""Collective operations of the processes of a run: sums, lists, and actions of one rank for all."""

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import call_with_context, rank_values, run_ranks

from allmlp.device import choose_device
from allmlp.distributed.context import SINGLE_PROCESS, DistributedContext, init_distributed
from allmlp.errors import RunError, UserError

LARGE = 2**63


def sums(context: DistributedContext, numbers: list[list[int]]) -> list[int]:
    return context.sum(numbers[context.rank])


@pytest.mark.parametrize("world_size", [2, 3])
def test_sums_wrap_around_like_64_bit_integers(world_size: int) -> None:
    rows = [[rank, LARGE - 1, -LARGE, 2**64 - 1 - rank, 2**70 + 5, -(2**65) - rank, 0] for rank in range(world_size)]
    found = rank_values(sums, world_size, rows)
    assert all(row == found[0] for row in found)
    exact = [sum(column) for column in zip(*rows, strict=True)]
    assert [value % 2**64 for value in found[0]] == [value % 2**64 for value in exact]
    assert found[0][0] == exact[0]  # numbers that fit are exact
    assert found[0][-1] == 0


def test_the_sum_of_no_numbers_is_empty() -> None:
    assert rank_values(sums, 2, [[], []]) == [[], []]
    assert SINGLE_PROCESS.sum([]) == []


def means(context: DistributedContext) -> tuple[float, float, float, bool]:
    mine = torch.tensor(2.0 ** (10 * context.rank), dtype=torch.float64)
    before = mine.clone()
    nan = context.mean(torch.tensor(float("nan") if context.rank else 1.0))
    rows = context.mean(torch.arange(3.0) + context.rank)
    return float(context.mean(mine)), float(nan), float(rows[2]), torch.equal(mine, before)


def test_the_mean_is_over_all_ranks_and_leaves_its_argument_unchanged() -> None:
    for mean, nan, last, unchanged in rank_values(means, 3):
        assert mean == (1 + 2**10 + 2**20) / 3
        assert nan != nan
        assert last == 3.0
        assert unchanged


def gathers(context: DistributedContext, objects: list[Any]) -> list[Any]:
    return context.all_gather(objects[context.rank])


def test_all_gather_gives_every_rank_s_value_in_the_order_of_the_ranks() -> None:
    objects = [[(3, "ä\n")], None, {"x": [1.5] * 10_000}]  # of different types and sizes
    assert rank_values(gathers, 3, objects) == [objects] * 3


FAILURES = {
    "user": UserError("unknown name: choose another"),
    "run": RunError("it failed"),
    "disk": OSError(errno.ENOSPC, "No space left on device", "some/file"),
    "absent": FileNotFoundError(errno.ENOENT, "No such file", "some/file"),
}


def broadcast_twice(context: DistributedContext, kind: str) -> list[Any]:
    """The outcome of a first call (a value, or a failure's type, text and details), its callers, and a second call."""
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


def test_all_ranks_get_the_result_of_rank_0() -> None:
    found = rank_values(broadcast_twice, 3, "value")
    assert [outcome for outcome, _, _ in found] == [{"rank": 0, "path": Path("a/b")}] * 3
    assert [calls for _, calls, _ in found] == [[0], [], []]
    assert [second for *_, second in found] == [0] * 3


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_of_rank_0_is_raised_on_all_ranks_and_the_next_call_works(kind: str) -> None:
    expected = FAILURES[kind]
    details = (getattr(expected, "errno", None), getattr(expected, "filename", None))
    for outcome, _, second in rank_values(broadcast_twice, 3, kind):
        assert outcome == (type(expected), str(expected), *details)
        assert second == 0


def broadcast_an_unexpected_error(context: DistributedContext) -> int:
    def action() -> int:
        raise ArithmeticError("unexpected")

    return context.broadcast_from_rank0(action)


def test_an_unexpected_error_ends_all_ranks_soon() -> None:
    start = time.monotonic()
    first, second = run_ranks(call_with_context, 2, broadcast_an_unexpected_error)
    assert time.monotonic() - start < 20
    assert "ArithmeticError: unexpected" in str(first.error)
    assert second.status != 0 or second.error
    text = f"{second.err}{second.error}"
    assert any(word in text for word in ("rank 0 failed", "ArithmeticError", "closed", "reset")), text


def start_and_end(context: DistributedContext) -> tuple[float, float]:
    def action() -> tuple[float, float]:
        start = time.monotonic()
        time.sleep(0.4 if context.local_rank == 0 else 0.0)
        return start, time.monotonic()

    return context.local_rank0_first(action)


def test_local_rank_0_finishes_before_the_others_start() -> None:
    (_, end), *others = rank_values(start_and_end, 3)
    assert all(start >= end for start, _ in others)


def slow_reading(seconds: float) -> str:
    with init_distributed(1) as context:  # --timeout-seconds 1
        context.heartbeat("reading the data", slow=True)  # may take an hour
        context.local_rank0_first(lambda: time.sleep(seconds if context.is_rank0 else 0.0))
        return str(context.broadcast_from_rank0(lambda: "passed"))


def test_reading_the_data_may_take_longer_than_the_timeout() -> None:
    outcomes = run_ranks(slow_reading, 2, 2.5)
    assert [(outcome.value, outcome.error) for outcome in outcomes] == [("passed", None)] * 2


def identity(context: DistributedContext) -> tuple[int, int, int, int, bool, str]:
    device = str(context.select_device("cpu"))
    return context.rank, context.world_size, context.local_rank, context.local_world_size, context.is_rank0, device


def test_each_process_has_its_rank() -> None:
    assert rank_values(identity, 3) == [(rank, 3, rank, 3, rank == 0, "cpu") for rank in range(3)]


def test_each_of_several_processes_uses_another_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [choose_device(name, 1, 8) for name in ("auto", "cuda", "cpu")] == [
        *(torch.device("cuda", 1), torch.device("cuda", 1), torch.device("cpu"))
    ]
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    for name, rank, processes, remedy in (("cuda", 2, 3, "--processes 2"), ("cuda:1", 0, 2, "--device cuda or cpu")):
        with pytest.raises(UserError, match=remedy):
            choose_device(name, rank, processes)
    with pytest.raises(UserError, match=r"cuda:2.*has 2"):
        choose_device("cuda:2")


def test_why_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    with pytest.raises(UserError, match=r"CUDA_VISIBLE_DEVICES='7'.*--device auto"):
        choose_device("cuda")


def test_a_single_process_communicates_with_nobody() -> None:
    value = torch.tensor(2.5)
    assert SINGLE_PROCESS.mean(value) is value
    assert SINGLE_PROCESS.all_gather("x") == ["x"]
    assert SINGLE_PROCESS.broadcast_from_rank0(lambda: 7) == 7
    assert SINGLE_PROCESS.sum([1, -(2**40)]) == [1, -(2**40)]
    assert SINGLE_PROCESS.local_rank0_first(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        SINGLE_PROCESS.broadcast_from_rank0(lambda: 1 // 0)


def world_size_and_rank_variable(context: DistributedContext) -> tuple[int, bool]:
    return context.world_size, "RANK" in os.environ


def test_one_process_started_by_torchrun_is_a_single_process() -> None:
    assert rank_values(world_size_and_rank_variable, 1) == [(1, True)]
