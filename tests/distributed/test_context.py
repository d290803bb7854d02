"""Collective operations of the processes of a run: sums, lists, and actions of one rank for all."""

import errno
import math
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
SUMS = [[rank, LARGE - 1, -LARGE, 2**64 - 1 - rank, 2**70 + 5, -(2**65) - rank, 0] for rank in range(3)]
OBJECTS = [[(3, "ä\n")], None, {"x": [1.5] * 10_000}]  # of different types and sizes
FAILURES = (
    UserError("unknown name: choose another"),
    RunError("it failed"),
    OSError(errno.ENOSPC, "No space left on device", "some/file"),
    FileNotFoundError(errno.ENOENT, "No such file", "some/file"),
)


def details(error: Exception) -> tuple[Any, ...]:
    return type(error), str(error), getattr(error, "errno", None), getattr(error, "filename", None)


def broadcast_failure(context: DistributedContext, failure: Exception) -> tuple[Any, ...]:
    def action() -> None:
        raise failure

    try:
        context.broadcast_from_rank0(action)
    except Exception as error:
        return details(error)
    return ()


def collectives(context: DistributedContext) -> dict[str, Any]:
    """The result of each collective operation on this rank."""
    calls: list[int] = []
    mine = torch.tensor(2.0 ** (10 * context.rank), dtype=torch.float64)

    def timed() -> tuple[float, float]:
        start = time.monotonic()
        time.sleep(0.4 if context.local_rank == 0 else 0.0)
        return start, time.monotonic()

    return {
        "rank": (context.rank, context.world_size, context.local_rank, context.local_world_size, context.is_rank0),
        "device": str(context.select_device("cpu")),
        "sum": context.sum(SUMS[context.rank]),
        "sum of nothing": context.sum([]),
        "mean": (float(context.mean(mine)), float(mine)),
        "mean of NaN": float(context.mean(torch.tensor(float("nan") if context.rank else 1.0))),
        "mean of rows": context.mean(torch.arange(3.0) + context.rank).tolist(),
        "all_gather": context.all_gather(OBJECTS[context.rank]),
        "broadcast": context.broadcast_from_rank0(lambda: calls.append(context.rank) or {"path": Path("a/b")}),
        "called on": calls,
        "failures": [broadcast_failure(context, failure) for failure in FAILURES],
        "after a failure": context.broadcast_from_rank0(lambda: context.rank),
        "local rank 0 first": context.local_rank0_first(timed),
    }


def test_collective_operations_of_three_ranks() -> None:
    found = rank_values(collectives, 3)
    exact = [sum(column) for column in zip(*SUMS, strict=True)]
    for rank, of_rank in enumerate(found):
        assert of_rank["rank"] == (rank, 3, rank, 3, rank == 0)
        assert of_rank["device"] == "cpu"
        assert of_rank["sum"] == found[0]["sum"]
        assert [value % 2**64 for value in of_rank["sum"]] == [value % 2**64 for value in exact]
        assert (of_rank["sum"][0], of_rank["sum"][-1], of_rank["sum of nothing"]) == (3, 0, [])  # what fits is exact
        assert of_rank["mean"] == ((1 + 2**10 + 2**20) / 3, 2.0 ** (10 * rank)), "the argument is unchanged"
        assert math.isnan(of_rank["mean of NaN"])
        assert of_rank["mean of rows"] == [1, 2, 3]
        assert of_rank["all_gather"] == OBJECTS
        assert (of_rank["broadcast"], of_rank["called on"]) == ({"path": Path("a/b")}, [0] if rank == 0 else [])
        assert of_rank["failures"] == [details(failure) for failure in FAILURES]
        assert of_rank["after a failure"] == 0
    (_, end), *others = (of_rank["local rank 0 first"] for of_rank in found)
    assert all(start >= end for start, _ in others)


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


def slow_reading(seconds: float) -> str:
    with init_distributed(1) as context:  # --timeout-seconds 1
        context.heartbeat("reading the data", slow=True)  # may take an hour
        context.local_rank0_first(lambda: time.sleep(seconds if context.is_rank0 else 0.0))
        return str(context.broadcast_from_rank0(lambda: "passed"))


def test_reading_the_data_may_take_longer_than_the_timeout() -> None:
    outcomes = run_ranks(slow_reading, 2, 2.5)
    assert [(outcome.value, outcome.error) for outcome in outcomes] == [("passed", None)] * 2


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
