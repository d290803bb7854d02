"""Which process of a run this is, and the collective operations that keep all of them consistent.

A single process uses the same code, but its context does not communicate.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from allmlp.device import select_device
from allmlp.distributed.launcher import end_with_launcher
from allmlp.distributed.watchdog import CONNECT_TIMEOUT, SLOW_TIMEOUT, Watchdog, connect_store, connection_errors
from allmlp.errors import RunError, UserError

T = TypeVar("T")
WATCHDOG_MARGIN = timedelta(minutes=2)  # PyTorch times out this much later, as it cannot name the missing rank


@dataclass(frozen=True, kw_only=True)
class DistributedContext:
    """Rank ``rank`` of ``world_size``; on its machine it is ``local_rank`` of ``local_world_size``.

    All ranks share a file system. Collective methods must be called by all ranks, in the same order.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    watchdog: Watchdog | None = None
    checkpoint_group: Any = None  # process group for checkpoints, which are written while training continues
    control_group: Any = None  # process group for small messages between the ranks' CPUs

    @property
    def is_rank0(self) -> bool:
        """Whether this process writes files and logs for all."""
        return self.rank == 0

    def heartbeat(self, activity: str, slow: bool = False) -> None:
        """Reports progress to the watchdog, which ends the run when a rank makes none for too long.

        ``slow``: the activity may take an hour without any progress to report (compiling, reading a large folder).
        """
        if self.watchdog is not None:
            self.watchdog.heartbeat(activity, slow)

    def sum(self, values: list[int]) -> list[int]:
        """The sum of each number over all ranks, modulo 2⁶⁴."""
        if self.world_size == 1:
            return values
        total = torch.tensor([(value + 2**63) % 2**64 - 2**63 for value in values])
        dist.all_reduce(total, group=self.control_group)
        return total.tolist()

    def mean(self, value: Tensor) -> Tensor:
        """The mean of a device tensor over all ranks; the CPU does not wait for it."""
        if self.world_size == 1:
            return value
        total = value.clone()
        dist.all_reduce(total)
        return total / self.world_size

    def all_gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control_group)
        return values

    def broadcast_from_rank0(self, action: Callable[[], T]) -> T:
        """Runs the action on rank 0; every rank returns its result, or raises its UserError, RunError or OSError."""
        if self.world_size == 1:
            return action()
        outcome: list[Any] = [None, None]
        if self.is_rank0:
            try:
                outcome[0] = action()
            except (UserError, RunError, OSError) as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self.control_group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def local_rank0_first(self, action: Callable[[], T]) -> T:
        """Runs the action on one process of each machine, then on the others, which find the files that it downloaded.

        A failure of one of the first processes is raised on all ranks.
        """
        if self.world_size == 1:
            return action()
        done, failure = [], None
        if self.local_rank == 0:
            try:
                done.append(action())
            except (UserError, RunError, OSError) as error:
                failure = error
        failures = [error for error in self.all_gather(failure) if error is not None]
        if failures:
            raise failures[0]
        return done[0] if done else action()

    def select_device(self, name: str) -> torch.device:
        """The device of this process for a name; see ``device.select_device``."""
        return select_device(name, self.local_rank, self.world_size)


SINGLE_PROCESS = DistributedContext()


@contextlib.contextmanager
def init_distributed(timeout_seconds: float, device: str = "auto") -> Iterator[DistributedContext]:
    """Joins the processes that torchrun or ``--processes`` started; otherwise yields the context of a single process.

    Args:
        timeout_seconds: after this long without progress, the run ends and names the stuck rank.
        device: the recipe's device. Unless it is the CPU, each process uses its own GPU.

    Raises:
        UserError: environment variables that identify the process are missing or not numbers; a device that this
            process cannot have.
        RunError: the device does not work, or the processes cannot be connected.
    """
    world_size = environment_number("WORLD_SIZE", 1)
    if world_size == 1:
        yield SINGLE_PROCESS
        return
    rank, local_rank = environment_number("RANK"), environment_number("LOCAL_RANK", 0)
    if not os.environ.get("MASTER_ADDR"):
        raise UserError("MASTER_ADDR is not set: start the run with --processes or torchrun, or unset WORLD_SIZE")
    environment_number("MASTER_PORT")
    end_with_launcher()
    own_device = select_device(device, local_rank, world_size)
    on_gpus = own_device.type == "cuda"
    if on_gpus:
        if not dist.is_nccl_available():
            raise UserError(f"PyTorch has no NCCL on {sys.platform}: train in one process, or with --device cpu")
        torch.cuda.set_device(own_device)  # NCCL, DDP and FSDP use the current device
    timeout = timedelta(seconds=max(timeout_seconds, SLOW_TIMEOUT)) + WATCHDOG_MARGIN
    backend, store = "cpu:gloo,cuda:nccl" if on_gpus else "gloo", connect_store(timeout, is_server=rank == 0)
    with connection_errors():
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        groups = [dist.new_group(backend="gloo", timeout=timeout) for _ in range(2)]
    watchdog = Watchdog(connect_store(CONNECT_TIMEOUT), rank, world_size, timeout_seconds)
    context = DistributedContext(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=environment_number("LOCAL_WORLD_SIZE", world_size),
        watchdog=watchdog,
        checkpoint_group=groups[0],
        control_group=groups[1],
    )
    with watchdog:
        yield context
    dist.destroy_process_group()  # not after an error: it would wait for a rank that is gone


def environment_number(variable: str, default: int | None = None) -> int:
    """The value of an environment variable that torchrun sets."""
    value = os.environ.get(variable, "" if default is None else str(default))
    if not value.isdecimal():
        raise UserError(
            f"environment variable {variable}={value!r}: must be a number that identifies one of several processes; "
            "start the run with --processes or torchrun, or unset WORLD_SIZE and RANK"
        )
    return int(value)
